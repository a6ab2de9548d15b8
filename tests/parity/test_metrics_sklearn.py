"""Every figure that scikit-learn has too is the same."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionlora.vision.metrics import confusion_matrix, evaluate, evaluate_multi_label, softmax

sk = pytest.importorskip("sklearn.metrics")


def close(found: object, expected: object) -> bool:
    return bool(np.allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-12))


def names(c: int) -> list[str]:
    return [f"class {i}" for i in range(c)]


@st.composite
def single(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]:
    """Logits, labels and classes; some classes have no picture, some are never predicted."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, c = draw(st.integers(1, 60)), draw(st.integers(2, 12))
    present = rng.choice(c, size=draw(st.integers(1, c)), replace=False)
    labels = rng.choice(present, size=n)
    logits = rng.normal(size=(n, c)) + draw(st.floats(0, 4)) * np.eye(c)[labels]
    logits[:, rng.random(c) < 0.2] -= 6.0
    return logits, labels, c


@given(single())
@settings(max_examples=60)
def test_single_label(data: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]) -> None:
    logits, labels, c = data
    predicted, every = logits.argmax(axis=1), list(range(c))
    found = evaluate(logits, labels, names(c))
    assert close(found.top1, sk.accuracy_score(labels, predicted))
    assert close(found.macro_f1, sk.f1_score(labels, predicted, average="macro", zero_division=0.0))
    # balanced_accuracy_score warns about classes that are predicted but have no picture; recall_score is its definition
    present = sorted(set(labels.tolist()))
    recalls = sk.recall_score(labels, predicted, labels=present, average="macro", zero_division=0.0)
    assert close(found.balanced_accuracy, recalls)
    if set(predicted.tolist()) <= set(present) and len(present) > 1:
        assert close(found.balanced_accuracy, sk.balanced_accuracy_score(labels, predicted))
    assert close(found.confusion, sk.confusion_matrix(labels, predicted, labels=every))
    assert close(confusion_matrix(labels, predicted, c), found.confusion)
    rows = sk.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)
    for field, expected in zip(("precision", "recall", "f1", "pictures"), rows, strict=True):
        assert close([getattr(row, field) for row in found.per_class], expected), field
    assert close(found.loss, sk.log_loss(labels, softmax(logits), labels=every))
    if c > 5:
        assert found.top5 is not None
        assert close(found.top5, sk.top_k_accuracy_score(labels, logits, k=5, labels=every))


@st.composite
def several(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]:
    """Logits, targets and classes; some classes have no positive, some scores are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, c = draw(st.integers(1, 60)), draw(st.integers(2, 9))
    targets = (rng.random((n, c)) < rng.random(c) * (rng.random(c) > 0.2)).astype(np.int64)
    logits = rng.normal(size=(n, c)) + draw(st.floats(0, 3)) * (targets - 0.5)
    return logits.round(draw(st.integers(0, 6))), targets, c


@given(several())
@settings(max_examples=60)
def test_multi_label(data: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]) -> None:
    logits, targets, c = data
    predicted = (logits > 0).astype(int)
    found = evaluate_multi_label(logits, targets, names(c))
    assert close(found.micro_f1, sk.f1_score(targets, predicted, average="micro", zero_division=0.0))
    occurring = [i for i in range(c) if targets[:, i].any() or predicted[:, i].any()]
    if occurring:
        macro = sk.f1_score(targets, predicted, labels=occurring, average="macro", zero_division=0.0)
        assert close(found.macro_f1, macro)
    rows = sk.precision_recall_fscore_support(targets, predicted, zero_division=0.0)
    for field, expected in zip(("precision", "recall", "f1", "positives"), rows, strict=True):
        assert close([getattr(row, field) for row in found.per_class], expected), field
    positive = [i for i in range(c) if targets[:, i].any()]
    expected = [sk.average_precision_score(targets[:, i], logits[:, i]) for i in positive]
    assert close([found.per_class[i].average_precision for i in positive], expected)
    if positive:
        mean = sk.average_precision_score(targets[:, positive], logits[:, positive], average="macro")
        assert close(found.mean_average_precision, mean)
    assert close(found.subset_accuracy, sk.accuracy_score(targets, predicted))
    yes = 1 / (1 + np.exp(-logits))
    losses = [sk.log_loss(targets[:, i], yes[:, i], labels=[0, 1]) for i in range(c)]
    assert close(found.loss, np.mean(losses))
