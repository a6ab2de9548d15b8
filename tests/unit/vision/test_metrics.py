import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionlora.errors import ConfigError, DataError, TrainingError
from visionlora.vision.metrics import (
    COLDEST,
    HOTTEST,
    confusion_matrix,
    evaluate,
    evaluate_multi_label,
    expected_calibration_error,
    fit_temperature,
    reliability,
    score,
    softmax,
    wilson,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, n: int = 40, c: int = 4, sharpness: float = 1.0) -> tuple[Floats, Ints]:
    """Logits that are right somewhat more often than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    return sharpness * (rng.normal(size=(n, c)) + np.eye(c)[labels]), labels


def targets_of(seed: int, n: int = 40, c: int = 4) -> tuple[Floats, Ints]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, (n, c))
    return rng.normal(size=(n, c)) + targets - 0.5, targets


def nll(logits: Floats, labels: Ints, temperature: float) -> float:
    return evaluate(logits, labels, [str(i) for i in range(logits.shape[1])], temperature).loss


def test_figures_that_one_can_count_on_the_fingers() -> None:
    logits = np.log([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    found = evaluate(logits, [0, 1, 1], ["a", "b", "never"])
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 0))
    assert found.top1 == pytest.approx(2 / 3)
    assert found.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2), "the class without pictures does not count"
    assert found.macro_f1 == pytest.approx(2 / 3), "both classes have F1 2/3, the third does not occur"
    assert found.loss == pytest.approx(-(math.log(0.8) + math.log(0.3) + math.log(0.7)) / 3)
    assert [row.pictures for row in found.per_class] == [1, 2, 0]
    never = found.per_class[2]
    assert (never.recall, never.low, never.high) == (0.0, 0.0, 1.0), "without pictures nothing is known"


def test_a_class_that_is_only_predicted_lowers_the_f1_but_not_the_balanced_accuracy() -> None:
    found = evaluate(np.eye(3)[[0, 2]], [0, 0], ["a", "b", "c"])
    assert found.balanced_accuracy == 0.5
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(("c", "known"), [(2, False), (5, False), (6, True)])
def test_top5_is_left_out_where_it_says_nothing(c: int, known: bool) -> None:
    found = evaluate(*drawn(0, c=c), [str(i) for i in range(c)])
    assert (found.top5 is not None) == known


@given(SEEDS)
def test_top5_is_never_below_top1_even_with_equal_logits(seed: int) -> None:
    logits, labels = drawn(seed, n=20, c=8)
    found = evaluate(logits.round(), labels, [str(i) for i in range(8)])
    assert found.top5 is not None and found.top1 <= found.top5 <= 1


@given(SEEDS, st.floats(0.1, 10))
def test_the_temperature_moves_the_loss_but_no_prediction(seed: int, temperature: float) -> None:
    logits, labels = drawn(seed)
    plain, warm = (evaluate(logits, labels, list("abcd"), t) for t in (1.0, temperature))
    assert plain.confusion == warm.confusion
    assert warm.loss == pytest.approx(evaluate(logits / temperature, labels, list("abcd")).loss)


@given(SEEDS, st.floats(-1e4, 1e4))
def test_softmax_sums_to_one_and_ignores_a_shift(seed: int, shift: float) -> None:
    logits, _ = drawn(seed)
    p = softmax(logits)
    assert np.allclose(p.sum(axis=1), 1, atol=1e-12)
    assert np.allclose(p, softmax(logits + shift), atol=1e-9)


@given(SEEDS)
def test_the_confusion_matrix_counts_every_picture_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 5, (2, 30))
    found = confusion_matrix(labels, predicted, 5)
    assert found.sum(axis=1).tolist() == np.bincount(labels, minlength=5).tolist()
    assert found.sum(axis=0).tolist() == np.bincount(predicted, minlength=5).tolist()


def test_several_labels_a_picture() -> None:
    logits = np.array([[2.0, -1.0, -3.0], [-1.0, 1.0, -3.0], [1.0, 3.0, -3.0], [-2.0, -2.0, -3.0]])
    found = evaluate_multi_label(logits, [[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]], ["a", "b", "never"])
    a, b, never = found.per_class
    assert (a.positives, a.precision, a.recall) == (3, 1.0, pytest.approx(2 / 3))
    assert (b.positives, b.precision, b.recall, b.average_precision) == (1, 0.5, 1.0, 1.0)
    assert (never.positives, never.f1, never.average_precision) == (0, 0.0, 0.0)
    assert [(row.low, row.high) for row in found.per_class] == [wilson(2, 3), wilson(1, 1), (0.0, 1.0)]
    assert found.micro_f1 == pytest.approx(2 * 3 / (4 + 4))
    assert found.macro_f1 == pytest.approx((a.f1 + b.f1) / 2)
    assert found.mean_average_precision == pytest.approx((a.average_precision + b.average_precision) / 2)
    assert found.subset_accuracy == 0.5


def test_several_labels_of_which_none_occurs() -> None:
    found = evaluate_multi_label([[-1.0, -2.0]], [[0, 0]], ["a", "b"])
    assert (found.micro_f1, found.macro_f1, found.mean_average_precision, found.subset_accuracy) == (0, 0, 0, 1)


def test_both_kinds_are_plain_values() -> None:
    for found in (evaluate(*drawn(1), list("abcd")), evaluate_multi_label(*targets_of(1), list("abcd"))):
        plain = found.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain["per_class"][0]["name"] == "a"


def test_scores_are_larger_when_better() -> None:
    single, several = evaluate(*drawn(2), list("abcd")), evaluate_multi_label(*targets_of(2), list("abcd"))
    assert score(single, "top1") == single.top1
    assert score(single, "balanced_accuracy") == single.balanced_accuracy
    assert score(single, "loss") == -single.loss
    assert score(several, "map") == several.mean_average_precision
    assert score(several, "micro_f1") == several.micro_f1
    assert score(several, "macro_f1") == several.macro_f1


@pytest.mark.parametrize(
    ("several", "name", "message"),
    [
        (False, "top_1", r"no metric 'top_1' for pictures with one label each\. Did you mean 'top1'"),
        (False, "map", r"'map' does not apply to pictures with one label each\. .*"),
        (
            True,
            "top1",
            r"'top1' does not apply to pictures with several labels\. Allowed: loss, macro_f1, map, micro_f1",
        ),
    ],
)
def test_an_unknown_score_names_the_nearest(several: bool, name: str, message: str) -> None:
    found = evaluate_multi_label(*targets_of(2), list("abcd")) if several else evaluate(*drawn(2), list("abcd"))
    with pytest.raises(ConfigError, match=message):
        score(found, name)


@given(SEEDS, st.integers(1, 20), st.floats(0.2, 5))
def test_bins_hold_every_picture_where_its_confidence_lies(seed: int, bins: int, temperature: float) -> None:
    logits, labels = drawn(seed)
    found = reliability(logits, labels, temperature, bins)
    assert len(found) == bins and (found[0].low, found[-1].high) == (0.0, 1.0)
    assert sum(b.count for b in found) == len(labels)
    assert all(b.low < b.confidence <= b.high for b in found if b.count)
    right = sum(b.count * b.accuracy for b in found)
    assert right == pytest.approx(evaluate(logits, labels, list("abcd")).top1 * len(labels))
    assert 0 <= expected_calibration_error(logits, labels, temperature, bins) <= 1


def test_calibration_error_of_a_known_case() -> None:
    """Four pictures at 90 %, of which two are right, and one sure one: (4 * 0.4 + 1 * 0) / 5."""
    logits = np.log([[0.9, 0.1]] * 4 + [[1 - 1e-12, 1e-12]])
    found = expected_calibration_error(logits, [0, 0, 1, 1, 0])
    assert found == pytest.approx(0.32, abs=1e-9)


def doubtful_loss(logits: Floats, truth: Ints, temperature: float, multi_label: bool) -> float:
    """Cross-entropy with targets of (n + 1) / (n + 2), the rest shared by the other classes."""
    doubt, c = 1 / (len(logits) + 2), logits.shape[1]
    if multi_label:
        right, wrong = (evaluate_multi_label(logits, t, list("abcd"), temperature).loss for t in (truth, 1 - truth))
        return (1 - doubt) * right + doubt * wrong
    scaled = logits / temperature
    logs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    targets = np.full_like(logs, doubt / (c - 1))
    targets[np.arange(len(truth)), truth] = 1 - doubt
    return float(-(targets * logs).sum(1).mean())


@given(SEEDS, st.floats(0.05, 30), st.booleans())
def test_the_fitted_temperature_is_the_best_of_its_range(seed: int, sharpness: float, multi_label: bool) -> None:
    logits, truth = targets_of(seed) if multi_label else drawn(seed)
    logits = logits * sharpness
    found = fit_temperature(logits, truth, multi_label)
    assert COLDEST <= found <= HOTTEST
    losses = {t: doubtful_loss(logits, truth, t, multi_label) for t in (found, 1.0, *np.geomspace(0.05, 20, 25))}
    assert losses[found] <= losses[1.0] + 1e-12
    assert losses[found] <= min(losses.values()) + 1e-12


def test_the_temperature_undoes_a_scale() -> None:
    logits, labels = drawn(3, n=400)
    plain = fit_temperature(logits, labels)
    assert 0.3 < plain < 3
    assert fit_temperature(logits * 4, labels) == pytest.approx(4 * plain, rel=1e-9)


def test_pictures_that_are_all_right_make_it_no_surer_than_their_number_allows() -> None:
    """Of n sure and right pictures the fit says (n + 1) / (n + 2), not 1."""
    n = 50
    logits, labels = np.eye(2)[np.arange(n) % 2] * 3.0, np.arange(n) % 2
    found = softmax(logits, fit_temperature(logits, labels)).max(1)
    assert found == pytest.approx(np.full(n, (n + 1) / (n + 2)))


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[2.0, 0.0], [0.0, 2.0]], [1, 0], HOTTEST),  # all wrong: never unsure enough
        ([[1.0, 1.0], [3.0, 3.0]], [0, 1], 1.0),  # nothing to choose
        ([[1e6, 0.0], [0.0, 1e6]], [0, 1], HOTTEST),  # far surer than two pictures allow
    ],
)
def test_temperatures_at_the_ends(logits: list[list[float]], labels: list[int], expected: float) -> None:
    assert fit_temperature(logits, labels) == expected


@given(st.integers(0, 300), st.integers(0, 300))
def test_wilson_holds_the_share_and_mirrors(a: int, b: int) -> None:
    low, high = wilson(a, a + b)
    assert 0 <= low <= high <= 1
    if a + b:
        assert low <= a / (a + b) <= high
    mirrored = wilson(b, a + b)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_wilson_of_a_published_case() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_no_picture_and_no_number_are_told_to_the_user() -> None:
    with pytest.raises(DataError, match="no picture to measure"):
        evaluate(np.zeros((0, 2)), np.zeros(0, dtype=int), ["a", "b"])
    with pytest.raises(TrainingError, match="answers to 1 of 2 pictures are not finite"):
        evaluate([[0.0, math.nan], [0.0, 1.0]], [0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, 1.0]], [2], "from 0 to 1"),
        ([[0.0, 1.0]], [0.5], "whole numbers"),
        ([[0.0, 1.0]], [0, 1], "1 rows of logits but 2 labels"),
        ([[0.0, 1.0, 2.0]], [0], "for 2 classes"),
    ],
)
def test_arrays_that_do_not_belong_together(logits: list[list[float]], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(logits, labels, ["a", "b"])
