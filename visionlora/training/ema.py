"""A running average of what trains: less noise than the last step's values, above all at small batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of parameters; early on the decay is lower, so that the start is soon forgotten."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay, self.averages = decay, [p.detach().clone() for p in parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Called after each step."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.detach() for p in parameters], 1 - keep)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"averages": self.averages, "updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.updates = int(state["updates"])
        for own, kept in zip(self.averages, state["averages"], strict=True):
            own.copy_(kept)

    @contextmanager
    def in_place_of(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The averages stand in the parameters meanwhile."""
        kept = [p.detach().clone() for p in parameters]
        write(parameters, self.averages)
        try:
            yield
        finally:
            write(parameters, kept)


@torch.no_grad()
def write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copies values into parameters."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
