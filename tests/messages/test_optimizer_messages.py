"""What is said about optimizers, schedules and trackers that cannot be used, before anything is read or written."""

import importlib.util
from pathlib import Path

import pytest

from visionlora.config import ClassifyConfig, TrainSDConfig
from visionlora.errors import ConfigError


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


CASES = {
    "unknown": ({"optimizer": "prodigi"}, "optimizer is 'prodigi'; Did you mean 'prodigy'?"),
    "far away": (
        {"optimizer": "zzz"},
        "optimizer is 'zzz'; Allowed: adafactor, adamw, adamw8bit, lion, prodigy, schedulefree, sgd.",
    ),
    "prodigy": (
        {"optimizer": "prodigy"},
        "optimizer is 'prodigy'; it needs the package prodigyopt, which is not installed: "
        "pip install 'visionlora[optimizers]'",
    ),
    "lion": (
        {"optimizer": "lion"},
        "optimizer is 'lion'; it needs the package lion_pytorch, which is not installed: "
        "pip install 'visionlora[optimizers]'",
    ),
    "schedulefree": (
        {"optimizer": "schedulefree"},
        "optimizer is 'schedulefree'; it needs the package schedulefree, which is not installed: "
        "pip install 'visionlora[optimizers]'",
    ),
    "trackers": (
        {"trackers": ("tensorboard", "wandb")},
        "trackers is ('tensorboard', 'wandb'); tensorboard and wandb must be installed first: "
        "pip install 'visionlora[tracking]'",
    ),
    "unknown tracker": ({"trackers": ("tensorbord",)}, "trackers is ('tensorbord',); Did you mean 'tensorboard'?"),
    "schedule": ({"schedule": "cosin"}, "schedule is 'cosin'; Did you mean 'cosine'?"),
    "cycles": ({"schedule_cycles": 0}, "schedule_cycles is 0; it must be at least 1"),
    "power": ({"schedule_power": 0.0}, "schedule_power is 0.0; it must be positive"),
    "one beta": ({"betas": (0.9,)}, "betas is (0.9,); adamw takes two numbers, at least 0 and below 1"),
    "large beta": ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); adamw takes two numbers, at least 0 and below 1"),
    "momenta": ({"optimizer": "sgd", "betas": (0.9, 0.9)}, "betas is (0.9, 0.9); sgd takes one number, at least 0 and"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [TrainSDConfig, ClassifyConfig])
def test_every_problem_names_what_to_do(case: str, kind: type, bare: None) -> None:
    settings, expected = CASES[case]
    with pytest.raises(ConfigError) as caught:
        kind(images="x", **settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"- {expected}"), lines


def test_eight_bits_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for kind in (torch.cuda, torch.xpu):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"adamw8bit'; its 8-bit states save memory of a GPU, and none is found here: take"
    ):
        TrainSDConfig(images="x", optimizer="adamw8bit")


def test_eight_bits_on_a_gpu_without_the_package(monkeypatch: pytest.MonkeyPatch, bare: None) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"package bitsandbytes.*pip install 'visionlora\[quantised\]'"):
        TrainSDConfig(images="x", optimizer="adamw8bit")


PAIRS = {
    "adalora": ({"method": "adalora"}, "adalora prunes what this one averages; take another optimizer"),
    "average": ({"ema_decay": 0.99}, "schedulefree keeps an average of its own: leave ema_decay out"),
    "no first beta": ({"betas": (0.0, 0.9)}, "schedulefree takes two numbers, at least 0.001 and below 1"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_does_not_go_with_schedulefree(case: str) -> None:
    settings, expected = PAIRS[case]
    with pytest.raises(ConfigError) as caught:
        TrainSDConfig(images="x", optimizer="schedulefree", **settings)
    assert expected in str(caught.value)


def test_prodigy_needs_no_search_for_a_rate() -> None:
    with pytest.raises(ConfigError, match="prodigy finds the rate itself: leave one of them out"):
        ClassifyConfig(images="x", optimizer="prodigy", find_rate=True)


@pytest.mark.parametrize("verb", ["train-sd", "classify"])
def test_the_command_refuses_before_it_reads_a_picture(verb: str, cli, tmp_path: Path) -> None:
    code, out, err = cli(verb, "--images", tmp_path / "nowhere", "--optimizer", "adamv")
    assert code == 2 and "optimizer is 'adamv'; Did you mean 'adamw'?" in err, (out, err)
    assert not list(tmp_path.iterdir())
