"""The linear probe finds the optimum of its problem."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visionlora.vision.probe import DECAYS, fit_one, fit_probe
from visionlora.vision.task import Objective


def clouds(n: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    centres = torch.randn(3, 5, generator=generator) * 2
    return centres[labels] + torch.randn(n, 5, generator=generator) + 7.0, F.one_hot(labels, 3).float()


def test_it_separates_what_can_be_separated_in_the_units_of_the_features() -> None:
    x, targets = clouds()
    probe = fit_probe(
        x, targets, Objective(), lambda logits: float((logits(x).argmax(1) == targets.argmax(1)).float().mean())
    )
    assert (probe.logits(x).argmax(1) == targets.argmax(1)).float().mean() > 0.9


def test_it_is_scikit_learns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, targets = clouds()
    x = (x - x.mean(0)) / x.std(0)
    weight, bias = fit_one(x, targets, Objective(), 0.01, None)
    theirs = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=2000)
    theirs.fit(x.numpy(), targets.argmax(1).numpy())
    ours = (x @ weight.t() + bias).log_softmax(1).numpy()
    assert np.abs(np.exp(ours) - theirs.predict_proba(x.numpy())).max() < 5e-4


@pytest.mark.parametrize(("best", "smoothing", "decay"), [(2, 0.0, 1e-2), (8, 0.0, 1e-3), (4, 0.3, 1e-4)])
def test_the_score_chooses_strength_and_smoothing(best: int, smoothing: float, decay: float) -> None:
    x, targets = clouds(30)
    norms: list[float] = []

    def score(logits) -> float:
        norms.append(float(logits(torch.eye(5)).sub(logits(torch.zeros(1, 5))).norm()))
        return -abs(len(norms) - best)

    probe = fit_probe(x, targets, Objective(label_smoothing=smoothing), score)
    strengths = len(DECAYS)
    assert norms[:strengths] == sorted(norms[:strengths])  # weaker and weaker decay
    assert norms[strengths:] == sorted(norms[strengths:]) and probe.decay == decay
    assert len(norms) == (strengths if smoothing else 2 * strengths), (
        "what smooths more than enough is not fitted twice"
    )
    if not smoothing:
        assert norms[-1] < norms[strengths - 1], "smoothed targets ask for no endless confidence"
