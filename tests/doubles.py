"""Stand-ins that several tests share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from visionlora.report.listener import Listener


class Ears(Listener):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


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
