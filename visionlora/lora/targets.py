"""From roles to sites: which layers of a model, and which parts of fused layers, an adapter reaches.

A target is one of: a role (``attn.q``), a group of roles (``attn``, ``all``), ``auto``, a preset of a plug-in, the exact
name of a module or of a part of a fused layer (``blocks.0.attn.qkv.q``), the end of a name on a dot boundary (``to_q``
hits ``mid_block.attn1.to_q`` but not ``goto_q``), or ``re:`` and a regular expression for the whole name.

In a model without attention ``all`` is every linear layer and convolution, whether it has a role or not, but for patch
embeddings, what trains in full (the head) and what is too small for the rank. ``auto`` is ``attn.qv``, there ``all``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from visionlora import plugins
from visionlora.errors import TargetError, nearest
from visionlora.lora.classes import forward_of_its_own
from visionlora.lora.config import AdapterConfig
from visionlora.lora.families import (
    GROUPS,
    MINGLED,
    ROLES,
    fused_names,
    lookup,
    mingled,
    patch_embeddings,
    role_names,
    weight_users,
)
from visionlora.lora.methods.base import Site

V = TypeVar("V")

EVERYTHING = ("all", "auto")
"""Groups that take every layer of a model without attention."""
UNBOUNDED = ("vera", "ia3")
"""Methods for which no layer is too small."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
UNCALLED = "its parent uses its weight instead of calling it"
PACKED = "it is a part of torch's packed attention"
OUT_PROJECTION = "out_proj"
"""The child of nn.MultiheadAttention that projects its output; its weight is used, it is never called."""
ENCODER_LINEARS = ("linear1", "linear2")
"""The children of nn.TransformerEncoderLayer whose weights its fast path reads."""


@dataclass(frozen=True)
class Resolution:
    """What the targets reached and what they reached in vain."""

    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]
    """Pairs of module name and the reason why it is not adapted."""


