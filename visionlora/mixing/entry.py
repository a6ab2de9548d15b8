"""Adapters onto a pipeline or a model, and off again: the two functions that most people need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from torch import nn

from visionlora.errors import ConfigError
from visionlora.loaders import load_adapter, named, scales_of
from visionlora.lora.adapter import Adapter
from visionlora.lora.guards import adapters_on
from visionlora.lora.handle import Handle
from visionlora.lora.inject import attach as attach_one
from visionlora.mixing.compose import Composition
from visionlora.mixing.holder import mix_on
from visionlora.mixing.mix import Mix
from visionlora.mixing.parts import parts_of


@overload
def attach(
    target: Any, adapters: Mapping[str, str | Path | Adapter], *, allow_partial: bool = False, scales: Any = None,
    mode: str = "auto", compose: str | Composition = "sum", **options: Any,
) -> Mix: ...  # fmt: skip


@overload
def attach(
    target: nn.Module, adapters: str | Path | Adapter, component: str = "", name: str = "default", allow_partial: bool = False
) -> Handle: ...  # fmt: skip


@overload
def attach(
    target: Any, adapters: str | Path | Adapter, *, name: str = "default", allow_partial: bool = False, scales: Any = None,
    mode: str = "auto", compose: str | Composition = "sum", **options: Any,
) -> Mix: ...  # fmt: skip


def attach(
    target: Any, adapters: Any, component: str = "", name: str = "default", allow_partial: bool = False, *,
    scales: Any = None, mode: str = "auto", compose: str | Composition = "sum", **options: Any,
) -> Mix | Handle:  # fmt: skip
    """Puts adapters on a pipeline or a model.

    Args:
        target: a pipeline of diffusers, or any module. Scales by step follow its scheduler: another pipeline of the same UNet
            must share it too, or have the adapters attached to itself.
        adapters: {name: file or `Adapter`} gives a `Mix`, and so does one path or `Adapter` on a pipeline; on a module that one
            gives its `Handle`.
        component: of one adapter on a module, which part of it; the only one when empty.
        name: of one adapter.
        allow_partial: leave out what does not fit.
        scales: of a mix, by name: a number, factors by block, an A1111 list or a `Scale`; 1 where not given. One that is not by
            name is of all.
        mode: of a mix: auto, merged, stacked or batched.
        compose: of a mix, see `visionlora.mixing.compose`; options follow as keywords.
        options: of the composition.

    Raises:
        ConfigError: for unknown names, modes or compositions, scales that cannot be used, settings that one adapter on a module
            has not, and where an earlier mix is on the target.
        AdapterFileError: when a file cannot be read or is for another family of base models.
        TargetError: when an adapter does not fit; the target is left as it was.
    """
    wanted = named(adapters, name)
    if isinstance(target, nn.Module) and not isinstance(adapters, Mapping):
        if scales is not None or mode != "auto" or compose != "sum" or options:
            raise ConfigError(
                "scales, mode, compose and its options are a mix's: give the adapter a name, such as "
                "{'dog': 'dog.safetensors'}; the handle of one adapter has set_scale and merge."
            )
        loaded = adapters if isinstance(adapters, Adapter) else load_adapter(adapters, allow_partial)
        return attach_one(target, loaded, component, name, allow_partial)
    if component:
        raise ConfigError(f"component is {component!r}, but a mix finds the part of each layer itself: leave it out.")
    mix = Mix(target, mode, compose, allow_partial, **options)
    by_name = scales_of(scales, wanted)
    mix.change({n: mix.member(n, a, by_name.get(n, 1.0)) for n, a in wanted.items()})
    return mix


def detach(target: Any) -> None:
    """Takes off what `attach` has put on by name, also where the mix itself is no longer at hand; the base is as before.

    Args:
        target: the pipeline or module, or one that shares parts with it.

    Raises:
        ConfigError: when adapters are on it, and none of them by a mix of its own.
    """
    parts, found = parts_of(target).values(), False
    for part in parts:
        if (mix := mix_on(part)) is not None:
            mix.detach()
            found = True
    if not found and (names := dict.fromkeys(name for part in parts for name in adapters_on(part))):
        raise ConfigError(
            f"The adapters on this {type(target).__name__} ({', '.join(names)}) are of no mix on it: a handle takes its own "
            "off (handle.eject()). A copy that was made while a mix was on the original keeps them: copy it after "
            "mix.detach(). vl.load_pipeline gives a pipeline for good: vl.attach puts adapters on one so that they come off."
        )
