"""What dry runs share: how long a step takes, and a rank in the place of one that is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from visionlora.config import TrainingConfig
from visionlora.report.listener import Listener
from visionlora.training.loop import Fit, Task

C = TypeVar("C", bound=TrainingConfig)
PROBED = 2
"""Steps that are measured, after one that is not."""


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


def with_rank(config: C, rank: int, tell: Listener) -> C:
    """The settings with this rank everywhere where they say auto: measuring the layers takes as long as many steps."""
    if config.rank != "auto":
        return config
    tell.say(f"Rank auto is counted as rank {rank} everywhere.")
    return dataclasses.replace(config, rank=rank)
