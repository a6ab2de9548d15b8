"""Every optimizer: it learns, groups keep their rates, and what it averages is what is taken."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.config import OPTIMIZERS, ClassifyConfig, TrainSDConfig
from visionlora.config.choices import installed
from visionlora.data.groups import Group
from visionlora.training.loop import Fit, LoopConfig
from visionlora.training.optimizers import BUILDERS, as_evaluated, build_optimizer
from visionlora.training.settings import loop_config, suited, suited_rate

from ...doubles import Learner

CONFIG = LoopConfig(steps=40, batch_size=8, gradient_accumulation=1, learning_rate=0.02, warmup_steps=2,
                    weight_decay=0.0, max_grad_norm=1e9, seed=0, schedule="constant")  # fmt: skip
WORDS = [word for word, found in OPTIMIZERS.items() if found.package is None or installed(found.package)]


class Plane:
    """A linear map, to be found from noisy values."""

    groups = (Group(tuple(range(64)), 64),)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        x = torch.randn(len(index), 6, generator=generator)[part]
        return (model(x) - x.sum(1, keepdim=True)).square().mean(1)


def configured(optimizer: str, **more: object) -> LoopConfig:
    return replace(CONFIG, optimizer=optimizer, learning_rate=suited_rate(CONFIG.learning_rate, optimizer), **more)


def fitted(config: LoopConfig, learner: Learner) -> tuple[Fit, list[float]]:
    losses: list[float] = []
    fit = Fit(Accelerator(cpu=True), learner, config)
    fit.run(Plane(), lambda progress: losses.append(progress.loss))
    return fit, losses


def test_every_word_has_a_builder() -> None:
    assert list(BUILDERS) == list(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", WORDS)
def test_it_learns(optimizer: str) -> None:
    torch.manual_seed(0)
    slow = ("prodigy", "lion", "schedulefree")  # has to find its rate, takes small steps, remembers the start
    steps = 400 if optimizer in slow else 150
    fit, losses = fitted(configured(optimizer, steps=steps), Learner(nn.Linear(6, 1)))
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    with fit.averaged():
        assert torch.allclose(fit.learner.model.weight, torch.ones(1, 6), atol=0.3)


@pytest.mark.parametrize("optimizer", WORDS)
def test_a_group_of_sixteen_times_the_rate_moves_sixteen_times_as_far(optimizer: str) -> None:
    """Two parameters with the same gradients, whose distances differ by their rates alone."""
    one, other = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    config = configured(optimizer)
    built = build_optimizer(
        [{"params": [one], "lr": config.learning_rate}, {"params": [other], "lr": 16 * config.learning_rate}], config
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        gradient = torch.randn(4, 4, generator=random) + 1
        one.grad, other.grad = gradient.clone(), gradient.clone()
        built.step()
    assert one.abs().min() > 0
    ratio = (other / one).detach()
    assert torch.allclose(ratio, torch.full((4, 4), 16.0), rtol=1e-4), ratio


def test_adamw_is_torchs_to_the_bit() -> None:
    def trained(build) -> Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = build([{"params": [p], "lr": 0.02, "weight_decay": 0.1}])
        for step in range(20):
            p.grad = torch.sin(p.detach() * 9 + step)
            optimizer.step()
        return p.detach()

    ours = trained(lambda groups: build_optimizer(groups, CONFIG))
    assert torch.equal(ours, trained(lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0, fused=True)))
    other = trained(lambda groups: build_optimizer(groups, replace(CONFIG, betas=(0.5, 0.9))))
    assert torch.equal(other, trained(lambda groups: torch.optim.AdamW(groups, betas=(0.5, 0.9), fused=True)))


def test_prodigy_with_rates_of_its_own_is_prodigy_on_rescaled_parameters() -> None:
    from prodigyopt import Prodigy

    torch.manual_seed(0)
    start, target, factors = torch.randn(2, 5), torch.randn(2, 5), (1.0, 4.0)
    config = configured("prodigy")
    ours = [nn.Parameter(row.clone()) for row in start]
    built = build_optimizer([{"params": [p], "lr": f} for p, f in zip(ours, factors, strict=True)], config)
    scaled = [nn.Parameter(row / f) for row, f in zip(start, factors, strict=True)]
    reference = Prodigy(scaled, use_bias_correction=True, safeguard_warmup=True)
    for _ in range(200):
        for parameters, by, optimizer in ((ours, (1.0, 1.0), built), (scaled, factors, reference)):
            optimizer.zero_grad()
            sum(((p * f - t) ** 2).sum() for p, f, t in zip(parameters, by, target, strict=True)).backward()
            optimizer.step()
    assert built.param_groups[0]["d"] == pytest.approx(reference.param_groups[0]["d"], rel=1e-4)
    assert built.param_groups[0]["d"] > 1e-3
    for p, q, f in zip(ours, scaled, factors, strict=True):
        assert torch.allclose(p, q * f, rtol=1e-3, atol=1e-4)


def test_the_rate_that_prodigy_has_found_is_told() -> None:
    torch.manual_seed(0)
    config = replace(configured("prodigy", steps=200), learning_rate=0.5)
    fit, told = Fit(Accelerator(cpu=True), Learner(nn.Linear(6, 1)), config), []
    fit.run(Plane(), lambda progress: told.append(progress.learning_rate))
    assert told[-1] == pytest.approx(0.5 * fit.optimizer.param_groups[0]["d"])
    assert 0 < told[0] < 1e-5 < told[-1]


def test_schedulefree_shows_its_average_and_trains_on_as_before() -> None:
    torch.manual_seed(0)
    fit, _ = fitted(configured("schedulefree", steps=5), Learner(nn.Linear(6, 64)))  # enough for its way back to round
    trained_at = [p.detach().clone() for p in fit.trained]
    with fit.averaged():
        shown = [p.detach().clone() for p in fit.trained]
        assert not fit.optimizer.param_groups[0]["train_mode"]
    beta = fit.optimizer.param_groups[0]["betas"][0]
    for y, x, p in zip(trained_at, shown, fit.trained, strict=True):
        z = fit.optimizer.state[p]["z"]
        assert torch.allclose(y, beta * x + (1 - beta) * z, atol=1e-6)  # arXiv 2405.15682, eq. 1
        assert not torch.equal(y, x) and torch.equal(p.detach(), y)
    assert fit.optimizer.param_groups[0]["train_mode"]


def test_an_error_while_it_is_looked_at_leaves_it_in_training() -> None:
    torch.manual_seed(0)
    fit, _ = fitted(configured("schedulefree"), Learner(nn.Linear(6, 1)))
    before = [p.detach().clone() for p in fit.trained]
    with pytest.raises(KeyboardInterrupt), as_evaluated(fit.optimizer, fit.trained):
        raise KeyboardInterrupt
    assert fit.optimizer.param_groups[0]["train_mode"]
    assert all(torch.equal(p.detach(), kept) for p, kept in zip(fit.trained, before, strict=True))


@pytest.mark.parametrize(
    ("given", "filled", "note"),
    [
        ({}, {"learning_rate": 1e-3, "schedule": "cosine", "steps": 9}, ""),
        (
            {"optimizer": "prodigy"},
            {"learning_rate": 1.0, "schedule": "constant"},
            "Optimizer prodigy, schedule constant, learning_rate 1 (a factor on the rate that it finds itself).",
        ),
        (
            {"optimizer": "prodigy", "learning_rate": 0.5, "schedule": "cosine"},
            {"learning_rate": 0.5, "schedule": "cosine"},
            "Optimizer prodigy, schedule cosine.",
        ),
        (
            {"optimizer": "lion"},
            {"learning_rate": 2e-4, "schedule": "cosine"},
            "Optimizer lion, schedule cosine, learning_rate 0.0002 (0.2 of what suits adamw).",
        ),
        (
            {"optimizer": "schedulefree", "steps": 5},
            {"schedule": "constant", "steps": 5},
            "Optimizer schedulefree, schedule constant, learning_rate 0.001 (what suits adamw).",
        ),
    ],
)
def test_what_is_left_open_suits_the_optimizer(given: dict, filled: dict, note: str) -> None:
    config, notes = suited(TrainSDConfig(images="x", **given), {"learning_rate": 1e-3, "steps": 9, "batch_size": 2})
    assert {name: getattr(config, name) for name in filled} == pytest.approx(filled)
    assert notes == ((note,) if note else ())
    assert loop_config(config).schedule == config.schedule


def test_both_rates_of_a_classifier_are_turned_and_open_schedules_resolved() -> None:
    config, _ = suited(
        ClassifyConfig(images="x", optimizer="prodigy", steps=3, batch_size=1),
        {"learning_rate": 1e-2, "head_learning_rate": 1e-3},
    )
    assert (config.learning_rate, config.head_learning_rate) == (1.0, 1.0)
    assert loop_config(replace(config, schedule=None)).schedule == "constant"
