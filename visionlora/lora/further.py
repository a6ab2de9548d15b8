"""Learning on from a finished adapter: what its modules say about the configuration of one that trains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from visionlora.errors import ConfigError
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig

LEARNED_BY: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora", "rslora", "lora+", "lora-fa"),
    "tlora": ("tlora",),
    "dora": ("dora",),
    "vera": ("vera",),
    "ia3": ("ia3",),
}
"""Kinds of modules that can learn on, and the methods that teach them; the first is the default."""


def method_for(modules: Mapping[str, AdapterModule], asked: str, where: str) -> str:
    """The method that goes on with these modules.

    Args:
        modules: of the adapter.
        asked: the method of the settings; `lora`, their default, gives way to what the adapter is.
        where: how messages name the adapter.

    Raises:
        ConfigError: when they cannot learn on, or not by that method.
    """
    if not modules:
        raise ConfigError(
            f"{where} has a head alone, no layers that could learn on. Leave start_from out: the head of a new run starts as a "
            "linear probe by itself."
        )
    kinds = Counter(m.kind if m.product in (m.kind, "lora") else f"{m.kind} on {m.product}" for m in modules.values())
    if len(kinds) != 1 or next(iter(kinds)) not in LEARNED_BY:
        there = ", ".join(f"{n} of kind {kind}" for kind, n in kinds.most_common())
        advice = "`visionlora resize FILE --energy 0.999 -o lora.safetensors` makes a LoRA of what has a low rank."
        if set(kinds) <= {"full"}:
            advice = (
                "A model that was trained in full is a base of its own: export or bake it, and name it with --model."
            )
        raise ConfigError(
            f"{where} cannot learn on: it holds {there}, and all must be of one kind of {', '.join(LEARNED_BY)}. {advice}"
        )
    methods = LEARNED_BY[next(iter(kinds))]
    if asked in methods:
        return asked
    if asked != "lora":
        raise ConfigError(f"method is {asked!r}, but {where} can only learn on by {' or '.join(methods)}.")
    return methods[0]


def further_config(
    config: AdapterConfig, modules: Mapping[str, AdapterModule], info: Mapping[str, Any]
) -> AdapterConfig:
    """The configuration with the layers, ranks and scalings of an adapter that learns on.

    Args:
        config: of the run; its method suits the modules, see `method_for`.
        modules: of one component.
        info: the header of the adapter, which may say by which words its layers were found.
    """
    ranks = {name: m.rank for name, m in modules.items() if m.rank}
    scaled = config.method not in ("vera", "ia3")
    root = math.sqrt if config.method == "rslora" else float
    alphas = {name: modules[name].scaling * root(rank) for name, rank in ranks.items()} if scaled else {}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] if v else None for v in (ranks, alphas))
    first = next(iter(modules.values()))
    more: dict[str, Any] = {}
    if config.method == "vera":
        more["projection_seed"] = int(first.options["projection_seed"])
    if config.method == "tlora":
        more["min_rank"] = min(int(m.options["least"]) for m in modules.values())
    return replace(
        config,
        rank=int(rank or config.rank),
        alpha=alpha,
        init="kaiming",
        targets=tuple(info.get("config", {}).get("targets") or modules),
        exclude=(),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        **more,
    )
