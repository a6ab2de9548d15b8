"""What hangs on a model while a mix is on it: the way back to the mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from visionlora.lora.guards import uncompiled

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


def is_copy(part: nn.Module) -> bool:
    """Whether a model was copied, or saved whole and loaded, while a mix was on it, whose adapters are on it for good."""
    return "_mix" in vars(uncompiled(part)) and mix_on(part) is None


def hold(part: nn.Module, mix: Mix) -> None:
    """Hangs a mix on a model."""
    vars(uncompiled(part))["_mix"] = Holder(mix)


def let_go(part: nn.Module) -> None:
    """Takes it off again."""
    del vars(uncompiled(part))["_mix"]
