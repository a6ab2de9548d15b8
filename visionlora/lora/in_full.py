"""Parameters of the base that adapters change in place: a head that trains in full, norms and biases of other trainers' files.

Several adapters may change one parameter. What is written is the original plus each one's difference times its scale, so
that the order in which they come, are scaled and go does not matter. Where other adapters are merged into the parameter,
this is what they are merged into: it is written to the layer's original, and they are merged anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionlora.lora.adapted import AdaptedLayer
from visionlora.lora.functional import wide
from visionlora.lora.guards import check_loading
from visionlora.lora.merge import merge_anew, overwrite


@dataclass
class Changed:
    """What adapters make of one parameter; it hangs on the parameter's module."""

    original: Tensor
    """As it was before the first."""
    hook: RemovableHandle
    """Of the module, for values that are loaded into it alone."""
    parts: list[InFull] = field(default_factory=list)


class InFull:
    """One adapter's change of one parameter."""

    def __init__(
        self, owner: nn.Module, name: str, value: Tensor | None = None, difference: Tensor | None = None
    ) -> None:
        """Changes it.

        Args:
            owner: the module of the base that has the parameter.
            name: of the parameter there.
            value: what it becomes.
            difference: what is added to it. With neither the parameter itself is the value, and may train.
        """
        self.owner, self.name, self.scale = owner, name, 1.0
        self._value, self._difference = value, difference
        self._trains = value is None and difference is None
        changed: dict[str, Changed] = vars(owner).setdefault("_changed", {})
        if name not in changed:
            hook = owner.register_load_state_dict_pre_hook(check_loading)
            changed[name] = Changed(self._unmerged.detach().clone(), hook)
        self._changed = changed[name]
        self._write(lambda parts: parts.append(self))

    @property
    def parameter(self) -> nn.Parameter:
        """What is changed."""
        return cast("nn.Parameter", getattr(self.owner, self.name))

    @property
    def _unmerged(self) -> Tensor:
        """The parameter without what other adapters have merged into it."""
        found: Tensor = getattr(self.owner, "originals", {}).get(self.name, self.parameter)
        return found

    @property
    def is_changed(self) -> bool:
        """Whether some adapter, this one or another, changes the parameter."""
        return self.name in vars(self.owner).get("_changed", {})

    @property
    def in_place(self) -> bool:
        """Whether the parameter itself is the value, as where it trains."""
        return self._trains and self._value is None

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
            return self._unmerged.detach()
        return self._narrow(wide(self._unmerged.detach()) - sum(p.scale * p.difference() for p in others))

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
        if self not in self._changed.parts:
            return
        self._write(lambda parts: parts.remove(self))
        if not self._changed.parts:
            changed: dict[str, Changed] = vars(self.owner)["_changed"]
            changed.pop(self.name).hook.remove()
            if not changed:
                del vars(self.owner)["_changed"]

    def bake(self) -> None:
        """What it makes of the parameter, at its scale, is the original from now on."""
        self._hold()
        self._changed.original = self._sum([self]).clone()
        self.take_off()

    # ------------------------------------------------------------------------------------------------------- writing

    def _hold(self) -> None:
        """Keeps the values of those that the parameter itself holds, before it is written."""
        for part in self._changed.parts:
            if part.in_place:
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
        overwrite(self._unmerged, self._sum(self._changed.parts))
        if isinstance(self.owner, AdaptedLayer) and self.name in self.owner.originals:
            merge_anew(self.owner)
        for part in self._changed.parts:
            if part._trains and part.scale == 1:  # the parameter holds it again, and trains on
                part._value = None
