"""How noisy the gradient is: the batch at which noise and signal are equal, from the gradients of the steps themselves.

The simple noise scale is B = tr(S) / |G|^2 with G the gradient over all pictures and S the covariance of the gradient of one
picture (arXiv 1812.06162, eq. 2.9). Far below it the direction of a step is mostly chance; far above it a larger batch
hardly helps. The squared norm of the gradient of b pictures is |G|^2 + tr(S) / b in the mean, so two batch sizes give both
without bias (appendix A.1): here one step, and the mean over a window of steps. The parameters move within a window, so what
the gradient changes in a few steps counts as noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WINDOW = 10
"""Steps of a window."""
FEWEST, MOST = 4, 10
"""Windows that are averaged: the later half of those so far, within these bounds; the gradient falls steeply at first."""
MOST_PARAMETERS = 50_000_000
"""Beyond these, as in full fine-tuning, the sum of gradients would take too much memory."""
FAR = 50.0
"""A batch is far below the noise scale when that is so many times as large."""
MOST_ACCUMULATION = 8
"""The most that is advised; each doubling doubles the time of a step."""


@dataclass(frozen=True)
class NoiseScale:
    """An estimate."""

    pictures: float
    """The noise scale, in pictures a step."""
    at_least: bool
    """Whether the signal is lost in the noise, so that `pictures` is the least that it may be (two standard errors)."""


class GradientNoise:
    """Watches the gradients of a run: one addition a step, in fp32; nothing of them is changed."""

    def __init__(self, parameters: Sequence[nn.Parameter], batch: int, window: int = WINDOW) -> None:
        """Nothing is seen yet.

        Args:
            parameters: what trains.
            batch: pictures of a step, on all processes together.
            window: steps of the larger batch, at least 2.
        """
        self.parameters, self.batch, self.window = list(parameters), batch, window
        self.sums = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.parameters]
        self.count, self.squares = 0, 0.0
        """Steps of this window so far, and the sum of their squared norms."""
        self.windows = 0
        self.last: list[tuple[float, float]] = []
        """|G|^2 and tr(S) of the last windows, at most `MOST`; each estimate may also be negative."""

    @torch.no_grad()
    def add(self, norm: float, factor: float = 1.0) -> None:
        """Takes the gradients of a step, before the optimizer has them.

        Args:
            norm: of the whole gradient before it was clipped.
            factor: by which the gradients that stand in the parameters are to be multiplied to undo the clipping.
        """
        if not math.isfinite(norm):  # a step that fp16's scaler skips
            return
        pairs = [(s, p.grad) for s, p in zip(self.sums, self.parameters, strict=True) if p.grad is not None]
        if pairs:
            sums, gradients = zip(*pairs, strict=True)
            torch._foreach_add_(sums, gradients, alpha=factor)
        self.count, self.squares = self.count + 1, self.squares + norm**2
        if self.count == self.window:
            self._close()

    def _close(self) -> None:
        """Ends a window."""
        k, b = self.window, self.batch
        small = self.squares / k
        large = float(torch.stack(torch._foreach_norm(self.sums)).cpu().double().square().sum()) / k**2
        signal = (k * large - small) / (k - 1)  # arXiv 1812.06162, eq. A.2, with batches of b and k * b
        noise = (small - large) / (1 / b - 1 / (k * b))  # eq. A.3
        self.last = [*self.last, (signal, noise)][-MOST:]
        self.windows += 1
        self.count, self.squares = 0, 0.0
        torch._foreach_zero_(self.sums)

    def scale(self) -> NoiseScale | None:
        """What is known up to now; None while it is too little, or without any noise."""
        if self.windows < FEWEST:
            return None
        signals, noises = zip(*self.last[-max(FEWEST, self.windows // 2) :], strict=True)
        signal, noise = statistics.fmean(signals), statistics.fmean(noises)
        if noise <= 0:
            return None
        error = statistics.stdev(signals) / math.sqrt(len(signals))
        if signal > 2 * error:
            return NoiseScale(noise / signal, False)
        most = max(signal, 0.0) + 2 * error
        if not most or noise / most < self.batch:  # a bound that tells nothing
            return None
        return NoiseScale(noise / most, True)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "sums": self.sums if self.count else [],
            "count": self.count,
            "squares": self.squares,
            "windows": self.windows,
            "last": self.last,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        torch._foreach_zero_(self.sums)
        for own, kept in zip(self.sums, state["sums"], strict=False):  # none at the end of a window
            own.copy_(kept)
        self.count, self.squares = int(state["count"]), float(state["squares"])
        self.windows, self.last = int(state["windows"]), [(float(s), float(n)) for s, n in state["last"]]


def noise_lines(found: NoiseScale, batch: int, accumulation: int, averaged: bool, rate: float) -> tuple[str, ...]:
    """What a person is told: the noise scale, and what helps where a step is far below it.

    Args:
        found: the estimate.
        batch: pictures of a step, on all processes together.
        accumulation: forward passes of a step on a process.
        averaged: whether a running average is kept already.
        rate: the learning rate.

    >>> for line in noise_lines(NoiseScale(412.3, False), 4, 1, False, 1e-4): print(line)
    Gradient noise: as large as the signal in a step of about 410 pictures; these steps had 4.
    Warning: a step this small goes mostly where chance leads it. Steadier: gradient_accumulation=8, ema_decay=0.99, or a learning_rate below 0.0001.
    >>> noise_lines(NoiseScale(20, False), 4, 1, False, 1e-4)
    ('Gradient noise: as large as the signal in a step of about 20 pictures; these steps had 4.',)
    """  # noqa: E501
    about = f"{'at least ' if found.at_least else 'about '}{float(f'{found.pictures:.2g}'):,g}"
    line = f"Gradient noise: as large as the signal in a step of {about} pictures; these steps had {batch}."
    if found.pictures < FAR * batch:
        return (line,)
    larger = accumulation * min(MOST_ACCUMULATION, 2 ** math.floor(math.log2(found.pictures / batch)))
    average = "" if averaged else "ema_decay=0.99, "
    return line, (
        "Warning: a step this small goes mostly where chance leads it. Steadier: "
        f"gradient_accumulation={larger}, {average}or a learning_rate below {rate:g}."
    )
