"""Writes adapters into the base weights and takes them out bit for bit: from untouched originals, never by subtraction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, ModelError
from visionlora.lora.adapted import AdaptedLayer, modules_of_base
from visionlora.lora.classes import is_hooked
from visionlora.lora.damage import is_finite
from visionlora.lora.layers import with_adapters
from visionlora.lora.methods.base import Method, mark
from visionlora.lora.packed import Packed
from visionlora.lora.together import stacked_update

if TYPE_CHECKING:
    from visionlora.lora.handle import Handle
    from visionlora.lora.in_full import Changed


LARGEST = 1e30
"""A change of a weight below this cannot make an fp32 weight infinite."""
FUSIBLE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Layers whose weights `fuse_qkv_projections` of diffusers copies into one."""


@torch.no_grad()
def write_weights(handles: Sequence[Handle], silent: Collection[Method] = ()) -> None:
    """Writes the weights of every layer of these adapters, from the untouched originals and all that is merged there.

    Args:
        handles: whose layers are meant.
        silent: those of their parts that change nothing and have not before, so that nothing is to be written for them.

    Raises:
        ConfigError: when a weight would not be finite, is packed in few bits or is in others' hands, before any is changed.
        ModelError: when one is not finite without the adapters.
    """
    for handle in handles:
        check_unhooked(handle)
        check_unfused(handle._attentions, handle.name)
        if not handle._untied:
            check_untied(handle)
    for m in silent:
        check_mergeable(cast(AdaptedLayer, m.site.layer), [m], m.adapter_name, m.site.name)
    names = {id(m.site.layer): (h.name, m.site) for h in handles for m in h.methods.values() if m not in silent}
    new: list[tuple[AdaptedLayer, dict[str, Tensor]]] = []
    direct: list[tuple[AdaptedLayer, str, Tensor, Tensor]] = []
    with kept_unless_error() as keep:
        for adapter, site in names.values():
            layer = cast(AdaptedLayer, site.layer)
            merged = [m for m in layer.methods() if m.merged]
            check_mergeable(layer, merged, adapter, site.name)
            if layer._written is not None and layer._written[0] == state_of(layer, merged)[0]:
                continue
            if (update := direct_update(layer, merged)) is not None:
                direct.append((layer, *update))
                continue
            for m in merged:
                if m.scale != 0 and not m.additive:
                    keep(layer, m.site.weight_name)
            values = with_adapters(layer, merged)
            if not all(map(is_finite, values.values())):
                raise not_finite(adapter, site.name, layer, values)
            new.append((layer, values))
    for layer, name, down, up in direct:
        restore_all_but(layer, (name,))
        original = keep_original(layer, name)
        layer._written = None
        weight: Tensor = getattr(layer, name)
        with writing(weight):
            torch.addmm(original.flatten(1), up, down, out=weight.flatten(1))
        remember(layer)
    for layer, values in new:
        write(layer, values)


def check_mergeable(layer: AdaptedLayer, merged: Sequence[Method], adapter: str, path: str) -> None:
    """Raises ConfigError for what cannot be in weights, or not in those of this layer.

    Nor where a parameter trains in full into which an adapter is merged that does not train with it.
    """
    if any(m.timed for m in merged):
        raise ConfigError(
            f"Adapter {adapter!r} follows the timestep (T-LoRA), so it cannot be merged: attach it, or draw "
            "with it through `visionlora generate --lora`."
        )
    if merged and isinstance(layer, Packed):
        raise ConfigError(
            f"The weight of {path!r} is packed in {layer.code.bits} bits, into which nothing can be merged exactly. "
            "Open the base anew in full precision, put the adapter on it and merge there."
        )
    changed: dict[str, Changed] = vars(layer).get("_changed", {})
    for m in merged if changed else ():
        for name in (m.site.weight_name,) if m.additive else (m.site.weight_name, m.site.bias_name):
            parts = changed[name].parts if name in changed and not m.trainable else ()
            if any(part.in_place and part.parameter.requires_grad for part in parts):
                raise ConfigError(
                    f"The {name} of {path!r} trains in full, and what it learns while adapter {adapter!r} is merged into it "
                    "would be gone with that: run the adapter beside the weights (mode='stacked'), or take off what trains."
                )


@torch.no_grad()
def merge_anew(layer: AdaptedLayer) -> None:
    """Writes the weights of one layer again, after an original has changed."""
    write(layer, with_adapters(layer, [m for m in layer.methods() if m.merged]))


