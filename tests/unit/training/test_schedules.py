"""Rates over whole runs, against diffusers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from visionlora.config import SCHEDULES
from visionlora.training.loop import LoopConfig
from visionlora.training.schedules import CURVES, rate_at, warmup_of

CONFIG = LoopConfig(steps=120, batch_size=1, gradient_accumulation=1, learning_rate=0.3, warmup_steps=7,
                    weight_decay=0.0, max_grad_norm=1.0, seed=0, schedule_cycles=3, schedule_power=1.7)  # fmt: skip
THEIRS = {
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine-restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
}


def reference(config: LoopConfig) -> list[float]:
    """Rates of diffusers at steps 0 to `steps`, one more than a run has."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(
        THEIRS[config.schedule], optimizer, num_warmup_steps=warmup_of(config), num_training_steps=config.steps,
        num_cycles=config.schedule_cycles, power=config.schedule_power,
    )  # fmt: skip
    rates = []
    for _ in range(config.steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_every_word_has_a_curve() -> None:
    assert tuple(CURVES) == SCHEDULES and set(THEIRS) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(120, 7), (120, 1), (120, 0), (33, 20), (11, 5), (2, 0)])
def test_rates_are_those_of_diffusers(schedule: str, steps: int, warmup: int) -> None:
    config = replace(CONFIG, schedule=schedule, steps=steps, warmup_steps=warmup)
    theirs, first = reference(config), warmup_of(config)
    ours = [rate_at(step, config) for step in range(steps)]
    assert ours[:first] == pytest.approx(theirs[1 : first + 1], rel=1e-12)  # counted from 1, not from 0
    loose = 1e-7 if schedule == "polynomial" else 0.0  # where theirs ends
    assert ours[first:] == pytest.approx(theirs[first:steps], rel=1e-12, abs=loose)


def test_the_cosine_is_the_one_of_earlier_runs_to_the_bit() -> None:
    for step in range(7, 120):
        assert rate_at(step, CONFIG) == 0.3 * 0.5 * (1 + math.cos(math.pi * ((step - 7) / (120 - 7))))


def test_restarts_begin_at_the_top() -> None:
    rates = [rate_at(step, replace(CONFIG, schedule="cosine-restarts", warmup_steps=0, steps=90)) for step in range(90)]
    assert [step for step in range(1, 90) if rates[step] > rates[step - 1]] == [30, 60]
    assert rates[0] == rates[30] == rates[60] == 0.3
