"""What dry runs share: how long a step takes, and a rank in the place of one that is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from visionlora.config import TrainingConfig
from visionlora.lora.rank import Part
from visionlora.report.listener import Listener
from visionlora.training.loop import Fit, Task
from visionlora.training.memory import Room
from visionlora.training.settings import rank_alike

C = TypeVar("C", bound=TrainingConfig)
PROBED = 2
"""Steps that are measured, after one that is not."""

MOST, FEW = 64, 8
"""Pictures at once in a step that is measured: of a batch that fits in memory, and of one that does not."""


def timed(work: Callable[[], object], accelerator: Any) -> float:
    """Seconds that some work takes, also on a GPU."""
    start = time.monotonic()
    work()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


def seconds_of_step(fit: Fit, task: Task) -> float:
    """What a step takes, once it is warm."""
    fit.advance(task, 0.0)
    return timed(lambda: [fit.advance(task, 0.0) for _ in range(PROBED)], fit.accelerator) / PROBED


def with_rank(config: C, parts: Sequence[Part], tell: Listener) -> C:
    """The settings with the budget's rank everywhere where they say auto: measuring the layers takes as long as many steps."""
    if config.rank != "auto":
        return config
    rank = rank_alike(config, parts)
    tell.say(f"Rank auto is counted as rank {rank} everywhere.")
    return dataclasses.replace(config, rank=rank)


@dataclass(frozen=True)
class StepCost:
    """What a step would take."""

    seconds: float
    more_bytes: int
    """Beyond the peak of what was measured."""
    fitting: int | None
    """Pictures that fit in memory at once, where those of a batch do not."""

    def note(self, instead: str = "") -> str:
        """Goes after the peak; empty where the batch fits."""
        return (
            f"; that is more than is free, where {self.fitting:,} pictures at once fit: batch_size={self.fitting}{instead}"
            if self.fitting is not None
            else ""
        )


def cost_of_step(batch: int, room: Room, seconds_with: Callable[[int], float]) -> StepCost:
    """Measured; that of a batch which is very large, or would not fit in memory, is computed from one of fewer pictures.

    Args:
        batch: pictures at once.
        room: what they keep, and what there is.
        seconds_with: takes a step with so many pictures at once.
    """
    fitting = room.fitting if room.fitting is not None and room.fitting < batch else None
    measured = min(batch, MOST) if fitting is None else min(FEW, fitting)
    return StepCost(seconds_with(measured) * batch / measured, (batch - measured) * room.per_picture, fitting)