def writing(tensor: Tensor) -> AbstractContextManager[object]:
    """In which a tensor can be written; one that was made under `torch.inference_mode` can nowhere else."""
    return torch.inference_mode() if tensor.is_inference() else nullcontext()


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Puts other values into a tensor."""
    with writing(tensor):
        tensor.copy_(value)


def write(layer: AdaptedLayer, values: Mapping[str, Tensor]) -> None:
    """Writes these parameters of a layer; the others are the originals."""
    layer._written = None
    restore_all_but(layer, values)
    for name, value in values.items():
        keep_original(layer, name)
        overwrite(getattr(layer, name), value)
    remember(layer)


def state_of(layer: AdaptedLayer, merged: Sequence[Method]) -> tuple[list[Any], list[Tensor]]:
    """What changes whenever the weights of a layer are to be written again, and the tensors that are meant there."""
    acting = [m for m in merged if m.scale != 0]
    own = [getattr(layer, name) for name in layer.originals] + list(layer.originals.values())
    state = [*map(mark, own), *(m.state() for m in acting)]
    return state, own + [t for m in acting for t in (*m.parameters(), *m.buffers())]


def remember(layer: AdaptedLayer) -> None:
    """Takes note of what the weights of a layer have just been written from.

    Not where something merged may train: writes through `.data`, which much training code does, leave no trace.
    """
    merged = [m for m in layer.methods() if m.merged]
    layer._written = None if any(m.trainable for m in merged) else state_of(layer, merged)


def direct_update(layer: AdaptedLayer, merged: Sequence[Method]) -> tuple[str, Tensor, Tensor] | None:
    """The weight's name and the factors of all that is merged there, where the sum can be written straight into the weight.

    That saves most of the memory traffic of a change of scales. It is so for additive methods on one fp32 weight whose
    result cannot overflow: |ΔW| is at most the largest row norm of B times the largest column norm of A.
    """
    methods = [m for m in merged if m.scale != 0]
    if not methods or not all(m.additive for m in methods) or len({m.site.weight_name for m in methods}) > 1:
        return None
    name = methods[0].site.weight_name
    weight: Tensor = getattr(layer, name)
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    down, up = stacked_update(methods, len(weight), torch.float32)
    bound = float(down.norm(dim=0).max()) * float(up.norm(dim=1).max())
    if not bound < LARGEST or (name not in layer.originals and not bool(torch.isfinite(weight.sum()))):
        return None
    return name, down, up


def restore_all_but(layer: AdaptedLayer, names: Container[str]) -> None:
    """Puts back the parameters that no merged adapter changes any more."""
    for name in [n for n in layer.originals if n not in names]:
        overwrite(getattr(layer, name), layer.originals[name])
        del layer.originals[name]


def keep_original(layer: AdaptedLayer, name: str) -> Tensor:
    """The untouched parameter, kept when it is not yet."""
    if name not in layer.originals:
        layer.originals[name] = cast(Tensor, getattr(layer, name)).detach().clone()
    return layer.originals[name]


@contextmanager
def kept_unless_error() -> Iterator[Callable[[AdaptedLayer, str], None]]:
    """For keeping the originals of weights that methods read, before anything is written.

    The last bits of a product depend on where its operands lie in memory: weights that are mapped from a file lie elsewhere
    than their copies, and the first merge would differ from all later ones.
    """
    fresh: list[tuple[AdaptedLayer, str]] = []

    def keep(layer: AdaptedLayer, name: str) -> None:
        if name not in layer.originals:
            fresh.append((layer, name))
            keep_original(layer, name)

    try:
        yield keep
    except BaseException:
        for layer, name in fresh:
            layer.originals.pop(name, None)
        raise


def not_finite(adapter: str, name: str, layer: AdaptedLayer, parameters: Iterable[str]) -> ConfigError | ModelError:
    """What a merge that would spoil the base says, or one into a base that is spoiled.

    Args:
        adapter: that was to be merged.
        name: of the site.
        layer: of the base.
        parameters: of the layer that it changes.
    """
    if not all(is_finite(layer.originals.get(n, getattr(layer, n))) for n in parameters):
        return ModelError(
            f"The base itself holds NaN or infinite values in {name!r}, so nothing can be merged there; nothing was changed. "
            "Copy or download it again, or take another."
        )
    return ConfigError(
        f"Merging adapter {adapter!r} gives NaN or infinite weights in {name!r}; nothing was changed. Its training "
        "diverged, or its scale is too large."
    )


def merge_together(handles: Sequence[Handle], scales: Sequence[float] | None = None) -> None:
    """Merges several adapters of one model, at new scales, writing each weight once.

    Args:
        handles: on the same model.
        scales: one each; as they are when not given.

    Raises:
        ConfigError: when a scale or a weight would not be finite, or a weight is another layer's too; nothing is changed then.
    """
    for handle, scale in zip(handles, scales or [1.0] * len(handles), strict=True):
        check_scale(handle.name, scale)
    methods = [m for handle in handles for m in handle.methods.values()]
    with as_before_on_error(methods):
        silent = set()
        for number, handle in enumerate(handles):
            for m in handle.methods.values():
                if scales is not None:
                    m.scale = scales[number]
                if not m.merged:
                    m.merged = True
                    if m.scale == 0:
                        silent.add(m)
        write_weights(handles, silent)


def unmerge_together(handles: Sequence[Handle]) -> None:
    """Takes several adapters of one model out again, bit for bit, writing each weight once.

    Raises:
        ConfigError: see `Handle.unmerge`; nothing is changed then.
    """
    methods = [m for handle in handles for m in handle.methods.values()]
    with as_before_on_error(methods):
        for m in methods:
            if m.merged:
                m.merged = False
        write_weights(handles)


def check_scale(adapter: str, scale: float) -> None:
    """Raises ConfigError for a scale that is not finite in fp32."""
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ConfigError(f"The scale of adapter {adapter!r} is {scale!r}; it must be a finite number.")


@contextmanager
def as_before_on_error(methods: Sequence[Method]) -> Iterator[None]:
    """Puts back scales, what counts as merged and the weights, when these cannot be written, or not to the end."""
    before = [(m, m.scale, m.merged) for m in methods]
    try:
        yield
    except BaseException as e:
        for m, scale, merged in before:
            m.scale, m.merged = scale, merged
        if not isinstance(e, ConfigError):  # which says that nothing was written
            for layer in {id(m.site.layer): cast(AdaptedLayer, m.site.layer) for m in methods}.values():
                merge_anew(layer)
        raise


def check_unhooked(handle: Handle) -> None:
    """Raises ConfigError where others have put a `forward` on an adapted layer, which knows the layer as it is now."""
    for m in handle.methods.values():
        if is_hooked(m.site.layer):
            raise ConfigError(
                f"The layer {m.site.name!r} of adapter {handle.name!r} has had a forward put on it since, as by offloading of "
                "layers, so the adapter can be neither changed nor taken off: remove the hooks first "
                "(accelerate.hooks.remove_hook_from_submodules(model), or pipe.remove_all_hooks()), or offload whole models."
            )


def reads_fused(attention: nn.Module) -> bool:
    """Whether attention of diffusers reads its projections' weights in one copy.

    That of UNets keeps its flag when its projections are apart again; there the processor says which weights it reads.
    """
    if not getattr(attention, "fused_projections", False):
        return False
    of_unets = type(attention).__module__ == "diffusers.models.attention_processor"
    return not of_unets or "Fused" in type(cast(Any, attention).processor).__name__


def fuse_merged(attention: nn.Module, fuse: bool = True) -> None:
    """`fuse_projections` of attention with adapters: copies of the weights know those alone that are merged into them.

    Raises:
        ConfigError: when one runs beside the weights.
    """
    for layer in (getattr(attention, name, None) for name in FUSIBLE):
        if isinstance(layer, AdaptedLayer) and (beside := [m for m in layer.methods() if not m.merged]):
            raise ConfigError(
                f"Adapter {beside[0].adapter_name!r} runs beside the weights of {beside[0].site.name!r}, so it would be lost "
                "in projections that are fused into one: merge it first (mode='merged', or handle.merge()), or take it off."
            )
    cast(Any, type(attention)).fuse_projections(attention, fuse)


def forget_fusing(attention: nn.Module) -> None:
    """Gives attention its own `fuse_projections` again when no adapter is left on what it fuses."""
    layers = (getattr(attention, name, None) for name in FUSIBLE)
    if not any(isinstance(layer, AdaptedLayer) and layer.adapters for layer in layers):
        vars(attention).pop("fuse_projections", None)


def check_unfused(attentions: Iterable[nn.Module], adapter: str) -> None:
    """Raises ConfigError for attention of diffusers that reads copies of its projections' weights, in one."""
    if any(reads_fused(a) for a in attentions):
        raise ConfigError(
            f"Adapter {adapter!r} is for projections of attention that are fused here, so that the model reads copies of their "
            "weights: call unfuse_qkv_projections() first."
        )


