import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visionlora.report.curves import average, draw_curves

LOSS = [(float(step), 1.0 / (step + 1)) for step in range(200)]


def draw(path: Path, series: dict[str, list[tuple[float, float]]]) -> Image.Image:
    draw_curves(path, series, xlabel="step", ylabel="loss $", title="$ loss")
    with Image.open(path) as picture:
        picture.load()
    return picture


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, {"train": LOSS, "held $ out": LOSS[::3]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_only_the_picture_is_left(tmp_path: Path) -> None:
    picture = draw(tmp_path / "loss.png", {"loss": LOSS})
    assert picture.format == "PNG" and "Software" not in picture.info
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 1.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, -1.0), (1.0, 1e6)],
        [(0.0, 1e-8), (1.0, 1.0)],
        [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf)],
    ],
)
def test_odd_series_are_drawn_without_a_warning(tmp_path: Path, points: list[tuple[float, float]]) -> None:
    assert draw(tmp_path / "loss.png", {"loss": points, "nothing": [(0.0, math.nan)]}).width > 500


def test_other_figures_are_left_alone(tmp_path: Path) -> None:
    draw(tmp_path / "loss.png", {"loss": LOSS})
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("series", [{}, {"loss": []}, {"loss": [(0.0, math.nan)]}])
def test_where_there_is_nothing_to_draw_nothing_is_drawn(
    tmp_path: Path, series: dict[str, list[tuple[float, float]]]
) -> None:
    assert not draw_curves(tmp_path / "loss.png", series, xlabel="step", ylabel="loss")
    assert not (tmp_path / "loss.png").exists()


@given(st.floats(-1e6, 1e6), st.integers(1, 500))
def test_the_average_of_a_constant_is_the_constant(value: float, count: int) -> None:
    smoothed = average([(float(step), value) for step in range(count)])
    assert [x for x, _ in smoothed] == list(range(count))
    assert all(y == pytest.approx(value, rel=1e-9) for _, y in smoothed)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_the_average_stays_within_the_values(values: list[float]) -> None:
    smoothed = [y for _, y in average(list(enumerate(values)))]
    slack = 1e-9 * max(1.0, *(abs(value) for value in values))
    assert smoothed[0] == pytest.approx(values[0])
    assert min(values) - slack <= min(smoothed) and max(smoothed) <= max(values) + slack


def test_names_stand_at_the_ends_of_their_lines_also_above_one(tmp_path: Path) -> None:
    # Warnings are errors: with the limits of an empty picture the names stood far outside, and the axes collapsed.
    draw_curves(tmp_path / "a.png", {"a": [(1, 7.0)], "b": [(0, 9.0), (1, 6.0)]}, xlabel="x", ylabel="y")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (900, 525)
