"""Puts adapters on a model and takes them off again: nothing is renamed and the base comes back bit for bit.

handle = inject(unet, AdapterConfig(rank=8, targets="attn"))
optimizer = AdamW(handle.parameter_groups(1e-4))
handle.merge(); handle.unmerge(); handle.eject()
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from visionlora import plugins
from visionlora.errors import AdapterFileError, ConfigError, TargetError
from visionlora.lora.adapted import AdaptedLayer, modules_of_base
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.attention import AdaptedAttention, take_over
from visionlora.lora.classes import forward_of_its_own
from visionlora.lora.config import PLUGIN_GROUPS, AdapterConfig
from visionlora.lora.handle import Handle, InjectionReport, freeze
from visionlora.lora.in_full import InFull
from visionlora.lora.layers import adapt
from visionlora.lora.lean import Lean, make_lean, unlean
from visionlora.lora.merge import FUSIBLE, check_unfused, fuse_merged
from visionlora.lora.methods import KINDS, METHODS
from visionlora.lora.methods.base import Method, Site
from visionlora.lora.methods.tlora import check_timed, follow_timestep
from visionlora.lora.names import halves_of, resolve_names
from visionlora.lora.packed import Packed, packed_layers
from visionlora.lora.targets import (
    LAYERS,
    UNCALLED,
    check_ranks,
    ends_on_boundary,
    named_patterns,
    odd_layers,
    owners_of,
    resolve,
    site_at,
)

IN_PLACE = ("full", "shift")
"""Kinds that change a parameter of the base in place."""


def method_class(name: str) -> type[Method]:
    """The class of a method, ours or a plug-in's.

    Raises:
        ConfigError: when a plug-in's method cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    found = plugins.load(PLUGIN_GROUPS["method"], name)
    if found is None:
        raise ConfigError(f"Method {name!r} comes from a plug-in that cannot be imported; see `visionlora plugins`.")
    return cast("type[Method]", found)


@torch.inference_mode(False)
def inject(
    model: nn.Module, config: AdapterConfig, name: str = "default", seed: int = 0,
    start_from: Mapping[str, AdapterModule] | None = None,
) -> Handle:  # fmt: skip
    """Adds a new adapter to `model` and freezes everything else. The output of the model does not change by a bit.

    Checkpoints of a training loop (`state_dict`, accelerate's `save_state`, the Trainer of transformers) hold the adapter too,
    and are loaded once the same is injected again. `save_pretrained` is refused meanwhile; `Handle.save` writes the adapter.

    Args:
        model: any module; its base weights keep their names and identity.
        config: method, rank, targets.
        name: to tell adapters on one model apart.
        seed: of the random factor A, the same on every device.
        start_from: modules of a finished adapter by layer, to learn on from: their layers, ranks, scalings and values count
            instead of the config's (`visionlora.lora.further` makes one that agrees), and the output is the adapter's.

    Raises:
        TargetError: when the targets reach nothing, or a module does not fit (see `visionlora.lora.targets.resolve`).
        ConfigError: when `model` is no module, an adapter of that name is there, all is to train and weights are packed, or
            adapters are merged into what is to train in full.
            In all cases the model is left untouched.
    """
    check_module(model)
    check_name((m for m in model.modules() if isinstance(m, AdaptedLayer)), name)
    if config.method == "full" and packed_layers(model):
        raise ConfigError("Method 'full' trains every weight, but those of this model are packed in few bits.")
    handle = Handle(model, name, config)
    base = base_parameters(model)
    replaced = select_in_full(model, config, base)
    check_unmerged(model, replaced)
    methods: list[Method] = []
    skipped: tuple[tuple[str, str], ...] = ()
    if start_from is not None:
        methods = learning_on(model, config, start_from)
    elif config.method not in ("full", "linear-probe"):
        resolution = resolve(model, config)
        handle.config = config = named_patterns(config, resolution.sites)
        cls, generator = method_class(config.method), torch.Generator().manual_seed(seed)
        if cls.bounded_rank:
            check_ranks(config, resolution.sites)
        methods = [cls.new(site, config, generator) for site in resolution.sites]
        skipped = resolution.skipped
    with off_on_error(handle):
        _place(handle, methods, name)
        freeze(model, base, replaced)
        handle._freezes = True
        for n in base:
            if n in replaced:
                handle.in_full[n] = InFull(*owner_of(model, n))
        if methods:  # a model that trains in full, or its head alone, is one that may be saved
            handle.guard()
        if config.save_memory and methods:
            handle._lean = make_lean(model)
    handle.report = InjectionReport(
        tuple((m.site.name, m.site.target) for m in methods),
        skipped,
        sum(p.numel() for p in handle.parameters()),
        sum(p.numel() for p in base.values()) + sum(layer.numbers for layer in packed_layers(model)),
        {m.site.name: len(p) for m in methods if (p := getattr(m, "lora_A", None)) is not None},
        tuple(handle.in_full),
    )
    return handle


