"""Measures a classifier: logits and labels -> figures with their uncertainty, reliability bins and a temperature.

In: logits (n, c) and labels (n,), or targets (n, c) of 0 and 1 for pictures with several labels. Out: plain numbers.
Letters in shapes: n pictures, c classes.

All is computed in float64. Names and edge cases are scikit-learn's, and tests compare them; what a class without pictures
would make undefined is 0 in its row and does not count in means over the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from visionlora.errors import ConfigError, DataError, TrainingError, nearest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SINGLE_LABEL_SCORES = ("top1", "macro_f1", "balanced_accuracy", "loss")
"""What `score` knows about pictures with one label each."""
MULTI_LABEL_SCORES = ("map", "micro_f1", "macro_f1", "loss")
"""What `score` knows about pictures with several labels."""
Z_95 = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""
COLDEST, HOTTEST = 0.05, 20.0
"""Range of the temperature; a reciprocal pair, so it is symmetric on a log scale."""
MOST_STEPS = 100
"""Of the search for the temperature; it takes about ten."""


@dataclass(frozen=True)
class ClassRow:
    """How one class fares among pictures with one label each."""

    name: str
    pictures: int
    precision: float
    recall: float
    f1: float
    low: float
    """Lower end of the recall's 95 % interval (Wilson)."""
    high: float
    """Upper end of the recall's 95 % interval (Wilson)."""


