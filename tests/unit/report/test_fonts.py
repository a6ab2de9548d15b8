"""Letters on contact sheets."""

import numpy as np
import pytest
from PIL import Image

from visionlora.report.fonts import families, font_for
from visionlora.report.grid import draw_grid


def mask(text: str) -> bytes:
    font, written = font_for(text, 40)
    return bytes(font.getmask(written))


@pytest.mark.parametrize("text", ["größer", "собака", "σκύλος", "façade"])
def test_letters_beyond_ascii_are_written(text: str) -> None:
    """They were empty boxes, one like the other."""
    assert "DejaVu Sans" in families()
    assert font_for(text, 12)[1] == text
    assert len({mask(letter) for letter in text.lower() if not letter.isascii()}) == len(
        set(text) - set(map(chr, range(128)))
    )


def test_letters_that_no_font_has_stay_apart() -> None:
    rare = ("\U0002a6a0", "\U0002a6a1")
    written = [font_for(f"a {letter}", 12)[1] for letter in rare]
    assert written == ["a [2a6a0]", "a [2a6a1]"]
    picture = Image.new("RGB", (16, 16))
    sheets = [np.asarray(draw_grid([[picture]], [f"a {letter}"], ["x"])) for letter in rare]
    assert sheets[0].shape != sheets[1].shape or (sheets[0] != sheets[1]).any()
