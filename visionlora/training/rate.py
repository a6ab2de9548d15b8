"""Finds a learning rate: a short sweep from far too low to far too high (arXiv 1506.01186), after which all is as before."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from visionlora.errors import TrainingError
from visionlora.training.loop import Fit, Task, into_training

LOWEST, HIGHEST = 1e-6, 1.0
KEEP = 0.85
"""Of the running average of the loss."""
SAFETY = 10.0
LOST = 3.0
"""The sweep ends when the loss is this many times the lowest."""
WARM_IN = 0.25
"""Share of the sweep, at rates that teach nothing, which shows what the loss is and how much it varies from batch to batch."""
CLEAR = 2.5
"""Standard errors by which the loss must have fallen below that, else the lowest point is one of chance."""


@dataclass(frozen=True)
class RateSweep:
    """What the sweep saw."""

    points: tuple[tuple[float, float], ...]
    """(learning rate, smoothed loss)."""
    rate: float | None
    """A tenth of the rate at which the smoothed loss was lowest: near there it is about to grow again. None where no rate
    lowered it by more than it varies, as with batches of a few pictures."""


def find_rate(fit: Fit, task: Task, steps: int = 100, on_step: Callable[[int, int], None] | None = None) -> RateSweep:
    """Sweeps the rate over `steps` steps and puts everything back.

    Raises:
        TrainingError: when the loss is not finite from the start.
    """
    before = copy.deepcopy(fit.state())
    points: list[tuple[float, float]] = []
    average, early = 0.0, round(WARM_IN * steps)
    flat: list[float] = []
    into_training(fit.model)
    try:
        for number in range(steps):
            rate = LOWEST * (HIGHEST / LOWEST) ** (number / (steps - 1))
            try:
                loss, _ = fit.advance(task, rate)
            except TrainingError:
                if number < 2:
                    raise
                break
            average = KEEP * average + (1 - KEEP) * loss
            points.append((rate, average / (1 - KEEP ** (number + 1))))
            if number < early:
                flat.append(loss)
            if on_step is not None:
                on_step(number + 1, steps)
            if number > early and points[-1][1] > LOST * min(value for _, value in points[early:]):
                break
    finally:
        fit.optimizer.zero_grad()  # a step whose loss was not finite leaves such gradients
        fit.restore(before)
        torch.manual_seed(fit.config.seed)
    return RateSweep(tuple(points), _lowest(points[early:], flat))


def _lowest(points: list[tuple[float, float]], flat: list[float]) -> float | None:
    """See `RateSweep.rate`.

    Args:
        points: after the warm-in.
        flat: the losses in it, as they were.
    """
    if not points:
        return None
    rate, value = min(points, key=lambda point: point[1])
    # Of a running average and of the mean that it is compared with.
    error = statistics.pstdev(flat) * ((1 - KEEP) / (1 + KEEP) + 1 / len(flat)) ** 0.5
    return rate / SAFETY if statistics.fmean(flat) - value > CLEAR * error else None