@dataclass(frozen=True)
class Metrics:
    """Figures for pictures with one label each."""

    top1: float
    """Share of the pictures whose likeliest class is right: accuracy."""
    top5: float | None
    """Share of the pictures whose class is among the five likeliest; None up to 5 classes, where it says nothing."""
    macro_f1: float
    """Mean F1 of the classes that occur in the labels or the predictions."""
    balanced_accuracy: float
    """Mean recall of the classes that have pictures."""
    loss: float
    """Mean negative log-likelihood, nats."""
    ece: float
    """Expected calibration error, 15 bins."""
    pictures: int
    top1_low: float
    """Lower end of the 95 % interval of top1 (Wilson)."""
    top1_high: float
    """Upper end of the 95 % interval of top1 (Wilson)."""
    per_class: tuple[ClassRow, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Pictures by true class (row) and predicted class (column)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return asdict(self) | {
            "per_class": [asdict(row) for row in self.per_class],
            "confusion": [list(row) for row in self.confusion],
        }


@dataclass(frozen=True)
class LabelRow:
    """How one class fares among pictures with several labels."""

    name: str
    positives: int
    """Pictures that have this label."""
    precision: float
    recall: float
    f1: float
    average_precision: float
    """Area below the precision-recall curve; 0 without positives."""
    low: float
    """Lower end of the recall's 95 % interval (Wilson)."""
    high: float
    """Upper end of the recall's 95 % interval (Wilson)."""


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Figures for pictures with several labels; a label is given when its probability is above 0.5."""

    micro_f1: float
    """F1 over all pairs of picture and class."""
    macro_f1: float
    """Mean F1 of the classes that occur in the targets or the predictions."""
    mean_average_precision: float
    """Mean average precision of the classes that have positives."""
    subset_accuracy: float
    """Share of the pictures all labels of which are right."""
    loss: float
    """Mean binary cross-entropy over pictures and classes, nats."""
    pictures: int
    per_class: tuple[LabelRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return asdict(self) | {"per_class": [asdict(row) for row in self.per_class]}


AnyMetrics = Metrics | MultiLabelMetrics


@dataclass(frozen=True)
class Bin:
    """Pictures whose likeliest class has a probability in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean probability of the likeliest class; 0 in an empty bin."""
    accuracy: float
    """Share that is right; 0 in an empty bin."""


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Probabilities (n, c) of logits (n, c).

    >>> softmax([[1000.0, 1000.0]]).tolist()
    [[0.5, 0.5]]
    """
    return np.asarray(np.exp(_log_softmax(_finite(logits) / temperature)))


def confusion_matrix(labels: npt.ArrayLike, predicted: npt.ArrayLike, c: int) -> Ints:
    """Pictures (c, c) by true class (row) and predicted class (column).

    >>> confusion_matrix([0, 0, 1], [0, 1, 1], 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = _labels(labels, c) * c + _labels(predicted, c)
    return np.bincount(pairs, minlength=c * c).reshape(c, c).astype(np.int64)


def evaluate(logits: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str], temperature: float = 1.0) -> Metrics:
    """Measures predictions for pictures with one label each.

    Args:
        logits: (n, c), before the softmax.
        labels: (n,), the true class of each picture.
        classes: c names.
        temperature: the logits are divided by it; it moves the loss and the calibration, never a prediction.

    Raises:
        DataError: there is no picture.
        TrainingError: a logit is not finite.
    """
    scores, truth = _single(logits, labels, classes)
    predicted = scores.argmax(axis=1)
    confusion = confusion_matrix(truth, predicted, len(classes))
    hits, actual, given = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall, f1 = _precision_recall_f1(hits, actual, given)
    right, n = int(hits.sum()), len(truth)
    low, high = wilson(right, n)
    return Metrics(
        top1=right / n,
        top5=_top_k(scores, truth, 5) if len(classes) > 5 else None,
        macro_f1=float(f1[actual + given > 0].mean()),
        balanced_accuracy=float(recall[actual > 0].mean()),
        loss=_nll(scores, truth, temperature),
        ece=expected_calibration_error(scores, truth, temperature),
        pictures=n,
        top1_low=low,
        top1_high=high,
        per_class=tuple(
            ClassRow(name, int(actual[i]), float(precision[i]), float(recall[i]), float(f1[i]), *wilson(*counts))
            for i, (name, *counts) in enumerate(zip(classes, hits.tolist(), actual.tolist(), strict=True))
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def evaluate_multi_label(
    logits: npt.ArrayLike, targets: npt.ArrayLike, classes: Sequence[str], temperature: float = 1.0
) -> MultiLabelMetrics:
    """Measures predictions for pictures with several labels.

    Args:
        logits: (n, c), before the sigmoid.
        targets: (n, c) of 0 and 1.
        classes: c names.
        temperature: the logits are divided by it; it moves the loss, never a prediction.

    Raises:
        DataError: there is no picture.
        TrainingError: a logit is not finite.
    """
    scores, truth = _multi(logits, targets, classes)
    predicted = scores > 0  # the sigmoid is above 0.5
    hits, actual, given = (predicted & truth).sum(axis=0), truth.sum(axis=0), predicted.sum(axis=0)
    precision, recall, f1 = _precision_recall_f1(hits, actual, given)
    occurring = actual + given > 0
    found = np.array([_average_precision(scores[:, i], truth[:, i]) for i in range(len(classes))])
    return MultiLabelMetrics(
        micro_f1=float(_precision_recall_f1(hits.sum(), actual.sum(), given.sum())[2]),
        macro_f1=float(f1[occurring].mean()) if occurring.any() else 0.0,
        mean_average_precision=float(found[actual > 0].mean()) if actual.any() else 0.0,
        subset_accuracy=float((predicted == truth).all(axis=1).mean()),
        loss=_binary_nll(scores, truth, temperature),
        pictures=len(truth),
        per_class=tuple(
            LabelRow(
                name,
                int(actual[i]),
                float(precision[i]),
                float(recall[i]),
                float(f1[i]),
                float(found[i]),
                *wilson(*counts),
            )
            for i, (name, *counts) in enumerate(zip(classes, hits.tolist(), actual.tolist(), strict=True))
        ),
    )


def check_score(name: str, several: bool) -> None:
    """Raises ConfigError where no figure of this name is known of pictures with one label, or with several, each."""
    allowed, others = (
        (MULTI_LABEL_SCORES, SINGLE_LABEL_SCORES) if several else (SINGLE_LABEL_SCORES, MULTI_LABEL_SCORES)
    )
    if name not in allowed:
        kind = "pictures with several labels" if several else "pictures with one label each"
        what = f"{name!r} does not apply to {kind}." if name in others else f"There is no metric {name!r} for {kind}."
        raise ConfigError(f"{what} {nearest(name, allowed)}")


def score(metrics: Metrics | MultiLabelMetrics, name: str) -> float:
    """The figure that a run is chosen by; larger is better, so the loss is negated.

    Args:
        metrics: of either kind.
        name: one of `SINGLE_LABEL_SCORES` or `MULTI_LABEL_SCORES`.

    Raises:
        ConfigError: the name is unknown, or means nothing for this kind of labels.
    """
    check_score(name, isinstance(metrics, MultiLabelMetrics))
    value = float(getattr(metrics, "mean_average_precision" if name == "map" else name))
    return -value if name == "loss" else value


def reliability(
    logits: npt.ArrayLike, labels: npt.ArrayLike, temperature: float = 1.0, bins: int = 15
) -> tuple[Bin, ...]:
    """How often a prediction is right, by how sure it is: bins of equal width from 0 to 1 (arXiv 1706.04599, section 2).

    Args:
        logits: (n, c), before the softmax.
        labels: (n,), the true class of each picture.
        temperature: the logits are divided by it.
        bins: how many.
    """
    scores, truth = _single(logits, labels)
    confidence = softmax(scores, temperature).max(axis=1)
    right = scores.argmax(axis=1) == truth
    edges = np.arange(bins + 1) / bins
    places = np.digitize(confidence, edges[1:-1], right=True)  # low < confidence <= high
    counts = np.bincount(places, minlength=bins)
    mean_confidence = _ratio(np.bincount(places, confidence, bins), counts)
    accuracy = _ratio(np.bincount(places, right, bins), counts)
    return tuple(
        Bin(float(edges[i]), float(edges[i + 1]), int(counts[i]), float(mean_confidence[i]), float(accuracy[i]))
        for i in range(bins)
    )


def expected_calibration_error(
    logits: npt.ArrayLike, labels: npt.ArrayLike, temperature: float = 1.0, bins: int = 15
) -> float:
    """Mean distance between confidence and accuracy over the bins, by their pictures (arXiv 1706.04599, eq. 3)."""
    found = reliability(logits, labels, temperature, bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in found) / sum(b.count for b in found)


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike, multi_label: bool = False) -> float:
    """The temperature T with the smallest negative log-likelihood of logits / T (arXiv 1706.04599, section 4.2).

    Each label counts as certain to (n + 1) / (n + 2) alone, as in Platt's scaling (1999): n pictures that are all right do
    not show that the model never errs, and without this T would fall to nothing. In 1 / T the likelihood is convex, so the
    minimum is where its derivative is 0: Newton's steps find it, and a bracket around it is halved where they would leave
    it.

    Args:
        logits: (n, c) of the validation pictures.
        labels: (n,) classes, or (n, c) of 0 and 1 with `multi_label`.
        multi_label: pictures have several labels, and probabilities come from a sigmoid.

    Returns:
        T between 0.05 and 20. The likelihood of such labels is never worse than that of T = 1.
    """
    if multi_label:
        scores, given = _multi(logits, labels)
        doubt = 1 / (len(scores) + 2)
        return _best(
            lambda t: _doubtful_binary(scores, given, t, doubt), lambda b: _binary_slopes(scores, given, b, doubt)
        )
    scores, truth = _single(logits, labels)
    doubt = 1 / (len(scores) + 2)
    return _best(lambda t: _doubtful(scores, truth, t, doubt), lambda beta: _slopes(scores, truth, beta, doubt))


def wilson(successes: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a share (E. B. Wilson 1927), which stays sensible near 0, near 1 and for few trials.

    Args:
        successes: of the trials.
        total: trials; with none, the interval is all there is.
        z: standard deviations on either side.

    >>> low, high = wilson(9, 10)
    >>> f"{low:.3f} to {high:.3f}"
    '0.596 to 0.982'
    """
    if not total:
        return 0.0, 1.0
    share, weight = successes / total, z * z / total
    centre = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    # At the ends the formula gives exactly 0 and 1; rounding must not push the share out of its own interval.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _nll(scores: Floats, truth: Ints, temperature: float) -> float:
    return float(-np.take_along_axis(_log_softmax(scores / temperature), truth[:, None], axis=1).mean())


def _binary_nll(scores: Floats, truth: npt.NDArray[np.bool_], temperature: float) -> float:
    return float(np.logaddexp(0.0, np.where(truth, -scores, scores) / temperature).mean())


def _others(scores: Floats, truth: Ints) -> Floats:
    """Mean distance of the other classes' scores from that of the true class, (n, 1)."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    return np.asarray((scores - own).sum(axis=1, keepdims=True) / max(1, scores.shape[1] - 1))


def _doubtful(scores: Floats, truth: Ints, temperature: float, doubt: float) -> float:
    """The loss when a share `doubt` of each label belongs to the other classes."""
    return _nll(scores, truth, temperature) - doubt * float(_others(scores, truth).mean()) / temperature


def _doubtful_binary(scores: Floats, truth: npt.NDArray[np.bool_], temperature: float, doubt: float) -> float:
    """The loss when each label is wrong with probability `doubt`."""
    return (1 - doubt) * _binary_nll(scores, truth, temperature) + doubt * _binary_nll(scores, ~truth, temperature)


def _slopes(scores: Floats, truth: Ints, beta: float, doubt: float) -> tuple[float, float]:
    """First and second derivative of the loss by beta = 1 / T: mean and variance of the logits under softmax."""
    p = np.exp(_log_softmax(scores * beta))
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    apart = scores - own  # from the true class, so that a sure picture has a slope near 0 without cancellation
    mean = (p * apart).sum(axis=1, keepdims=True)
    slope = mean - doubt * _others(scores, truth)
    return float(slope.mean()), float((p * (apart - mean) ** 2).sum(axis=1).mean())


def _binary_slopes(scores: Floats, truth: npt.NDArray[np.bool_], beta: float, doubt: float) -> tuple[float, float]:
    towards = np.where(truth, -scores, scores)
    wrong = np.exp(-np.logaddexp(0.0, -towards * beta))  # probability of the wrong side
    return float(((wrong - doubt) * towards).mean()), float((wrong * (1 - wrong) * towards**2).mean())


def _best(loss: Callable[[float], float], slopes: Callable[[float], tuple[float, float]]) -> float:
    temperature = min(max(1 / _zero(slopes, 1 / HOTTEST, 1 / COLDEST), COLDEST), HOTTEST)
    return temperature if loss(temperature) < loss(1.0) else 1.0


def _zero(slopes: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Where the first of two slopes, which rises, is 0 between `low` and `high`; the nearer end if nowhere."""
    if slopes(low)[0] >= 0:
        return low
    if slopes(high)[0] <= 0:
        return high
    beta = min(max(1.0, low), high)
    for _ in range(MOST_STEPS):
        slope, curvature = slopes(beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else low
        before, beta = beta, step if low < step < high else math.sqrt(low * high)
        if abs(beta - before) <= 1e-12 * beta:
            break
    return beta


def _top_k(scores: Floats, truth: Ints, k: int) -> float:
    """Share of the pictures whose class is among the k likeliest; of equal logits the first counts, as in argmax."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    above = (scores > own) | ((scores == own) & earlier)
    return float((above.sum(axis=1) < k).mean())


def _precision_recall_f1(hits: Any, actual: Any, given: Any) -> tuple[Floats, Floats, Floats]:
    return _ratio(hits, given), _ratio(hits, actual), _ratio(2 * hits, actual + given)


def _average_precision(scores: Floats, truth: npt.NDArray[np.bool_]) -> float:
    """Sum over the thresholds of precision times gain in recall; pictures with equal scores come in together."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(truth[order])[ends]
    gains = np.diff(hits, prepend=0)
    return float(_ratio((gains * hits / (ends + 1)).sum(), hits[-1]))


def _ratio(parts: Any, wholes: Any) -> Floats:
    """Division in which nothing out of nothing is 0."""
    quotient: Floats = np.divide(parts, wholes, out=np.zeros(np.shape(wholes)), where=np.asarray(wholes) != 0)
    return quotient


def _single(logits: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str] | None = None) -> tuple[Floats, Ints]:
    scores = _finite(logits, classes)
    truth = _labels(labels, scores.shape[1])
    if len(truth) != len(scores):
        raise ValueError(f"{len(scores)} rows of logits but {len(truth)} labels.")
    return scores, truth


def _multi(
    logits: npt.ArrayLike, targets: npt.ArrayLike, classes: Sequence[str] | None = None
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    scores, truth = _finite(logits, classes), np.asarray(targets)
    if truth.shape != scores.shape or not np.isin(truth, (0, 1)).all():
        raise ValueError(f"targets must be {scores.shape} of 0 and 1, as the logits are; they are {truth.shape}.")
    return scores, truth.astype(bool)


def _labels(labels: npt.ArrayLike, c: int) -> Ints:
    found = np.asarray(labels)
    whole = found.ndim == 1 and (np.issubdtype(found.dtype, np.integer) or not len(found))
    if not whole or (len(found) and not 0 <= found.min() <= found.max() < c):
        raise ValueError(f"labels must be whole numbers from 0 to {c - 1}, one per picture.")
    return found.astype(np.int64)


def _finite(logits: npt.ArrayLike, classes: Sequence[str] | None = None) -> Floats:
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 2 or (classes is not None and scores.shape[1] != len(classes)):
        expected = "" if classes is None else f" for {len(classes)} classes"
        raise ValueError(f"logits must be (pictures, classes){expected}; they are {scores.shape}.")
    if not len(scores):
        raise DataError("There is no picture to measure on; a larger val_share or test_share puts some there.")
    broken = int((~np.isfinite(scores)).any(axis=1).sum())
    if broken:
        raise TrainingError(
            f"The model's answers to {broken} of {len(scores)} pictures are not finite numbers, so they cannot be "
            "measured: training has run away. Lower learning_rate, or train in float32 or bfloat16 instead of float16."
        )
    return scores
