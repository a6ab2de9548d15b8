import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visionlora.report.fonts import font_for
from visionlora.report.grid import LABEL_LINES, _wrap, draw_grid


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 200, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ink_box(picture: Image.Image) -> tuple[int, int, int, int]:
    """Bounds of what is not white."""
    inked = np.argwhere(np.asarray(picture).min(axis=2) < 215)
    (top, left), (bottom, right) = inked.min(axis=0), inked.max(axis=0)
    return int(left), int(top), int(right) + 1, int(bottom) + 1


def test_the_same_input_gives_the_same_pixels() -> None:
    def drawn() -> bytes:
        return draw_grid(
            [[noise(seed=1), noise(seed=2)]], ["row"], ["a dog", "a cat"], title="Title", caption="caption"
        ).tobytes()

    assert drawn() == drawn()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_small_pictures_are_enlarged_by_a_whole_factor(factor: int) -> None:
    picture = noise(32, 32)
    sheet = draw_grid([[picture]], [""], [""], cell=32 * factor + factor // 2)
    found = np.asarray(sheet.crop(ink_box(sheet)))
    expected = np.asarray(picture).repeat(factor, axis=0).repeat(factor, axis=1)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("size", "drawn"), [((256, 256), (64, 64)), ((200, 100), (64, 32)), ((90, 300), (19, 64))])
def test_large_pictures_are_reduced_in_proportion(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    sheet = draw_grid([[Image.new("RGB", size, "black")]], [""], [""], cell=64)
    left, top, right, bottom = ink_box(sheet)
    assert (right - left, bottom - top) == drawn


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_is_drawn(mode: str) -> None:
    picture = Image.new("I;16", (64, 64), 0) if mode == "I;16" else noise().convert(mode)
    assert draw_grid([[picture]], ["row"], ["column"]).mode == "RGB"


def test_transparency_is_white() -> None:
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.asarray(draw_grid([[hidden]], [""], [""])).min() == 255


def test_labels_make_room_and_none_takes_none() -> None:
    bare = draw_grid([[noise()]], [""], [""])
    with_row = draw_grid([[noise()]], ["a row"], [""])
    with_column = draw_grid([[noise()]], [""], ["a column"])
    with_all = draw_grid([[noise()]], [""], [""], title="t", caption="c")
    assert with_row.width > bare.width and with_row.height == bare.height
    assert with_column.width == bare.width and with_column.height > bare.height
    assert with_all.height > bare.height


@given(st.text(max_size=200), st.integers(11, 30), st.integers(60, 200))
def test_wrapped_text_keeps_to_its_box(text: str, size: int, width: int) -> None:
    block = _wrap(text, size, width, LABEL_LINES)
    assert len(block.lines) <= LABEL_LINES
    assert block.width <= width
    whole = "".join("".join(block.lines).split())
    said = "".join(font_for(text, size)[1].split())  # as the font can write it
    assert whole == said or (whole.endswith("…") and said.startswith(whole[:-1]))


def test_long_labels_end_in_an_ellipsis() -> None:
    lines = _wrap("a picture of a dog " * 20, 15, 128, LABEL_LINES).lines
    assert len(lines) == LABEL_LINES and lines[-1].endswith("…")


def test_long_names_break_where_they_are_joined() -> None:
    assert _wrap("fluent-emoji-high-contrast 96 %, is noto", 15, 128, 3).lines == (
        "fluent-emoji-high-",
        "contrast 96 %, is",
        "noto",
    )
    assert _wrap("fluent-emoji-flat 99 %, is fxemoji", 15, 128, 3).lines == ("fluent-emoji-flat", "99 %, is fxemoji")


@pytest.mark.parametrize(
    ("cells", "rows", "columns", "message"),
    [
        ([], [], ["a"], "needs a picture; got 0 rows and 1 column labels"),
        ([[]], ["a"], [], "needs a picture; got 1 rows and 0 column labels"),
        ([[noise()]], ["a", "b"], ["c"], "1 rows of pictures but 2 row labels"),
        ([[noise()], []], ["a", "b"], ["c"], "Row 1 has 0 pictures but there are 1 column labels"),
    ],
)
def test_lengths_must_agree(cells: list[list[Image.Image]], rows: list[str], columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_grid(cells, rows, columns)


def test_a_cell_is_not_tiny() -> None:
    with pytest.raises(ValueError, match="cell is 8 px"):
        draw_grid([[noise()]], [""], [""], cell=8)
