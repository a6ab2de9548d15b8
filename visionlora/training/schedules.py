"""Learning rates over a run: a linear warm-up, then a curve from 1 to 0 (or none); functions of the step alone.

After the warm-up the curves are those of `diffusers.optimization` at the same step. In the warm-up ours counts steps from 1
and theirs from 0, so that no step is lost to a rate of zero: our rate of a step is theirs of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionlora.training.loop import LoopConfig

Curve = Callable[[float, "LoopConfig"], float]
"""From the share of the steps after warm-up that are done, 0 up to but not including 1, to a factor on the rate."""


def cosine(done: float, config: LoopConfig) -> float:
    """Half a cosine (arXiv 1608.03983, eq. 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def cosine_restarts(done: float, config: LoopConfig) -> float:
    """`schedule_cycles` of these one after the other, each from the top (arXiv 1608.03983, eq. 5, cycles of equal length)."""
    return cosine((config.schedule_cycles * done) % 1.0, config)


def constant(done: float, config: LoopConfig) -> float:
    """Stays."""
    return 1.0


def linear(done: float, config: LoopConfig) -> float:
    """A straight line."""
    return 1 - done


def polynomial(done: float, config: LoopConfig) -> float:
    """The share that is left, to the power `schedule_power`; it ends at 0, where diffusers' ends at 1e-7."""
    return float((1 - done) ** config.schedule_power)


CURVES: dict[str, Curve] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "cosine-restarts": cosine_restarts,
    "polynomial": polynomial,
}
"""By the words of `visionlora.config.SCHEDULES`."""


def warmup_of(config: LoopConfig) -> int:
    """Steps of warm-up: never more than a tenth of the run, so that a short one is not all warm-up."""
    return min(config.warmup_steps, max(1, config.steps // 10))


def rate_at(step: int, config: LoopConfig) -> float:
    """Learning rate of a step.

    Args:
        step: counted from 0, below `config.steps`.
        config: rate at the peak, steps, warm-up and schedule.

    >>> from visionlora.training.loop import LoopConfig
    >>> config = LoopConfig(steps=40, batch_size=1, gradient_accumulation=1, learning_rate=1.0, warmup_steps=2,
    ...                     weight_decay=0.0, max_grad_norm=1.0, seed=0, schedule="linear")
    >>> [rate_at(step, config) for step in (0, 1, 2, 21)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup = warmup_of(config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * CURVES[config.schedule](done, config)
