"""Parts of fused layers as adapters of the whole layer, for formats that know whole layers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from visionlora.errors import AdapterFileError
from visionlora.formats.header import PIPELINE_PARTS
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.families import fused_names, lookup
from visionlora.lora.names import spelling_key
from visionlora.lora.targets import PACKED


def whole_layers(adapter: Adapter, component: str, format: str) -> dict[str, AdapterModule]:
    """The modules with parts of fused layers joined: ΔW on some rows is a LoRA on all of them, zero elsewhere.

    Args:
        adapter: of which
        component: this part is taken.
        format: which cannot hold parts, for messages.

    Raises:
        AdapterFileError: for parts of torch's packed attention, which other formats cannot hold, or of another kind than LoRA.
    """
    whole: dict[str, AdapterModule] = {}
    parts: dict[str, dict[str, AdapterModule]] = {}
    for name, m in adapter.component(component).items():
        layer, _, part = name.rpartition(".")
        fused = lookup(layer, fused_names())
        if m.kind != "full" and fused is not None and part in fused_names()[fused]:
            parts.setdefault(layer, {})[part] = m
        elif m.kind != "full" and part in ("q", "k", "v") and (adapter.odd_layers.get(name) == PACKED or packs(layer)):
            raise AdapterFileError(
                f"{name!r} is a part of torch's packed attention, which {format} has no way to hold. visionlora's own format "
                "keeps it; or merge it."
            )
        else:
            whole[name] = m
    for layer, own in parts.items():
        if layer in whole:  # of a merged adapter: some of it for the parts and some for the whole
            own[""] = whole[layer]
        if any(m.kind != "lora" for m in own.values()):
            raise AdapterFileError(f"Parts of the fused layer {layer!r} can be written to {format} as LoRA alone.")
        order = fused_names()[str(lookup(layer, fused_names()))]
        width = len(next(iter(own.values())).tensors["lora_B"])
        up = torch.zeros(width * len(order), sum(m.rank for m in own.values()))
        start = 0
        for part, m in own.items():
            rows = slice(order.index(part) * width, (order.index(part) + 1) * width) if part else slice(None)
            up[rows, start : start + m.rank] = m.lora_factors()[1] * m.scaling
            start += m.rank
        down = torch.cat([m.lora_factors()[0] for m in own.values()])
        whole[layer] = AdapterModule.lora(down, up, float(len(down)))
    return whole


def packs(layer: str) -> bool:
    """Whether a module has the name that torch's packed attention has as a rule, for files that do not say."""
    return layer.rpartition(".")[2] in ("self_attention", "self_attn", "multihead_attn")


def pipeline_layers(adapter: Adapter, format: str) -> Iterator[tuple[str, str, AdapterModule]]:
    """(component, path, module) of every whole layer, for formats that hold parts of Stable Diffusion alone.

    Raises:
        AdapterFileError: for another part, two modules for one layer, or see `whole_layers`.
    """
    seen: dict[str, str] = {}
    for component in adapter.components:
        if component not in PIPELINE_PARTS:
            raise AdapterFileError(
                f"{format} holds adapters for {', '.join(PIPELINE_PARTS)}; this one is for {component!r}. Formats visionlora "
                "and peft keep it."
            )
        layers = whole_layers(adapter, component, format)
        for path, module in (layers | told_by(component, layers, format)).items():
            first = seen.setdefault(f"{component}.{spelling_key(path)}", path)
            if first != path:
                raise AdapterFileError(
                    f"The adapter changes one layer of {component} twice, as {first} and as {path}, and {format} has one place "
                    "for it. Merge the adapters that it came from again."
                )
            yield component, path, module


LAYER = re.compile(r"(.*\blayers\.\d+\.)(self_attn\.[qkv]_proj|mlp\.fc[12])")
"""Of a text encoder; what comes before its block, and which of its layers it is."""
TOLD_BY = "self_attn.out_proj"
"""The layer of a block by which diffusers tells spellings."""


def told_by(component: str, layers: Mapping[str, AdapterModule], format: str) -> dict[str, AdapterModule]:
    """A LoRA of zeros by which diffusers (0.42) reads all of a text encoder's; empty where it does without.

    In kohya's files it passes the attention by where no output projection is adapted; its own it refuses without a layer of the
    attention. For a DoRA that would need the base's weights.
    """
    if not component.startswith("text_encoder") or any(m.kind != "lora" or m.options for m in layers.values()):
        return {}
    found = [(match[1], match[2], m) for path, m in layers.items() if (match := LAYER.fullmatch(path))]
    attention = [layer for layer in found if layer[1].startswith("self_attn.")]
    candidates = attention if format == "kohya" else [] if attention else found
    if not candidates or any(path.endswith(TOLD_BY) for path in layers):
        return {}
    block, layer, m = candidates[0]
    down, up = m.tensors["lora_A"], m.tensors["lora_B"]
    width = len(up) if layer.endswith("fc2") else down.shape[1]
    return {block + TOLD_BY: AdapterModule.lora(down.new_zeros(m.rank, width), up.new_zeros(width, m.rank), m.alpha)}


def without_told_by(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The modules of a file without what `told_by` has added: no training leaves both factors zero."""

    def is_told_by(name: str, m: AdapterModule) -> bool:
        ours = name.startswith("text_encoder") and name.endswith(f".{TOLD_BY}") and m.kind == "lora"
        return ours and not any(bool(t.any()) for t in m.tensors.values())

    return {n: m for n, m in modules.items() if not is_told_by(n, m)} or dict(modules)