def check_untied(handle: Handle) -> None:
    """Raises ConfigError where a weight that is to be written is another module's too, which would change with it."""
    sites = {id(m.site.layer._parameters.get(m.site.weight_name)): m.site for m in handle.methods.values()}
    for name, module in modules_of_base(handle.model):
        for p in module._parameters.values():
            site = sites.get(id(p)) if p is not None else None
            if site is not None and site.layer is not module:
                raise ConfigError(
                    f"The weight of {site.name!r} is that of {name!r} too, so nothing can be merged into one of them "
                    "alone: keep the adapter beside the weights (mode 'stacked')."
                )
    handle._untied = True


def bake(handles: Sequence[Handle], scales: Sequence[float] | None = None) -> None:
    """Merges adapters for good: the layers are plain ones again, with ΔW in their weights and no originals kept.

    Args:
        handles: on the same model; they can no longer be used.
        scales: one each; as they are when not given.

    Raises:
        ConfigError: when a scale or a weight would not be finite, before any weight is changed.
    """
    if scales is not None:
        for handle, scale in zip(handles, scales, strict=True):
            for changed in handle.in_full.values():
                changed.set_scale(scale)
    merge_together(handles, scales)
    for handle in handles:
        for changed in handle.in_full.values():
            changed.bake()
        handle.in_full = {}
    for handle in handles:
        for m in handle.methods.values():
            cast(AdaptedLayer, m.site.layer).originals.clear()
            m.merged = False
    for handle in handles:
        handle.eject()
