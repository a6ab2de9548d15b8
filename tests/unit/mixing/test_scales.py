"""Scales from the words of the command line."""

import pytest

from visionlora.errors import ConfigError
from visionlora.mixing.scales import Ramp, Scale, Window, scale_from


def test_words_are_blocks_and_moments() -> None:
    assert scale_from(0.5, {"up": 1.2, "mid": 0.0}) == Scale(0.5, {"up": 1.2, "mid": 0.0})
    assert scale_from(1.0, {"start": 0.3, "end": 0.9, "up": 2.0}) == Scale(1.0, {"up": 2.0}, Window(0.3, 0.9))
    assert scale_from(1.0, {"end": 0.4}).steps == Window(0.0, 0.4)
    assert scale_from(1.0, {"last": 0.0}).steps == Ramp(1.0, 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"start": 0.5, "last": 0.0}, "give one of both"),
        ({"start": 0.8, "end": 0.2}, "acts from 0.8 to 0.2"),
        ({"end": 1.5}, "both must be between 0 and 1"),
    ],
)
def test_moments_that_cannot_be(words: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scale_from(1.0, words)
