"""What combinations take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visionlora.errors import ConfigError

Factors = tuple[Tensor, Tensor, float]
"""lora_A (r, i) or (r, i, *k), lora_B (o, r) or (o, r, 1, ...) and the scaling, the adapter's scale included."""


@dataclass(frozen=True)
class Options:
    """Settings of combinations that drop values.

    Raises:
        ConfigError: when the density is out of range.
    """

    density: float = 0.2
    """Share of the values of each ΔW that stays, above 0 and at most 1 (TIES keeps the largest, DARE random ones)."""
    seed: int = 0
    """Of DARE's choice."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density!r}; it must be above 0 and at most 1.")
