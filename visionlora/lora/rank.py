"""Automatic ranks: which layers deserve parameters, measured on the user's own data before training.

A short calibration pass adds up the gradient G of every targeted weight, once over the even and once over the odd batches.
The best rank-r change of a layer lowers the loss, to first order and for its size, by the energy of the top r singular
triplets of G (Eckart-Young). A triplet's energy is taken as the product of its strengths in both halves, so that what is
only noise of small batches counts for nothing. Triplets of all layers then compete for one budget by energy per
parameter. Related: GoRA (arXiv 2502.12171) takes mean |W∘G| per layer, AdaLoRA (2303.10512) prunes while training, EVA
(2410.07170) looks at the spectrum of the inputs.
Letters in shapes: o out, i in (of a convolution: of one group, times the kernel), r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.config.choices import WITHOUT_RANKS
from visionlora.errors import ConfigError, TargetError, TrainingError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.damage import damaged
from visionlora.lora.inject import method_class
from visionlora.lora.methods.base import Site
from visionlora.lora.targets import named_patterns, resolve, smaller_side

WIDEST = 4
"""No layer gets more than this many times the mean rank."""


@dataclass(frozen=True)
class RankChoice:
    """What was measured and what follows from it."""

    ranks: dict[str, int]
    """By module name; 0 where the layer is left out."""
    energies: dict[str, float]
    """Energy of all triplets that were in reach, by module name."""
    parameters: int
    """That train in its layers."""
    config: AdapterConfig
    """The configuration with `rank_pattern` and `exclude` filled in, and with the scalings that it had."""

    def by_block(self) -> dict[str, float]:
        """Mean rank of each block, in the model's order: the data of a bar chart."""
        blocks: dict[str, list[int]] = {}
        for name, rank in self.ranks.items():
            blocks.setdefault(block_of(name), []).append(rank)
        return {block: sum(ranks) / len(ranks) for block, ranks in blocks.items()}