def ends_on_boundary(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or its end after a dot."""
    return name == suffix or name.endswith("." + suffix)


def attention_parts(name: str, module: nn.MultiheadAttention) -> Iterator[Site]:
    """q, k and v of torch's own attention, in one packed weight or in three."""
    width = module.embed_dim
    for k, part in enumerate(("q", "k", "v")):
        role = f"attn.{part}"
        if cast("Tensor | None", module.in_proj_weight) is None:
            yield Site(f"{name}.{part}", module, part, None, f"{part}_proj_weight", f"_{part}_bias", role=role)
        else:
            rows = slice(k * width, (k + 1) * width)
            yield Site(f"{name}.{part}", module, part, rows, "in_proj_weight", "in_proj_bias", role=role)


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Every place for an adapter, in the model's order: a fused layer as a whole, then its parts."""
    out_projections, owners = set(), set()
    for name, module in model.named_modules():
        if is_mingled(module):
            owners.add(name)
        if isinstance(module, nn.MultiheadAttention):
            yield from attention_parts(name, module)
            out_projections.add(f"{name}.{OUT_PROJECTION}" if name else OUT_PROJECTION)
        elif isinstance(module, LAYERS):
            if name.rpartition(".")[0] in owners and lookup(name, fused_names()) is not None:
                yield Site(name, module, role=MINGLED)
            else:
                yield from layer_sites(name, module, name in out_projections)


def is_mingled(module: nn.Module) -> bool:
    """Whether the fused layers of this module have no parts."""
    cls = type(module)
    attribute = mingled().get(f"{cls.__module__}.{cls.__qualname__}")
    return attribute is not None and (not attribute or bool(getattr(module, attribute, False)))


def layer_sites(name: str, module: nn.Module, out_projection: bool = False) -> Iterator[Site]:
    """A layer, and its parts when it is a fused one."""
    fused = lookup(name, fused_names())
    key = lookup(name, role_names())
    role = "attn.out" if out_projection else None if key is None or fused is not None else role_names()[key]
    yield Site(name, module, role=role)
    if fused is not None and isinstance(module, nn.Linear):
        parts = fused_names()[fused]
        width, rest = divmod(module.out_features, len(parts))
        if not rest:
            for k, part in enumerate(parts):
                yield Site(f"{name}.{part}", module, part, slice(k * width, (k + 1) * width), role=f"attn.{part}")


def site_at(model: nn.Module, name: str) -> Site:
    """The site of this name.

    Raises:
        TargetError: when the model has none.
    """
    parent, _, part = name.rpartition(".")
    modules = dict(model.named_modules()) if not hasattr(model, "get_submodule") else None
    for path in (name, parent):
        try:
            module = model.get_submodule(path) if modules is None else modules[path]
        except (AttributeError, KeyError):
            continue
        if path == name and isinstance(module, LAYERS):
            return Site(name, module)
        if path == parent and isinstance(module, nn.MultiheadAttention):
            found = [s for s in attention_parts(parent, module) if s.part == part]
        elif path == parent and isinstance(module, LAYERS):
            found = [s for s in layer_sites(parent, module) if s.part == part and part]
        else:
            continue
        if found:
            return found[0]
    names = [s.name for s in sites_of(model)]
    hint = nearest(name, names, most=5) if len(names) < 1000 else ""
    raise TargetError(f"{type(model).__name__} has no layer {name!r}. {hint}".rstrip())


def presets() -> dict[str, tuple[str, ...]]:
    """Target presets of plug-ins."""
    return {name: tuple(value) for name, value in plugins.load_all("visionlora.targets").items()}


def has_attention(roles: Collection[str | None]) -> bool:
    """Whether a model with these roles has queries and values that an adapter can reach."""
    return not {"attn.q", "attn.v", MINGLED}.isdisjoint(roles)


def suited_targets(model: nn.Module) -> str:
    """What `auto` is for this model: `attn.qv`, or `all` where it has no attention."""
    return "attn.qv" if has_attention({site.role for site in sites_of(model)}) else "all"


def matcher(target: str, roles: Collection[str | None] = ROLES) -> Callable[[Site], bool]:
    """Whether a site is reached by this target.

    Args:
        target: see the module.
        roles: that the model has: `proj` and `conv` are also what layers are called, in models that have none of the role.

    Raises:
        TargetError: for an expression that is not valid.
    """
    if target.startswith("re:"):
        try:
            expression = re.compile(target[3:])
        except re.error as e:
            raise TargetError(f"Target {target!r} is not a valid regular expression: {e}.") from None
        return lambda site: expression.fullmatch(site.name) is not None
    if target in EVERYTHING and not has_attention(roles):
        return lambda site: True
    if target in GROUPS:
        group = GROUPS[target]
        return lambda site: site.role in group
    if target in ROLES and target in roles:
        return lambda site: site.role == target
    if target not in plugins.names("visionlora.targets"):
        return lambda site: (
            ends_on_boundary(site.name, target)
            or (
                isinstance(site.layer, nn.MultiheadAttention) and ends_on_boundary(site.name.rpartition(".")[0], target)
            )
        )
    tests = [matcher(t, roles) for t in presets().get(target, ())]
    return lambda site: any(test(site) for test in tests)


def known_words(model: nn.Module) -> set[str]:
    """Every role and every last part of a module name: what a mistyped target may have meant."""
    last = {site.name.rsplit(".", 1)[-1] for site in sites_of(model)}
    last |= {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    return set(ROLES) | set(GROUPS) | set(plugins.names("visionlora.targets")) | {n for n in last if not n.isdigit()}


def resolve(model: nn.Module, config: AdapterConfig) -> Resolution:
    """The sites of `model` that the targets reach, in the model's own order whatever the order of the targets.

    Raises:
        TargetError: when one of the targets reaches nothing, is not a valid expression, reaches only modules that
            cannot be adapted, reaches a patch embedding that is not named in full, or names a part of a layer without parts.
    """
    sites = list(sites_of(model))
    roles = {site.role for site in sites}
    tests = {target: matcher(target, roles) for target in config.target_list}
    excluded = {target: matcher(target, roles) for target in config.exclude_list}
    reached: set[str] = set()
    used = {target for target, test in excluded.items() if any(test(site) for site in sites)}
    hits: list[Site] = []
    skipped: list[tuple[str, str]] = []
    whole: set[int] = set()
    for site in sites:
        if not (found := [t for t, test in tests.items() if test(site)]):
            continue
        reached.update(found)
        if out := [t for t, test in excluded.items() if test(site)]:
            skipped.append((site.name, f"excluded by {out[0]!r}"))
        elif trains_in_full(site, config):
            skipped.append((site.name, "it trains in full"))
        elif site.name not in found and any(ends_on_boundary(site.name, p) for p in patch_embeddings()):
            if found[0] in ROLES or found[0] in GROUPS:
                continue
            raise TargetError(
                f"Target {found[0]!r} reaches the patch embedding {site.name!r}, which adapters leave alone unless it is named "
                f"in full, as its output feeds every layer. Use a role such as `attn`, or {site.name} where you mean it."
            )
        elif why := forward_of_its_own(site.layer):
            skipped.append((site.name, f"it {why}"))
        elif found[0] in EVERYTHING and not has_attention(roles) and (why := not_for_all(site, config)):
            skipped.append((site.name, why))
        elif site.part and id(site.layer) in whole:
            skipped.append((site.name, "its whole layer is adapted"))
        else:
            if not site.part:
                whole.add(id(site.layer))
            hits.append(replace(site, target=found[0]))
    skipped += unfit(model, config, reached)
    check_reached(model, config, reached, used, hits, skipped)
    return Resolution(tuple(hits), tuple(skipped))


def trains_in_full(site: Site, config: AdapterConfig) -> bool:
    """Whether a layer, such as a classifier's new head, is kept whole beside the adapter, which could but repeat it."""
    return any(f".{word}." in f".{site.name}." for word in config.train_list)


def not_for_all(site: Site, config: AdapterConfig) -> str:
    """Why `all` leaves out a layer of a model without attention; empty where it does not."""
    if config.method not in UNBOUNDED and config.rank_of(site.name) > smaller_side(site):
        return f"its smaller side, {smaller_side(site)}, is below the rank"
    return ""


def smaller_side(site: Site) -> int:
    """The largest rank that a change of this weight can have."""
    return min(site.weight.shape[0], site.weight[0].numel())


def unfit(model: nn.Module, config: AdapterConfig, reached: set[str]) -> list[tuple[str, str]]:
    """Modules that a name reaches but that no adapter fits."""
    found = []
    for name, module in model.named_modules():
        if name and not isinstance(module, (*LAYERS, nn.MultiheadAttention)):
            for target in config.target_list:
                if target in ROLES or target in GROUPS:
                    continue
                if matcher(target)(Site(name, module)):
                    reached.add(target)
                    found.append((name, f"{type(module).__name__} is neither linear nor a convolution"))
    return found


def check_reached(
    model: nn.Module, config: AdapterConfig, reached: set[str], used: set[str], hits: list[Site],
    skipped: list[tuple[str, str]],
) -> None:  # fmt: skip
    """Raises TargetError for targets that reach nothing."""
    for target in (*config.target_list, *config.exclude_list):
        if target in reached or target in used:
            continue
        layer, _, part = target.rpartition(".")
        if part in ("q", "k", "v") and layer not in ("", "attn"):
            same = [s for s in sites_of(model) if ends_on_boundary(s.name, layer)]
            if same:
                kind = type(same[0].layer).__name__
                raise TargetError(
                    f"Target {target!r} asks for the part {part!r} of {same[0].name!r}, which is a {kind} without "
                    f"parts: name the layer itself, {layer!r}, or use a role such as `attn.{part}`."
                )
        roles = [role for role in ROLES if any(s.role == role for s in sites_of(model))]
        if target in ROLES or target in GROUPS:
            last = list(dict.fromkeys(s.name.rpartition(".")[2] for s in sites_of(model)))
            there = (
                f"It has {', '.join(roles)}: take some of these, or `all`."
                if roles
                else f"Take `all`, each layer that can carry an adapter, or names of layers, such as {', '.join(last[:8])}."
                if last
                else "Adapters are for linear layers and convolutions, and it has neither."
            )
            raise TargetError(f"{type(model).__name__} has no layer of role {target!r}. {there}")
        what = "Target" if target in config.target_list else "Exclusion"
        raise TargetError(
            f"{what} {target!r} reaches no layer of {type(model).__name__}. {nearest(target, known_words(model) - {target})}"
        )
    if not hits:
        raise TargetError(
            f"Targets {', '.join(config.target_list)} reach no layer that can be adapted: "
            + "; ".join(f"{name} ({why})" for name, why in skipped[:5])
        )


def named_patterns(config: AdapterConfig, hits: Sequence[Site]) -> AdapterConfig:
    """The configuration with ranks and alphas by the names of sites instead of by target words.

    Raises:
        TargetError: when a word reaches none of them.
    """
    ranks, alphas = (
        by_name("rank_pattern", config.rank_pattern, hits),
        by_name("alpha_pattern", config.alpha_pattern, hits),
    )
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def by_name(setting: str, pattern: Mapping[str, V], hits: Sequence[Site]) -> dict[str, V]:
    """One pattern: the site's own name counts before all words, and of these the first that reaches it."""
    names, roles = {s.name for s in hits}, {s.role for s in hits}
    found = {name: value for name, value in pattern.items() if name in names}
    for word in [w for w in pattern if w not in names]:
        test = matcher(word, roles)
        reached = [s.name for s in hits if test(s)]
        if not reached:
            hint = nearest(word, {*ROLES, *GROUPS, *names} - {word})
            raise TargetError(f"{setting} names {word!r}, which is none of the adapted layers. {hint}")
        found = dict.fromkeys(reached, pattern[word]) | found
    return found


def check_ranks(config: AdapterConfig, hits: Sequence[Site]) -> None:
    """Raises TargetError for a rank that a layer has no room for."""
    for site in hits:
        rank, smaller = config.rank_of(site.name), smaller_side(site)
        if rank > smaller:
            raise TargetError(
                f"Rank {rank} is larger than layer {site.name!r} ({smaller} at its smaller side): "
                f"choose a rank of at most {smaller} or leave this layer out of the targets."
            )


@lru_cache
def weight_children(cls: Any) -> tuple[str, ...]:
    """The children whose weights modules of this class use instead of calling them."""
    if issubclass(cls, nn.MultiheadAttention):
        return (OUT_PROJECTION,)
    if issubclass(cls, nn.TransformerEncoderLayer):
        return ENCODER_LINEARS
    users = weight_users()
    return next((users[n] for c in cls.__mro__ if (n := f"{c.__module__}.{c.__qualname__}") in users), ())


def owners_of(model: nn.Module, sites: Iterable[Site]) -> tuple[tuple[nn.Module, tuple[str, ...]], ...]:
    """The modules that use the weights of these layers instead of calling them, and the names of the children; after the layers
    of an `nn.TransformerEncoder` itself, which looks at the weights of the first.

    Only the parents of the layers are looked at, so that the time does not grow with the model or its adapters.
    """
    parents: dict[str, nn.Module] = {}
    found: dict[int, tuple[nn.Module, tuple[str, ...]]] = {}
    for site in sites:
        path = site.name[: -len(site.part) - 1] if site.part else site.name
        parent, _, child = path.rpartition(".")
        if parent not in parents:
            parents[parent] = model.get_submodule(parent)
        owner = parents[parent]
        children = weight_children(cast(Any, type(owner)))
        if child in children:
            found[id(owner)] = (owner, children)
        if isinstance(owner, nn.MultiheadAttention):
            parent = parent.rpartition(".")[0]
            owner = model.get_submodule(parent)
        if isinstance(owner, nn.TransformerEncoderLayer):
            encoder = model.get_submodule(parent.rpartition(".")[0].rpartition(".")[0])
            if isinstance(encoder, nn.TransformerEncoder):
                found[id(encoder)] = (encoder, ())
    return tuple(found.values())


def odd_layers(model: nn.Module, sites: Iterable[Site]) -> dict[str, str]:
    """The sites where adapters of other tools do something else or nothing, and why, by name.

    PEFT wraps a layer, which does nothing where its parent uses its weight alone, and runs convolutions in the plain way.
    """
    sites = list(sites)
    used = {id(getattr(owner, child, None)) for owner, children in owners_of(model, sites) for child in children}
    found = {}
    for site in sites:
        layer: Any = site.layer
        if isinstance(layer, nn.MultiheadAttention):
            found[site.name] = PACKED
        elif id(layer) in used:
            found[site.name] = UNCALLED
        elif isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
            found[site.name] = "it is a convolution in groups"
        elif isinstance(layer, CONVOLUTIONS) and (max(layer.dilation) > 1 or layer.padding_mode != "zeros"):
            found[site.name] = "it is a convolution that is dilated or pads with other values than zero"
    return found