def learning_on(model: nn.Module, config: AdapterConfig, modules: Mapping[str, AdapterModule]) -> list[Method]:
    """The modules of a finished adapter as methods that train.

    Raises:
        TargetError: when one does not fit the model.
        ConfigError: when one is not of the configuration's method.
    """
    modules = cut_modules(model, modules)
    methods, replaced, skipped = fit(model, modules, "model")
    if skipped:
        raise misfits(model, "model", skipped, len(modules))
    strange = [path for path, _ in replaced] + [
        m.site.name for m in methods if type(m) is not METHODS.get(config.method)
    ]
    if strange:
        raise ConfigError(f"Method {config.method!r} cannot go on with {strange[0]}, which is of another kind.")
    for m in methods:
        m.learn_on(config)
    return methods


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hundreds of small modules are made at once; looking for garbage among a whole model's objects takes far longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_garbage_collection()
@torch.inference_mode(False)
def attach(
    model: nn.Module, adapter: Adapter, component: str = "", name: str = "default", allow_partial: bool = False
) -> Handle:
    """Adds a finished adapter's factors for one component to `model`, frozen.

    Layers are found under the names of the file, or in another spelling of theirs (`visionlora.lora.names`).

    Args:
        model: the base model.
        adapter: from a file or a handle.
        component: which of the adapter's parts; the only one when empty.
        name: to tell adapters on one model apart.
        allow_partial: leave out modules that do not fit; `handle.report.skipped` lists them with the reason.

    Raises:
        AdapterFileError: when two of its modules are for one layer.
        TargetError: when a module is missing in the model or has another shape; the model is left untouched.
        ConfigError: when an adapter of that name is there.
    """
    check_module(model)
    check_name((), name)
    if not component:
        if len(adapter.components) != 1:
            raise ConfigError(f"The adapter has parts for {', '.join(adapter.components)}: say which to attach.")
        (component,) = adapter.components
    handle, modules = Handle(model, name), cut_modules(model, adapter.component(component))
    methods, replaced, skipped = fit(model, modules, component)
    if skipped and (not allow_partial or len(skipped) == len(modules)):
        raise misfits(model, component, skipped, len(modules))
    with off_on_error(handle):
        _place(handle, methods, name)
        for path, m in replaced:
            handle.in_full[path] = InFull(*owner_of(model, path), m.tensors.get("value"), m.tensors.get("shift"))
        handle.guard()
    left_out = {path for path, _ in skipped}
    used = {path: m for path, m in modules.items() if path not in left_out}
    zero = tuple(path for path, m in used.items() if m.is_zero())
    odd = odd_layers(model, [m.site for m in methods]) if adapter.format == "peft" else {}
    placed = zip((path for path, m in used.items() if m.kind not in IN_PLACE), methods, strict=True)
    count = sum(t.numel() for m in used.values() for t in m.tensors.values())
    handle.report = InjectionReport(
        tuple((path, "file") for path in used),
        tuple(skipped),
        count,
        0,
        {path: m.rank for path, m in used.items() if m.rank},
        tuple(path for path, _ in replaced),
        zero,
        tuple(path for path, m in placed if odd.get(m.site.name) == UNCALLED and path not in zero),
    )
    return handle


