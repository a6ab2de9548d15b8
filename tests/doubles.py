"""Stand-ins that several tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.vision import open_backbone
from visionlora.report.listener import Listener
from visionlora.training.loop import Fit, NotFinite


class Ears(Listener):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def not_finite_after(steps: int, rate: float, until: float = math.inf) -> Callable[..., tuple[float, float]]:
    """In place of `Fit.advance`: above this learning rate the loss is NaN after so many steps, until so many are done."""
    advance = Fit.advance

    def broken(self: Fit, task: Any, scheduled: float) -> tuple[float, float]:
        if steps <= self.step < until and self.config.learning_rate > rate:
            raise NotFinite("loss", math.nan, self.step + 1, scheduled)
        return advance(self, task, scheduled)

    return broken


class Learner:
    """All parameters of a model; those named in `fast` learn at 16 times the rate."""

    def __init__(self, model: nn.Module, fast: Iterable[str] = ()) -> None:
        self.model, self.fast = model, tuple(fast)
        self.told: list[tuple[int, int, bool]] = []
        """Step, steps, and whether there were gradients, at the end of each step."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        named = dict(self.model.named_parameters())
        slow = {"params": [p for n, p in named.items() if n not in self.fast], "lr": lr, "weight_decay": weight_decay}
        fast = {"params": [named[n] for n in self.fast], "lr": 16 * lr, "weight_decay": weight_decay}
        return [group for group in (slow, fast) if group["params"]]

    def regularisation(self) -> None:
        return None

    def after_step(self, step: int, steps: int) -> None:
        self.told.append((step, steps, all(p.grad is not None for p in self.model.parameters())))

    def training_state(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(state[n])


def adapter_of(folder: Path, classes: tuple[str, ...], seed: int = 0, method: str = "lora", **info: Any) -> Adapter:
    """A classifier adapter with random factors and head."""
    backbone = open_backbone(str(folder))
    fingerprints = backbone.fingerprints()
    backbone.new_head(len(classes), seed)
    config = AdapterConfig(method=method, rank=2, targets="attn.qv", train=backbone.head)
    handle = inject(backbone.model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    about = {
        "classes": list(classes), "multi_label": False, "preprocessing": backbone.preprocessing.to_dict(),
        "temperature": 1.5, "head": backbone.head, **info,
    }  # fmt: skip
    base = {"id": str(folder), "fingerprints": fingerprints}
    return Adapter(handle.modules("model"), {"base": base, "classifier": about})


LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def environment_of(rank: int, processes: int = 2) -> dict[str, str]:
    """What the environment of one process of a launch says."""
    return dict(zip(LAUNCH, map(str, (rank, rank, processes)), strict=True))


def become_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Makes this process one of two of a launch."""
    for name, value in environment_of(rank).items():
        monkeypatch.setenv(name, value)