def block_of(name: str) -> str:
    """The name up to its first number, and that number: `down_blocks.0`, `blocks.7`, `mid_block`.

    >>> block_of("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"), block_of("mid_block.resnets.0.conv1")
    ('down_blocks.1', 'mid_block')
    """
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def gradient_halves(
    model: nn.Module,
    sites: tuple[Site, ...],
    loss_of: Callable[[int], Tensor],
    batches: int,
    shared: Callable[[Tensor], Tensor] = lambda found: found,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean gradient of each site's weight over the even and over the odd batches, fp32.

    Args:
        model: the base model.
        sites: whose weights.
        loss_of: from a batch number to the training loss of that batch, as a scalar.
        batches: how many.
        shared: the mean of a tensor over processes, where several each have a share of every batch.

    Raises:
        TrainingError: when a loss is NaN or infinite.
        TargetError: when a weight has no part in the loss.
    """
    weights = {(id(s.layer), s.weight_name): cast(nn.Parameter, getattr(s.layer, s.weight_name)) for s in sites}
    flags = {p: p.requires_grad for p in model.parameters()}
    halves: list[dict[int, Tensor]] = [{}, {}]
    try:
        for p in flags:
            p.requires_grad_(False)
        for p in weights.values():
            p.requires_grad_(True)
        for batch in range(batches):
            loss = loss_of(batch)
            if not torch.isfinite(loss):
                raise damaged("The weights of the base", {type(model).__name__: model}) or TrainingError(
                    f"The calibration loss of batch {batch} is {loss.item()}: check the data."
                )
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for p, grad in zip(weights.values(), cast("tuple[Tensor | None, ...]", grads), strict=True):
                if grad is None:
                    name = next(s.name for s in sites if getattr(s.layer, s.weight_name) is p)
                    raise TargetError(
                        f"Layer {name!r} has no part in the loss: the model never calls it. Leave it out: exclude={name!r}."
                    )
                half = halves[batch % 2]
                half[id(p)] = half[id(p)] + grad.float() if id(p) in half else grad.float()
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    halves = [{key: shared(grad) for key, grad in half.items()} for half in halves]
    found = {}
    for site in sites:
        key = id(weights[id(site.layer), site.weight_name])
        first, second = (h[key] if site.rows is None else h[key][site.rows] for h in halves)
        found[site.name] = (first.flatten(1) / batches, second.flatten(1) / batches)
    return found


def triplet_energies(first: Tensor, second: Tensor, most: int) -> Tensor:
    """Energy of the top singular triplets of a gradient that both halves agree on, (most,), never rising.

    Args:
        first: mean gradient over one half, (o, i).
        second: over the other.
        most: how many.
    """
    u, _, v = torch.linalg.svd(first + second, full_matrices=False)
    u, v = u[:, :most], v[:most]
    strengths = [(u * (half @ v.t())).sum(0) for half in (first, second)]
    energy: Tensor = (strengths[0] * strengths[1]).clamp(min=0).cummin(0).values
    return energy


def choose_ranks(
    model: nn.Module,
    config: AdapterConfig,
    loss_of: Callable[[int], Tensor],
    batches: int = 16,
    budget: int | None = None,
    stored: bool = False,
    shared: Callable[[Tensor], Tensor] = lambda found: found,
) -> RankChoice:
    """Spreads the parameters that a uniform `config.rank` would take over the layers that need them.

    Args:
        model: the base model, without this adapter.
        config: its `rank` is the mean rank, unless a budget is given; its targets are the layers that compete.
        loss_of: from a batch number to the training loss of that batch, as a scalar.
        batches: 2 or more; each is a forward and a backward pass.
        budget: parameters to spend; by default what `config.rank` everywhere would take.
        stored: let the budget be of the numbers in the file, which has both factors of init pissa twice, and of LoRA-FA A too.
        shared: the mean of a tensor over processes, where several each have a share of every batch.

    Raises:
        ConfigError: when there are too few batches, or the method has no ranks.
        TrainingError: when a loss is NaN or infinite.
    """
    if batches < 2:
        raise ConfigError(f"Automatic ranks need at least 2 calibration batches; {batches} were given.")
    if config.method in WITHOUT_RANKS or not method_class(config.method).bounded_rank:
        raise ConfigError(f"Method {config.method!r} has no ranks that could be spread over the layers.")
    sites = resolve(model, config).sites
    config = named_patterns(config, sites)
    mean = config.rank if budget is None else uniform_rank([(model, config)], budget, stored)
    halves = gradient_halves(model, sites, loss_of, batches, shared)
    energies = {s.name: triplet_energies(*halves[s.name], min(WIDEST * mean, smaller_side(s))) for s in sites}
    cost, by_name = method_class(config.method).numbers, {s.name: s for s in sites}
    budget = sum(cost(s, config.rank, config, stored) for s in sites) if budget is None else budget
    ranks = spend(energies, lambda name, rank: cost(by_name[name], rank, config, stored), budget)
    kept = {name: rank for name, rank in ranks.items() if rank}
    if not kept:
        raise ConfigError(
            f"No layer is worth a rank within the budget of {budget:,} parameters: raise it, give more calibration "
            "batches, or use a fixed rank."
        )
    chosen = replace(
        config,
        rank_pattern=kept,
        alpha_pattern=same_scalings(config, kept),
        exclude=(*config.exclude_list, *(just(name, ranks) for name, rank in ranks.items() if not rank)),
    )
    parameters = sum(cost(by_name[name], rank, config) for name, rank in kept.items())
    return RankChoice(ranks, {n: float(e.sum()) for n, e in energies.items()}, parameters, chosen)


def same_scalings(config: AdapterConfig, ranks: dict[str, int]) -> dict[str, float]:
    """Alphas with which layers of these ranks have the scalings of the configuration, where it gives an alpha.

    One alpha for all would scale a layer down because it needs more than others.

    >>> same_scalings(AdapterConfig(rank=4, alpha=8.0), {"a": 1, "b": 16}), same_scalings(AdapterConfig(rank=4), {"a": 1})
    ({'a': 2.0, 'b': 32.0}, {})
    """
    by = math.sqrt if config.method == "rslora" else float
    given = [name for name in ranks if config.alpha is not None or name in config.alpha_pattern]
    return {name: config.scaling_of(name) * by(ranks[name]) for name in given}


def at_rank(config: AdapterConfig, rank: int) -> AdapterConfig:
    """The configuration with another rank everywhere and the same scaling, where it gives an alpha; without patterns.

    >>> at_rank(AdapterConfig(rank=8, alpha=16.0), 2).scaling, at_rank(AdapterConfig(rank=8), 2).alpha
    (2.0, None)
    """
    by = math.sqrt if config.method == "rslora" else float
    return replace(config, rank=rank, alpha=None if config.alpha is None else config.scaling * by(rank))


def just(name: str, names: Iterable[str]) -> str:
    """What excludes the layer of this name and no other: the name, where no other ends with it.

    >>> just("conv1", ["conv1", "layer.conv1"]), just("conv2", ["conv1", "conv2"])
    ('re:conv1', 'conv2')
    """
    return f"re:{re.escape(name)}" if any(n.endswith(f".{name}") for n in names) else name


def spend(energies: dict[str, Tensor], cost: Callable[[str, int], int], budget: int) -> dict[str, int]:
    """Buys triplets by energy per parameter until the budget is spent; what has no energy is not bought.

    Args:
        energies: of the triplets of each layer, the largest first.
        cost: from a layer and a rank of 1 or more to the parameters that it takes; a layer without rank takes none.
        budget: in parameters.

    >>> spend({"a": torch.tensor([9.0, 4.0]), "b": torch.tensor([5.0, 0.0])}, lambda name, rank: 10 * rank, 20)
    {'a': 1, 'b': 1}
    """

    def price(name: str, have: int) -> int:
        return cost(name, have + 1) - (cost(name, have) if have else 0)

    offers = [
        (-float(e) / max(1, price(name, have)), name)
        for name, values in energies.items()
        for have, e in enumerate(values)
        if e > 0
    ]
    ranks, spent = dict.fromkeys(energies, 0), 0
    for _, name in sorted(offers, key=lambda offer: offer[0]):
        if spent + (more := price(name, ranks[name])) <= budget:
            ranks[name], spent = ranks[name] + 1, spent + more
    return ranks


Part = tuple[nn.Module, AdapterConfig]
"""Of a model, and what is adapted in it."""


def numbers_at(parts: Iterable[Part], rank: int, stored: bool = False) -> int:
    """What adapters would take with this rank everywhere, of each layer at most its smaller side; see `Method.numbers`."""
    return _numbers(_sized(parts), rank, stored)


def uniform_rank(parts: Iterable[Part], budget: int, stored: bool = False) -> int:
    """The rank that a budget would give to all layers alike, of each at most its smaller side; 1 where not even that fits."""
    sized = _sized(parts)
    low, high = 1, max(smaller_side(site) for site, _ in sized)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _numbers(sized, middle, stored) <= budget else (low, middle - 1)
    return low


def narrowest(parts: Iterable[Part]) -> int:
    """The largest rank that all layers can have."""
    return min(smaller_side(site) for site, _ in _sized(parts))


def _sized(parts: Iterable[Part]) -> list[tuple[Site, AdapterConfig]]:
    return [(site, config) for model, config in parts for site in resolve(model, config).sites]


def _numbers(sized: Iterable[tuple[Site, AdapterConfig]], rank: int, stored: bool) -> int:
    return sum(method_class(c.method).numbers(s, min(rank, smaller_side(s)), c, stored) for s, c in sized)


def input_spectra(
    model: nn.Module, config: AdapterConfig, run: Callable[[int], Any], batches: int = 8, most: int | None = None
) -> dict[str, Tensor]:
    """Top right-singular vectors of each targeted layer's inputs, for init `eva` (arXiv 2410.07170, section 3).

    Args:
        model: the base model.
        config: whose targets are measured.
        run: from a batch number to a forward pass of the model on that batch.
        batches: how many.
        most: directions per layer; the rank of the layer when not given.

    Returns:
        {module name: (r, features)} with orthonormal rows, strongest first.
    """
    sites = resolve(model, config).sites
    config = named_patterns(config, sites)
    covariance: dict[tuple[int, str], Tensor] = {}

    def watch(layer: nn.Module, part: str, input: str, at: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = unfolded(layer, (arguments[at] if at < len(arguments) else named[input]).detach().float())
            covariance[id(layer), part] = covariance.get((id(layer), part), torch.zeros(())) + x.t() @ x

        return hook

    packed = {"q": ("query", 0), "k": ("key", 1), "v": ("value", 2)}  # of torch's attention, which has three inputs
    inputs = {(id(s.layer), key_of(s)): (s.layer, *packed.get(key_of(s), ("input", 0))) for s in sites}
    hooks = [
        layer.register_forward_pre_hook(watch(layer, part, input, at), with_kwargs=True)
        for (_, part), (layer, input, at) in inputs.items()
    ]
    try:
        with torch.no_grad():
            for batch in range(batches):
                run(batch)
    finally:
        for h in hooks:
            h.remove()
    found = {}
    for s in sites:
        if (key := (id(s.layer), key_of(s))) not in covariance:
            raise ConfigError(
                f"Layer {s.name!r} was never called, so its inputs could not be measured: leave it out "
                f"(exclude={s.name!r}), or take another init."
            )
        _, vectors = torch.linalg.eigh(covariance[key])
        found[s.name] = vectors.flip(1)[:, : most or config.rank_of(s.name)].t().contiguous()
    return found


def key_of(site: Site) -> str:
    """Which input of its layer a site reads: the part of torch's attention, which has three; elsewhere there is one."""
    return site.part if isinstance(site.layer, nn.MultiheadAttention) else ""


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a layer as rows: (positions, i), or the patches that a convolution sees, (positions, i·k)."""
    if isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
        return x.reshape(-1, x.shape[-1])
    if not isinstance(layer, nn.Conv2d):
        if any(side > 1 for side in cast(Any, layer).kernel_size):
            raise ConfigError(
                f"Init 'eva' measures linear layers and Conv2d; {type(layer).__name__} needs another init."
            )
        return x.transpose(1, -1).flatten(0, -2)
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, cast(Any, layer.padding), layer.stride)
    groups = patches.view(len(x), layer.groups, -1, patches.shape[-1])
    return groups.transpose(2, 3).reshape(-1, groups.shape[2])
