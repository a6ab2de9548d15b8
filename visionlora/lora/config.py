"""What is adapted, how strongly and with how many parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from visionlora.errors import ConfigError, nearest

METHODS = ("lora",)
INITS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of one adapter, checked at construction.

    Raises:
        ConfigError: naming every field that is out of range, in one message.
    """

    method: str = "lora"
    """Adapter method; `lora` is ΔW = alpha/rank · B·A (arXiv 2106.09685)."""
    rank: int = 8
    """Rank r of each ΔW, 1 or more and at most the smaller side of the layer."""
    alpha: float | None = None
    """Numerator of the scaling alpha/rank; equal to the rank when not given, so that the scaling is 1."""
    targets: str | tuple[str, ...] = "attn"
    """Roles (`attn`, `attn.q`, `mlp`, `conv`, `all` …), module names, dot-boundary suffixes, or `re:` and a regex."""
    dropout: float = 0.0
    """Share of the inputs of an adapter that is zeroed while training, 0 up to but not including 1."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts; B starts at zero, so that training starts as the identity."""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}. {nearest(self.method, METHODS)}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            problems.append(f"rank is {self.rank!r}; it must be a whole number of at least 1.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha!r}; it must be a positive number (equal to the rank for scaling 1).")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        if self.init not in INITS:
            problems.append(f"init is {self.init!r}. {nearest(str(self.init), INITS)}")
        if not self.target_list:
            problems.append("targets is empty; `attn` is a good start.")
        if problems:
            raise ConfigError("This adapter cannot be built:\n" + "\n".join(f"- {p}" for p in problems))

    @property
    def target_list(self) -> tuple[str, ...]:
        """The targets, one by one."""
        given = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        return tuple(t.strip() for t in given if t.strip())

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default resolved."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scaling(self) -> float:
        """The factor s of W + s·B·A."""
        return self.effective_alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON header."""
        return {**asdict(self), "targets": list(self.target_list), "alpha": self.effective_alpha}
