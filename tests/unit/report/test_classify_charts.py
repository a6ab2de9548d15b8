import io

import numpy as np
import pytest
from PIL import Image

from visionlora.report.classify_charts import (
    COUNTED,
    LONGEST_NAME,
    MOST_CLASSES,
    MOST_CONFUSED,
    _label,
    _most_confused,
    draw_confusion,
    draw_reliability,
)
from visionlora.vision.metrics import Bin

ODD_NAMES = ["<b>cat</b>", "$x^2$ _{", "猫 \U0001f600", "a" * 80, "zero\npictures", ""]
BINS = (Bin(0.0, 0.5, 0, 0.0, 0.0), Bin(0.5, 1.0, 10, 0.8, 0.6))


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        assert picture.format == "PNG" and "Software" not in picture.info
        return picture.size


def random_counts(c: int) -> list[list[int]]:
    counts = np.random.default_rng(0).integers(0, 3, (c, c)) + 20 * np.eye(c, dtype=int)
    return [[int(n) for n in row] for row in counts]


def test_the_same_counts_give_the_same_bytes() -> None:
    first, second = (draw_confusion(random_counts(4), list("abcd")) for _ in range(2))
    assert first == second
    first, second = (draw_reliability(BINS, BINS[::-1], 0.2, 0.1) for _ in range(2))
    assert first == second


def test_odd_names_and_a_class_without_pictures_are_drawn_without_a_warning() -> None:
    counts = random_counts(len(ODD_NAMES))
    counts[4] = [0] * len(ODD_NAMES)
    width, height = size(draw_confusion(counts, ODD_NAMES))
    assert 400 < width < 2000 and 400 < height < 2000


@pytest.mark.parametrize("c", [1, COUNTED + 1])
def test_few_and_many_classes_are_drawn(c: int) -> None:
    width, height = size(draw_confusion(random_counts(c), [f"class {i}" for i in range(c)]))
    assert 0.7 < width / height < 1.6


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cat", "cat"),
        ("  two\n lines ", "two lines"),
        ("Bewölkt", "Bewölkt"),
        ("\U00017000", "#8"),  # Tangut, which none of the fonts has
        ("", "#8"),
    ],
)
def test_labels_can_be_read(name: str, label: str) -> None:
    assert _label(name, 7) == label


def test_long_names_keep_both_ends() -> None:
    label = _label("Tomato leaf of an old plant, late blight", 0)
    assert label.startswith("Tomato") and label.endswith("late blight") and len(label) <= LONGEST_NAME + 1


def test_of_many_classes_those_with_most_mistakes_are_kept_in_their_order() -> None:
    counts = np.eye(MOST_CLASSES + 10, dtype=int) * 5
    counts[3, 50] = counts[60, 7] = 9
    kept = _most_confused(counts)
    assert len(kept) == MOST_CONFUSED and kept == sorted(kept)
    assert {3, 7, 50, 60} <= set(kept)


@pytest.mark.parametrize(("counts", "names"), [([[1, 2]], ["a"]), ([], []), ([[1, 0], [0, 1]], ["a"])])
def test_names_and_counts_must_belong_together(counts: list[list[int]], names: list[str]) -> None:
    with pytest.raises(ValueError, match="as many rows and columns"):
        draw_confusion(counts, names)


def test_reliability_has_a_panel_for_each_side() -> None:
    one, two = size(draw_reliability(BINS, (), 0.2, None)), size(draw_reliability(BINS, BINS, 0.2, 0.1))
    assert two[0] > 1.6 * one[0]
    with pytest.raises(ValueError, match="no bins"):
        draw_reliability((), (), None, None)
