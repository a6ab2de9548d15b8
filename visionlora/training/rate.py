"""Finds a learning rate: a short sweep from far too low to far too high (arXiv 1506.01186), after which all is as before."""

from __future__ import annotations

import copy
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


@dataclass(frozen=True)
class RateSweep:
    """What the sweep saw."""

    points: tuple[tuple[float, float], ...]
    """(learning rate, smoothed loss)."""
    rate: float
    """A tenth of the rate at which the smoothed loss was lowest: near there it is about to grow again."""


def find_rate(fit: Fit, task: Task, steps: int = 100, on_step: Callable[[int, int], None] | None = None) -> RateSweep:
    """Sweeps the rate over `steps` steps and puts everything back.

    Raises:
        TrainingError: when the loss is not finite from the start.
    """
    before = copy.deepcopy(fit.state())
    points: list[tuple[float, float]] = []
    average = 0.0
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
            if on_step is not None:
                on_step(number + 1, steps)
            if number > 10 and points[-1][1] > LOST * min(value for _, value in points):
                break
    finally:
        fit.optimizer.zero_grad()  # a step whose loss was not finite leaves such gradients
        fit.restore(before)
        torch.manual_seed(fit.config.seed)
    return RateSweep(tuple(points), min(points, key=lambda point: point[1])[0] / SAFETY)
