"""An adapter whose parts learn at rates of their own: the head, and each block by its depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visionlora.lora.inject import Handle


@dataclass(frozen=True)
class LayeredLearner:
    """A `Handle` with a factor on the rate of everything that trains."""

    handle: Handle
    rate_of: Callable[[str], float]
    """From the name of a layer or parameter to the factor."""

    @property
    def model(self) -> nn.Module:
        """What the adapter is on."""
        return self.handle.model

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `Handle.parameter_groups`."""
        return self.handle.parameter_groups(lr, weight_decay, rate_of=self.rate_of)

    def regularisation(self) -> Tensor | None:
        """See `Handle.regularisation`."""
        return self.handle.regularisation()

    def after_step(self, step: int, steps: int) -> None:
        """See `Handle.after_step`."""
        self.handle.after_step(step, steps)

    def training_state(self) -> dict[str, Tensor]:
        """See `Handle.training_state`."""
        return self.handle.training_state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Handle.load_training_state`."""
        self.handle.load_training_state(state)


def rates_by_depth(
    depth_of: Callable[[str], int | None], blocks: int, decay: float, head: str, head_factor: float
) -> Callable[[str], float]:
    """Each block learns at `decay` times the rate of the one above it; what stands before the blocks slowest of all.

    Args:
        depth_of: from a name to its block, counted from 0; None outside of blocks.
        blocks: how many there are.
        decay: above 0 up to 1.
        head: name of the head.
        head_factor: of the head's own rate.

    >>> rate = rates_by_depth(lambda n: int(n[-1]) if n[-1].isdigit() else None, 3, 0.5, "head", 10.0)
    >>> [rate(n) for n in ("head.weight", "block2", "block0", "embed")]
    [10.0, 1.0, 0.25, 0.125]
    """

    def rate_of(name: str) -> float:
        if name == head or name.startswith(head + "."):
            return head_factor
        depth = depth_of(name)
        if depth is None and "norm" in name:  # the last normalisation, after all blocks
            return 1.0
        return float(decay ** (blocks if depth is None else blocks - 1 - depth)) if decay != 1 else 1.0

    return rate_of
