"""Writes adapters into the base weights and takes them out bit for bit: from untouched originals, never by subtraction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.lora.layers import AdaptedLayer, with_adapters

if TYPE_CHECKING:
    from visionlora.lora.inject import Handle


@torch.no_grad()
def write_weights(handles: Sequence[Handle]) -> None:
    """Writes the weights of every layer of these adapters, from the untouched originals and all that is merged there.

    Raises:
        ConfigError: when a weight would not be finite, before any is changed.
    """
    names = {id(m.site.layer): (h.name, m.site) for h in handles for m in h.methods.values()}
    new: list[tuple[AdaptedLayer, dict[str, Tensor]]] = []
    for adapter, site in names.values():
        layer = cast(AdaptedLayer, site.layer)
        merged = [m for m in layer.methods() if m.merged]
        values = with_adapters(layer, merged)
        # NaN and infinity survive a sum, which reads each weight once and writes nothing.
        if not all(bool(torch.isfinite(v.sum(dtype=torch.float32))) for v in values.values()):
            raise not_finite(adapter, site.name)
        new.append((layer, values))
    for layer, values in new:
        for name in [n for n in layer.originals if n not in values]:
            cast(Tensor, getattr(layer, name)).copy_(layer.originals.pop(name))
        for name, value in values.items():
            parameter = cast(Tensor, getattr(layer, name))
            layer.originals.setdefault(name, parameter.detach().clone())
            parameter.copy_(value)


def not_finite(adapter: str, layer: str) -> ConfigError:
    """What a merge that would spoil the base says."""
    return ConfigError(
        f"Merging adapter {adapter!r} gives NaN or infinite weights in {layer!r}; nothing was changed. Its training "
        "diverged, or its scale is too large."
    )


def merge_together(handles: Sequence[Handle], scales: Sequence[float] | None = None) -> None:
    """Merges several adapters of one model, at new scales, writing each weight once.

    Args:
        handles: on the same model.
        scales: one each; as they are when not given.

    Raises:
        ConfigError: when a scale or a weight would not be finite, before any weight is changed.
    """
    for handle, scale in zip(handles, scales or [1.0] * len(handles), strict=True):
        if not math.isfinite(scale):
            raise ConfigError(f"The scale of adapter {handle.name!r} is {scale!r}; it must be a finite number.")
        for m in handle.methods.values():
            if scales is not None:
                m.scale = scale
            m.merged = True
    write_weights(handles)


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
        for m in handle.methods.values():
            cast(AdaptedLayer, m.site.layer).originals.clear()
            m.merged = False
        handle.in_full = {}
    for handle in handles:
        handle.eject()