def cut_modules(model: nn.Module, modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The modules of an adapter, those of layers that are two in this model (see `halves_of`) cut in two."""
    halves = {name: found for name in modules if (found := halves_of(name)) is not None}
    known = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()} if halves else set()
    there = resolve_names([*halves, *(n for found in halves.values() for n in found)], known)
    cut: dict[str, AdapterModule] = {}
    for name, m in modules.items():
        names = halves.get(name, ())
        if name not in there and names and all(n in there for n in names) and (parts := in_half(m)) is not None:
            cut |= dict(zip(names, parts, strict=True))
        else:
            cut[name] = m
    return cut


def trackable(module: AdapterModule) -> AdapterModule:
    """Itself, without tensors of `torch.inference_mode`, of which there are no parameters elsewhere."""
    if not any(t.is_inference() for t in module.tensors.values()):
        return module
    return replace(module, tensors={n: t.clone() if t.is_inference() else t for n, t in module.tensors.items()})


def in_half(module: AdapterModule) -> tuple[AdapterModule, AdapterModule] | None:
    """What a module does to the first and to the second half of its layer's outputs; None where that cannot be told."""
    outputs = (
        next(iter(module.tensors.values())).shape[0] if module.kind in IN_PLACE else (module.flat_shape() or (0,))[0]
    )
    if module.kind == "ia3" and not module.options.get("on_input"):
        outputs = len(module.tensors["vector"])
    first, second = (module.part(rows) for rows in (slice(outputs // 2), slice(outputs // 2, None)))
    return None if first is None or second is None else (first, second)


def fit(
    model: nn.Module, modules: Mapping[str, AdapterModule], component: str
) -> tuple[list[Method], list[tuple[str, AdapterModule]], list[tuple[str, str]]]:
    """Matches an adapter's modules with a model's layers, without touching the model.

    Returns:
        The methods to place; (name, module) of parameters that are changed in place; (name, reason) for what does not fit.

    Raises:
        AdapterFileError: for a kind of module that is unknown here, or two for one layer.
    """
    base = base_parameters(model) if any(m.kind in IN_PLACE for m in modules.values()) else {}
    known = {n: m for n, m in modules_of_base(model) if n}
    with_parts = (*LAYERS, nn.MultiheadAttention)  # whose parts are no modules
    strange = [
        n for n in modules
        if n not in known and n not in base and not isinstance(known.get(n.rpartition(".")[0]), with_parts)
    ]  # fmt: skip
    spelled = resolve_names(strange, [*known, *base]) if strange else {}
    methods, replaced, skipped = [], [], []
    seen: dict[str, str] = {}
    for given, m in modules.items():
        path = spelled.get(given, given)
        if (first := seen.setdefault(path, given)) != given:
            raise AdapterFileError(
                f"The adapter changes {component}.{path} twice, as {first} and as {given}. Merge the adapters that it came "
                "from again."
            )
        try:
            if m.kind in IN_PLACE:
                check_parameter(base, path, m, component, model)
                replaced.append((path, m))
                continue
            if m.kind not in KINDS:
                raise AdapterFileError(f"The adapter's layer {component}.{path} is of kind {m.kind!r}, unknown here.")
            site = site_at(model, path)
            if why := forward_of_its_own(site.layer):
                raise TargetError(f"{site.name} {why}.")
            shaped = m.fitted(site.weight.shape)
            check_shape(site, shaped, f"{component}.{given}")
            methods.append(KINDS[m.kind].load(site, trackable(shaped)))
        except TargetError as e:
            skipped.append((given, str(e)))
    return methods, replaced, skipped


def misfits(model: nn.Module, component: str, skipped: Sequence[tuple[str, str]], total: int) -> TargetError:
    """What an adapter gets that does not fit a model, or not all of it."""
    check_bare(model)
    path, why = skipped[0]
    kind = type(model).__name__
    if why.startswith(f"{kind} has no layer"):
        why = f"The adapter has a layer {component}.{path}, which {kind} has not. {why.partition('. ')[2]}".rstrip()
    if len(skipped) > 1:
        more = ", ".join(n for n, _ in skipped[1:4]) + (" …" if len(skipped) > 4 else "")
        why += f" So it is with {len(skipped)} of its {total} modules ({more})."
    hint = "" if len(skipped) == total else " Nothing was loaded; allow_partial=True (--allow-partial) takes what fits."
    there = dict(model.named_modules())
    if not all(name in there and forward_of_its_own(there[name]) for name, _ in skipped):
        why += " It was made for another base model."
    return TargetError(f"{why}{hint}")


def check_bare(model: nn.Module) -> None:
    """Raises TargetError when PEFT has put its own adapters around the layers of a model."""
    if any(n.endswith(".base_layer") for n, _ in model.named_modules()):
        raise TargetError(
            f"PEFT adapters are loaded on this {type(model).__name__}, whose layers have other names while they are: call "
            "pipe.unload_lora_weights() first, and attach their file here beside this one if both are wanted."
        )


@contextmanager
def off_on_error(handle: Handle) -> Iterator[None]:
    """Takes an adapter off again when putting it on breaks off, by Ctrl-C too."""
    try:
        yield
    except BaseException:
        handle.eject()
        raise


def attentions_of(model: nn.Module, methods: Sequence[Method]) -> Iterator[nn.Module]:
    """The modules of diffusers that could fuse the projections on which these methods are."""
    for m in methods:
        owner, _, layer = m.site.name.rpartition(".")
        if layer in FUSIBLE and hasattr(found := model.get_submodule(owner), "fused_projections"):
            yield found


def _place(handle: Handle, methods: Sequence[Method], name: str) -> None:
    """Puts methods on their layers; what is to be taken off when that breaks off is in the handle from the start."""
    check_name((m.site.layer for m in methods), name)
    attentions = tuple(attentions_of(handle.model, methods))
    check_unfused(attentions, name)
    timed = any(m.timed for m in methods)
    if timed:
        check_timed(handle.model)
    owners = owners_of(handle.model, [m.site for m in methods])
    handle.methods, handle._owners = {m.site.name: m for m in methods}, owners
    handle._attentions, handle.timed = attentions, timed
    handle.packed = any(isinstance(m.site.layer, Packed) for m in methods)
    for attention in attentions:
        vars(attention).setdefault("fuse_projections", partial(fuse_merged, attention))
    for m in methods:
        m.adapter_name = name
        if isinstance(m.site.layer, Lean):
            unlean(m.site.layer)
    for m in methods:
        adapt(m.site.layer, m, AdaptedAttention if isinstance(m.site.layer, nn.MultiheadAttention) else None)
    for owner, children in owners:
        take_over(owner, children)
    if timed:
        handle._hook = handle.model.register_forward_pre_hook(follow_timestep, with_kwargs=True)


def check_targets(model: nn.Module, config: AdapterConfig) -> None:
    """Raises what `inject` would raise for the targets and ranks, without touching the model."""
    select_in_full(model, config, base_parameters(model))
    if config.method not in ("full", "linear-probe"):
        sites = resolve(model, config).sites
        config = named_patterns(config, sites)
        if method_class(config.method).timed:
            check_timed(model)
        if method_class(config.method).bounded_rank:
            check_ranks(config, sites)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base, by name, without any adapter's."""
    adapters = {id(p) for m in model.modules() if isinstance(m, AdaptedLayer) for p in m.adapters.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in adapters}


def select_in_full(model: nn.Module, config: AdapterConfig, base: Iterable[str]) -> set[str]:
    """The parameters that train in full.

    Raises:
        TargetError: when a name in `train` reaches none.
    """
    if config.method == "full":
        return set(base)
    found = set()
    for word in config.train_list:
        paths = [n for n, _ in model.named_modules() if n and ends_on_boundary(n, word)]
        reached = {p for p in base if p == word or any(p.startswith(path + ".") for path in paths)}
        if not reached:
            from visionlora.errors import nearest

            names = {n.split(".", 1)[0] for n in base} | {n.rpartition(".")[0] for n in base}
            raise TargetError(
                f"train names {word!r}, which is no module of {type(model).__name__}. {nearest(word, names)}"
            )
        found |= reached
    return found


def check_unmerged(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ConfigError for parameters that are to train, into which adapters are merged."""
    for path in names:
        owner, name = owner_of(model, path)
        if name in vars(owner).get("originals", {}):
            raise ConfigError(
                f"{path} is to train in full, but adapters are merged into it, and what it learns would be gone with them: "
                "take them out first (mix.detach(), handle.unmerge()), or run them beside the weights (mode='stacked')."
            )


def check_shape(site: Site, module: AdapterModule, name: str) -> None:
    """Raises TargetError when an adapter's module does not fit the base weight."""
    wanted = tuple(site.weight.shape)
    given = module.shape()
    if given is None and (flat := module.flat_shape()) is not None:
        given = wanted if flat == (wanted[0], math.prod(wanted[1:])) else flat
    if given is None and module.kind == "oft":
        blocks = module.tensors["oft_blocks"].shape
        given = (blocks[-3] * blocks[-1], *wanted[1:])
    if given is None and module.kind == "vera":
        given = (len(module.tensors["lambda_b"]), *wanted[1:])
    if given is None and module.kind == "ia3":
        width = site.inputs if module.options.get("on_input") else wanted[0]
        given = wanted if module.tensors["vector"].numel() == width else (module.tensors["vector"].numel(),)
    if wanted != given:
        raise TargetError(f"The adapter's ΔW for {name} has shape {given}, the base weight {wanted}.")


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def check_parameter(
    base: Mapping[str, nn.Parameter], path: str, module: AdapterModule, component: str, model: nn.Module
) -> None:
    """Raises TargetError when no base parameter has the name and shape of a module of kind `full` or `shift`."""
    (value,) = module.tensors.values()
    if path not in base:
        raise TargetError(f"The adapter changes {component}.{path}, which {type(model).__name__} has not.")
    if base[path].shape != value.shape:
        raise TargetError(
            f"The adapter's {component}.{path} has shape {tuple(value.shape)}, the base's {tuple(base[path].shape)}."
        )


def check_module(model: object) -> None:
    """Raises ConfigError for what is no module, such as a whole pipeline."""
    if isinstance(model, nn.Module):
        return
    parts = [n for n in ("unet", "text_encoder", "text_encoder_2") if isinstance(getattr(model, n, None), nn.Module)]
    hint = f"give one of its parts, such as .{parts[0]} of it" if parts else "give a torch.nn.Module"
    raise ConfigError(f"A {type(model).__name__} is no module that an adapter can go on: {hint}.")


def check_name(layers: Iterable[nn.Module], name: str) -> None:
    """Raises ConfigError when `name` cannot name an adapter, or one of these layers already carries one of it."""
    if not name or "." in name or ":" in name or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: use a word without dots and colons that is no method of a module."
        )
    on_part = f"{name}:"
    for layer in layers:
        if isinstance(layer, AdaptedLayer) and (
            name in layer.adapters or any(key.startswith(on_part) for key in layer.adapters)
        ):
            taken = {m.adapter_name for m in layer.methods()}
            raise ConfigError(
                f"An adapter named {name!r} is on this model already (there: {', '.join(sorted(taken))}). "
                "Eject it first or choose another name."
            )


def inner_names(names: Iterable[str]) -> dict[str, str]:
    """By name: what an adapter is called on layers, where not every word can be."""
    found: dict[str, str] = {}
    for name in names:
        inner = re.sub(r"[.:]", "_", name) or "_"
        while hasattr(nn.ModuleDict, inner) or inner in found.values():
            inner += "_"
        found[name] = inner
    return found
