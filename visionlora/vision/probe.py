"""The linear probe: logistic regression on the features of the frozen backbone, the baseline that an adapter must beat.

It is fitted to the optimum with a few strengths of decay, with and without label smoothing, of which the validation
pictures choose; so it is also a good start of the head (linear probing, then fine-tuning: arXiv 2202.10054).
Letters in shapes: n pictures, d features, c classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visionlora.vision.task import Objective

DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of half the squared norm, for features of unit spread and the mean loss."""
SMOOTHING = 0.1
"""The least label smoothing of the smoothed fits: it keeps pictures that are classified well from being ignored, which on
features that were learned for something else can tell classes apart far better."""
ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """A head for features as the backbone gives them."""

    weight: Tensor
    """(c, d)."""
    bias: Tensor
    """(c,)."""
    decay: float
    """The strength that was chosen."""

    def logits(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, c)."""
        return torch.nn.functional.linear(features, self.weight, self.bias)


def fit_probe(
    features: Tensor, targets: Tensor, objective: Objective, score: Callable[[Callable[[Tensor], Tensor]], float]
) -> Probe:
    """The best of several strengths of decay, with the objective's label smoothing and with `SMOOTHING` at least.

    Args:
        features: of the training pictures, (n, d).
        targets: (n, c).
        objective: the loss.
        score: from a function of features to logits to its score on the validation pictures, larger is better.
    """
    best: tuple[float, Probe] | None = None
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    own = objective.label_smoothing
    for smoothing in dict.fromkeys((own, max(own, SMOOTHING))):
        fitted = replace(objective, label_smoothing=smoothing)
        start: tuple[Tensor, Tensor] | None = None
        for decay in sorted(DECAYS, reverse=True):  # from the smoothest; each starts where the last one ended
            start = fit_one((features - mean) / std, targets, fitted, decay, start)
            weight = start[0] / std
            probe = Probe(weight, start[1] - weight @ mean, decay)
            found = score(probe.logits)
            if best is None or found > best[0]:
                best = found, probe
    assert best is not None
    return best[1]


def fit_one(
    x: Tensor, targets: Tensor, objective: Objective, decay: float, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias at the minimum for one strength of decay."""
    c, d = targets.shape[1], x.shape[1]
    weight, bias = (torch.zeros(c, d), torch.zeros(c)) if start is None else (t.clone() for t in start)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.nn.functional.linear(x, weight, bias)
        loss = objective.losses(logits, targets).mean() + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
