"""The noise scale on problems whose covariance and gradient are known, and that looking at it changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.training.loop import Fit, LoopConfig, Progress
from visionlora.training.noise import GradientNoise, NoiseScale, noise_lines

from ...doubles import Learner

CONFIG = LoopConfig(steps=200, batch_size=4, gradient_accumulation=1, learning_rate=1e-9, warmup_steps=0,
                    weight_decay=0.0, max_grad_norm=1.0, seed=0, schedule="constant")  # fmt: skip


class Known:
    """The gradient of one picture is drawn from a normal distribution: mean 0.5 in each of 8 places, deviation `spread`."""

    groups = (Group(tuple(range(64)), 64),)
    mean, size = 0.5, 8

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        gradients = self.mean + self.spread * torch.randn(len(index), self.size, generator=generator)[part]
        return gradients @ model.weight[0]

    @property
    def scale(self) -> float:
        return self.size * self.spread**2 / (self.size * self.mean**2)


def fit_of(config: LoopConfig) -> Fit:
    torch.manual_seed(0)
    return Fit(Accelerator(cpu=True), Learner(nn.Linear(8, 1, bias=False)), config)


@pytest.mark.parametrize(
    ("spread", "batch", "accumulation"), [(0.5, 4, 1), (2.0, 4, 1), (3.0, 4, 1), (2.0, 1, 4), (3.0, 4, 4)]
)
def test_it_is_that_of_a_known_distribution(spread: float, batch: int, accumulation: int) -> None:
    """Also where every gradient is clipped: their norms are 1.4 and more, and the limit is 1."""
    fit, task = fit_of(replace(CONFIG, batch_size=batch, gradient_accumulation=accumulation)), Known(spread)
    fit.run(task, lambda progress: None)
    found = fit.noise.scale()
    assert not found.at_least
    assert found.pictures == pytest.approx(task.scale, rel=0.35)


def test_the_two_parts_are_without_bias() -> None:
    """Over many short runs the mean of what one window finds is the truth: tr(S) = 8 * 9, |G|^2 = 8 * 0.25."""
    random, signals, noises = torch.Generator().manual_seed(0), [], []
    p = nn.Parameter(torch.zeros(8))
    for _ in range(3000):
        noise = GradientNoise([p], batch=2, window=3)
        for _ in range(3):
            p.grad = (0.5 + 3 * torch.randn(2, 8, generator=random)).mean(0)
            noise.add(float(p.grad.norm()))
        signals.append(noise.last[-1][0])
        noises.append(noise.last[-1][1])
    for values, truth in ((signals, 2.0), (noises, 72.0)):
        found = torch.tensor(values, dtype=torch.float64)
        assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(len(values))
        assert found.std() / math.sqrt(len(values)) < 0.15 * truth


def test_a_signal_that_is_lost_gives_a_bound_alone() -> None:
    task = Known(5.0)
    task.mean = 0.0
    fit, history = fit_of(replace(CONFIG, steps=60)), []
    fit.run(task, history.append)
    found = fit.noise.scale()
    assert found.at_least and 4 < found.pictures < math.inf
    assert history[-1].noise_scale is None


def test_nothing_is_told_too_early_or_without_noise() -> None:
    fit, history = fit_of(replace(CONFIG, steps=45)), []
    fit.run(Known(0.5), history.append)
    known = [p.noise_scale is not None for p in history]
    assert known == [False] * 39 + [True] * 6
    still = fit_of(replace(CONFIG, steps=60))
    still.run(Known(0.0), lambda progress: None)
    found = still.noise.scale()  # none, or the rounding of fp32
    assert found is None or found.pictures < 1e-3


def test_it_goes_on_within_a_window_and_watching_changes_no_bit() -> None:
    config, task = replace(CONFIG, steps=67, learning_rate=0.01), Known(2.0)
    whole, blind, second, kept = fit_of(config), fit_of(config), fit_of(config), []
    blind.noise = None

    def keep(progress: Progress) -> None:
        if progress.step == 24:
            kept.append({k: v for k, v in whole.noise.state().items() if k != "sums"})
            kept.append([s.clone() for s in whole.noise.sums])

    whole.run(task, keep)
    blind.run(task, lambda progress: None)
    assert torch.equal(whole.trained[0], blind.trained[0])
    first = fit_of(replace(config, steps=67))
    first.config = replace(config, steps=24)
    first.run(task, lambda progress: None)
    assert all(torch.equal(a, b) for a, b in zip(first.noise.sums, kept[1], strict=True)) and kept[0]["count"] == 4
    second.restore(first.state())
    second.run(task, lambda progress: None)
    assert second.noise.last == whole.noise.last and second.noise.scale() == whole.noise.scale() is not None


def test_a_checkpoint_of_before_it_was_watched_is_read() -> None:
    fit = fit_of(replace(CONFIG, steps=12))
    fit.run(Known(1.0), lambda progress: None)
    state = {k: v for k, v in fit.state().items() if k != "noise"}
    again = fit_of(replace(CONFIG, steps=12))
    again.restore(state)
    assert again.step == 12 and again.noise.windows == 0


def test_steps_that_fp16_skips_do_not_count() -> None:
    p = nn.Parameter(torch.zeros(3))
    noise = GradientNoise([p], batch=1)
    p.grad = torch.full((3,), math.inf)
    noise.add(math.inf)
    assert noise.count == 0 and noise.sums[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("found", "averaged", "expected"),
    [
        (
            NoiseScale(190.0, False),
            False,
            ("as large as the signal in a step of about 190 pictures; these steps had 4.",),
        ),
        (
            NoiseScale(41234.0, True),
            False,
            ("a step of at least 41,000 pictures", "accumulation=16, ema_decay=0.99, or"),
        ),
        (NoiseScale(250.0, False), True, ("a step of about 250 pictures", "gradient_accumulation=16, or a")),
    ],
)
def test_the_remedy_is_told_where_a_step_is_far_too_small(
    found: NoiseScale, averaged: bool, expected: tuple[str, ...]
) -> None:
    lines = noise_lines(found, 4, 2, averaged, 0.001)
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines


def test_the_steep_beginning_is_forgotten() -> None:
    """Gradients a hundred times as large in the first windows; what is told later is of the later ones."""
    random, p = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(8))
    noise = GradientNoise([p], batch=4)
    for step in range(200):
        p.grad = (0.5 + 2 * torch.randn(4, 8, generator=random)).mean(0) if step >= 60 else torch.full((8,), 50.0)
        noise.add(float(p.grad.norm()))
    found = noise.scale()
    assert not found.at_least and found.pictures == pytest.approx(16, rel=0.35)
