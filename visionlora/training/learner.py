"""What learns, beyond one adapter at one rate: blocks at rates by depth, and several adapters together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visionlora.lora.handle import Handle


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
        depth_of: from a name to its block, counted from 0; None for what stands before the blocks.
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
        return float(decay ** (blocks if depth is None else blocks - 1 - depth)) if decay != 1 else 1.0

    return rate_of


class Learning(Protocol):
    """What a part of a `JointLearner` can do; an adapter's `Handle` can."""

    def set_scale(self, scale: float) -> None:
        """See `Handle.set_scale`."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `Handle.parameter_groups`."""

    def regularisation(self) -> Tensor | None:
        """See `Handle.regularisation`."""

    def after_step(self, step: int, steps: int) -> None:
        """See `Handle.after_step`."""

    def training_state(self) -> dict[str, Tensor]:
        """See `Handle.training_state`."""

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Handle.load_training_state`."""


@dataclass
class Part:
    """One of several adapters that learn together."""

    name: str
    learning: Learning
    factor: float = 1.0
    """On the learning rate."""
    stop: float = 1.0
    """Share of the steps after which it stays as it is."""
    stopped: bool = False

    def stay(self) -> None:
        """From now on it stays as it is."""
        self.stopped = True
        for group in self.learning.parameter_groups(1.0, 0.0):
            for p in group["params"]:
                p.requires_grad_(False)
                p.grad = None


@dataclass
class JointLearner:
    """Several adapters on parts of one model."""

    model: nn.Module
    parts: Sequence[Part] = field(default_factory=list)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The groups of all parts, each at its own rate."""
        return [
            {**group, "name": f"{part.name} {group['name']}"}
            for part in self.parts
            for group in part.learning.parameter_groups(lr * part.factor, weight_decay)
        ]

    def regularisation(self) -> Tensor | None:
        """The sum of what the parts have."""
        found = [term for part in self.parts if (term := part.learning.regularisation()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, step: int, steps: int) -> None:
        """See `Handle.after_step`; parts stop here."""
        for part in self.parts:
            if not part.stopped:
                part.learning.after_step(step, max(1, round(part.stop * steps)))
                if part.stop < 1 and step >= part.stop * steps:
                    part.stay()

    def training_state(self) -> dict[str, Tensor]:
        """Of all parts, and which have stopped."""
        state = {f"{part.name}/{n}": t for part in self.parts for n, t in part.learning.training_state().items()}
        return state | {f"{part.name}/stopped": torch.tensor(part.stopped) for part in self.parts}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Handle.load_training_state`."""
        for part in self.parts:
            own = {n.removeprefix(f"{part.name}/"): t for n, t in state.items() if n.startswith(f"{part.name}/")}
            stopped = bool(own.pop("stopped", torch.tensor(False)))
            part.learning.load_training_state(own)
            if stopped:
                part.stay()

    def set_scale(self, scale: float) -> None:
        """See `Handle.set_scale`."""
        for part in self.parts:
            part.learning.set_scale(scale)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """All adapters are off meanwhile: the base model."""
        self.set_scale(0.0)
        try:
            yield
        finally:
            self.set_scale(1.0)
