"""What hangs on a model while a mix is on it: the way back to the mix, and a refusal to save what is not the base."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from visionlora.errors import ConfigError
from visionlora.mixing.parts import parts_of

if TYPE_CHECKING:
    from visionlora.mixing.mix import Mix


class Holder:
    """Hangs on a model, so that the mix that is on it can be found; a copy of the model has none."""

    def __init__(self, mix: Mix | None = None) -> None:
        self.mix = mix

    def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
        return Holder, ()


def mix_on(part: nn.Module) -> Mix | None:
    """The mix whose adapters are on a model."""
    holder: Holder | None = vars(uncompiled(part)).get("_mix")
    return None if holder is None else holder.mix


def uncompiled(part: Any) -> Any:
    """What a compiled model was compiled from, which a pipeline saves in its place; anything else as it is."""
    return getattr(part, "_orig_mod", part)


def hold(part: nn.Module, mix: Mix) -> None:
    """Hangs a mix on a model."""
    vars(uncompiled(part))["_mix"] = Holder(mix)
    refuse_saving(part)


def let_go(part: nn.Module) -> None:
    """Takes it off again."""
    del vars(uncompiled(part))["_mix"]
    allow_saving(part)


def refuse_saving(target: Any) -> None:
    """Makes `save_pretrained` of a model or pipeline an error while there is a mix on it.

    It would write ΔW into the base where the mode is merged, and names that no other program knows where it is another.
    `state_dict` is left as it is: offloading reads it.
    """
    if hasattr(target := uncompiled(target), "save_pretrained"):
        vars(target)["save_pretrained"] = partial(save_pretrained, target)


def allow_saving(target: Any) -> None:
    """As before `refuse_saving`, unless another mix is still there."""
    if not any(map(mix_on, parts_of(target).values())):
        vars(uncompiled(target)).pop("save_pretrained", None)


def save_pretrained(target: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of that of a model or pipeline, and of its copies, which are no mix's."""
    mixes = [mix for part in parts_of(target).values() if (mix := mix_on(part)) is not None]
    if not mixes:
        return type(target).save_pretrained(target, *args, **kwargs)
    raise ConfigError(
        f"Adapters of vl.attach are on this {type(target).__name__} ({', '.join(mixes[0].members)}): what it would save is "
        "neither the base nor a model that other programs read. For the base take them off first (mix.detach()); for a "
        "model with them in its weights use vl.bake or `visionlora bake` with their files."
    )
