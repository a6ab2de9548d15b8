"""From the settings of a run to those of its adapter and its loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from visionlora.config import TrainingConfig, budget_of
from visionlora.lora.config import AdapterConfig
from visionlora.lora.rank import RankChoice, choose_ranks
from visionlora.training.loop import LoopConfig, Task
from visionlora.training.order import generator_at, indices_at

CALIBRATION_BATCHES = 16
"""Batches on which rank auto measures the layers."""


def adapter_config(config: TrainingConfig, **more: Any) -> AdapterConfig:
    """The adapter's share; with rank auto, the mean rank that competes for the budget."""
    shared = ("method", "alpha", "targets", "dropout", "init", "basis_index")
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    rank = config.rank if config.rank != "auto" else amount if kind == "rank" else 8
    return AdapterConfig(rank=rank, **{name: getattr(config, name) for name in shared}, **more)


def loop_config(config: TrainingConfig) -> LoopConfig:
    """The loop's share."""
    return LoopConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(LoopConfig)})


def automatic_ranks(
    model: nn.Module,
    adapter: AdapterConfig,
    task: Task,
    config: TrainingConfig,
    on_batch: Callable[[int, int], None],
) -> RankChoice:
    """Ranks by layer, measured on the training pictures before the first step.

    Args:
        model: the base model.
        adapter: its targets compete.
        task: gives the losses.
        config: the budget, batch and seed.
        on_batch: called with (batches done, batches in all).
    """
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    batch = config.batch_size or 1

    def loss_of(number: int) -> Tensor:
        on_batch(number + 1, CALIBRATION_BATCHES)
        index = indices_at(config.seed, number * batch, batch, len(task))
        generator = generator_at(config.seed, number * batch, "calibration")
        return task.losses(model, index, generator, slice(0, batch)).mean()

    return choose_ranks(model, adapter, loss_of, CALIBRATION_BATCHES, amount if kind == "parameters" else None)
