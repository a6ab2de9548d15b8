"""The loop: batch -> loss -> gradients -> step, on accelerate; it knows nothing of diffusion or classification."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, TrainingError
from visionlora.training.order import generator_at, indices_at


@dataclass(frozen=True)
class LoopConfig:
    """What every kind of training has in common."""

    steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class Progress:
    """The state of the run after a step."""

    step: int
    loss: float
    """Mean over the step's pictures on all processes."""
    learning_rate: float
    grad_norm: float
    images_seen: int
    images_per_second: float


class Learner(Protocol):
    """What learns: an adapter on a model (`visionlora.lora.inject.Handle`), or anything with the same methods."""

    model: nn.Module

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with its rate at the peak of the schedule."""

    def regularisation(self) -> Tensor | None:
        """A term that the loss includes."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, while the gradients are there; steps are counted from 1."""


class Task(Protocol):
    """What is trained."""

    def __len__(self) -> int:
        """Number of training pictures."""

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Loss of each picture of `index[part]`; random numbers are drawn for the whole of `index`."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Accelerate's word for a precision; `auto` is bf16 (or fp16) on a GPU and fp32 on a CPU.

    Raises:
        ConfigError: for fp16 on a CPU, where it has no fast kernels and its gradients underflow.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision is 'fp16', but training runs on the CPU, which needs fp32 or bf16: --precision bf16."
        )
    return {"fp32": "no"}.get(precision, precision)


def rate_at(step: int, config: LoopConfig) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then a cosine to zero."""
    warmup = min(config.warmup_steps, max(1, config.steps // 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    accelerator: Any,
    learner: Learner,
    task: Task,
    config: LoopConfig,
    on_step: Callable[[Progress], None],
) -> None:
    """Runs `config.steps` optimizer steps; `on_step` is called after each, and an exception it raises ends the run.

    Each step sees batch_size x gradient_accumulation pictures on every process; all processes draw the random numbers
    of the whole step and take their share, so the curve is the same on one process and on several.

    Raises:
        TrainingError: when the loss is NaN or infinite; the weights are those of the last good step.
    """
    groups = learner.parameter_groups(config.learning_rate, config.weight_decay)
    trained = [p for group in groups for p in group["params"]]
    peaks = [group["lr"] / config.learning_rate for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True)
    model, optimizer = accelerator.prepare(learner.model, optimizer)
    micro, shares = config.batch_size, config.gradient_accumulation
    per_step = micro * shares * accelerator.num_processes
    model.train()
    spent = 0.0
    for step in range(config.steps):
        start = time.monotonic()
        images_seen = step * per_step
        index = indices_at(config.seed, images_seen, per_step, len(task))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = rate_at(step, config) * peak
        total = torch.zeros((), device=accelerator.device)
        for share in range(shares):
            first = (accelerator.process_index * shares + share) * micro
            last_share = share == shares - 1
            with accelerator.no_sync(model) if not last_share else accelerator.autocast():
                with accelerator.autocast():
                    losses = task.losses(
                        model, index, generator_at(config.seed, images_seen), slice(first, first + micro)
                    )
                loss = losses.mean() / shares
                penalty = learner.regularisation()
                accelerator.backward(loss if penalty is None else loss + penalty / shares)
            total += loss.detach().float()
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise TrainingError(
                f"The loss became {mean} at step {step + 1}. The usual causes: a learning rate that is too "
                f"high (now {config.learning_rate:g}; try a third of it) or fp16 (try --precision bf16)."
            )
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        learner.after_step(step + 1, config.steps)
        optimizer.zero_grad()
        seen = images_seen + per_step
        spent += time.monotonic() - start  # what `on_step` draws and writes is not training
        on_step(Progress(step + 1, mean, rate_at(step, config), float(norm), seen, seen / max(1e-9, spent)))
