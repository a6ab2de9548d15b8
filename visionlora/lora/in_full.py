"""Parameters of the base that adapters change in place: a head that trains in full, norms and biases of other trainers' files.

Several adapters may change one parameter. What is written is the original plus each one's difference times its scale, so
that the order in which they come, are scaled and go does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.lora.functional import wide


@dataclass
class Changed:
    """What adapters make of one parameter; it hangs on the parameter."""

    original: Tensor
    """As it was before the first."""
    parts: list[InFull] = field(default_factory=list)


def is_changed(parameter: nn.Parameter) -> bool:
    """Whether some adapter changes this parameter in place."""
    return hasattr(parameter, "_changed")


class InFull:
    """One adapter's change of one parameter."""

    def __init__(self, parameter: nn.Parameter, value: Tensor | None = None, difference: Tensor | None = None) -> None:
        """Changes it.

        Args:
            parameter: of the base.
            value: what it becomes.
            difference: what is added to it. With neither the parameter itself is the value, and may train.
        """
        self.parameter, self.scale = parameter, 1.0
        self._value, self._difference = value, difference
        self._trains = value is None and difference is None
        slot = cast("Any", parameter)
        if not is_changed(parameter):
            slot._changed = Changed(parameter.detach().clone())
        self._changed: Changed = slot._changed
        self._write(lambda parts: parts.append(self))

    @property
    def original(self) -> Tensor:
        """The base's value."""
        return self._changed.original

    @torch.no_grad()
    def value(self) -> Tensor:
        """What it becomes by this adapter alone, at scale 1."""
        if self._value is not None:
            return self._value
        if self._difference is not None:
            return (wide(self.original) + self.difference().to(self.original.device)).to(self.original.dtype)
        others = [p for p in self._changed.parts if p is not self and p.scale]
        if not others:
            return self.parameter.detach()
        return self._narrow(wide(self.parameter.detach()) - sum(p.scale * p.difference() for p in others))

    @torch.no_grad()
    def difference(self) -> Tensor:
        """Value minus original, in fp32."""
        device = self.parameter.device
        if self._difference is not None:
            return wide(self._difference.to(device))
        return wide(self.value().to(device)) - wide(self.original.to(device))

    def set_scale(self, scale: float) -> None:
        """original + scale · difference, beside what others add; 0 and 1 are exact where there are none."""
        if scale != self.scale:
            self._write(lambda _: setattr(self, "scale", scale))

    def take_off(self) -> None:
        """As if it had never been."""
        self._write(lambda parts: parts.remove(self))
        if not self._changed.parts:
            del cast("Any", self.parameter)._changed

    def bake(self) -> None:
        """What it makes of the parameter, at its scale, is the original from now on."""
        self._hold()
        self._changed.original = self._sum([self]).clone()
        self.take_off()

    # ------------------------------------------------------------------------------------------------------- writing

    def _hold(self) -> None:
        """Keeps the values of those that the parameter itself holds, before it is written."""
        for part in self._changed.parts:
            if part._trains and part._value is None:
                part._value = part.value().clone()

    def _sum(self, parts: list[InFull]) -> Tensor:
        active = [p for p in parts if p.scale]
        if not active:
            return self.original
        if len(active) == 1 and active[0].scale == 1:
            return active[0].value()
        total = wide(self.original.to(self.parameter.device))
        return self._narrow(total + sum(p.scale * p.difference() for p in active))

    def _narrow(self, tensor: Tensor | float) -> Tensor:
        return cast("Tensor", tensor).to(self.parameter.dtype)

    @torch.no_grad()
    def _write(self, change: Callable[[list[InFull]], object]) -> None:
        """Makes a change of the parts or their scales, and writes what follows from it."""
        self._hold()
        change(self._changed.parts)
        self.parameter.copy_(self._sum(self._changed.parts))
        for part in self._changed.parts:
            if part._trains and part.scale == 1:  # the parameter holds it again, and trains on
                part._value = None
