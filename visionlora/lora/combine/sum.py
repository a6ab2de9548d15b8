"""The sum of all ΔW, exact: factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visionlora.lora.combine.types import Factors, Options
from visionlora.lora.functional import stack_factors


def add(factors: Sequence[Factors], options: Options) -> tuple[Tensor, Tensor]:
    """The exact sum: the ranks add up."""
    return stack_factors(factors)
