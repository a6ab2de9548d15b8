"""KnOTS and Iso-C as compositions: the adapters become one, made of their ΔW at their scales; see `visionlora.lora.combine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import merge_adapters
from visionlora.lora.combine import Options
from visionlora.mixing.compose.base import Composition
from visionlora.mixing.scales import is_number, plain


class MergedAdapters(Composition):
    """One adapter in place of all; its scale is 1, theirs are in it."""

    method: ClassVar[str]
    options = Options()

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """Merged under a name that is none of theirs, as their scales are in it."""
        pairs = [(a, scales[n]) for n, a in adapters.items()]
        return {
            f"{self.method}({', '.join(adapters)})": merge_adapters(pairs, self.method, options=self.options).adapter
        }


class Knots(MergedAdapters):
    """KnOTS: the adapters in one basis, then a mean of what agrees in sign.

    Args:
        density: share of the values that each adapter keeps in that basis, above 0 and at most 1.
    """

    method = "knots"

    def __init__(self, density: float = 1.0) -> None:
        density = plain(density)
        if not is_number(density):
            raise ConfigError(f"density is {density!r}; it must be a number above 0 and at most 1.")
        self.options = Options(density)


class IsoC(MergedAdapters):
    """Iso-C: the sum with all its singular values at their mean."""

    method = "iso-c"
