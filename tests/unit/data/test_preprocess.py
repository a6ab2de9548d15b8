"""A picture becomes the same input in training, in evaluation and in predict."""

import numpy as np
import pytest
import torch
from PIL import Image

from visionlora.data.preprocess import Preprocessing
from visionlora.errors import ConfigError


def gradient(w: int, h: int) -> Image.Image:
    rows = np.linspace(0, 255, h)[:, None] + np.zeros((1, w))
    return Image.fromarray(np.stack([rows, rows, 255 - rows], -1).astype(np.uint8))


def test_it_survives_the_header_of_a_file() -> None:
    given = Preprocessing(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9, "squash")
    assert Preprocessing.from_dict(given.to_dict()) == given


def test_equal_to_timms_transform_up_to_rounding() -> None:
    from timm.data import create_transform

    own = Preprocessing(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.75)
    theirs = create_transform((3, 48, 48), interpolation="bicubic", mean=own.mean, std=own.std, crop_pct=0.75)
    picture = gradient(128, 64)
    got, want = own.batch(own.stored(picture)[None])[0], theirs(picture)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 2 / 255 / 0.2  # one step of 8 bits more or less, in units of std


def test_a_squashed_picture_keeps_its_borders() -> None:
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("black", (0, 0, 9, 30))
    kept = Preprocessing(30, interpolation="nearest", crop_mode="squash").stored(wide)
    cut = Preprocessing(30, interpolation="nearest").stored(wide)
    assert (kept[:, :3] == 0).all() and (kept[:, 4:] == 255).all() and (cut == 255).all()


def test_mean_and_spread_are_taken_off() -> None:
    x = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(Preprocessing(2, (0.5,) * 3, (0.25,) * 3).normalised(x), torch.full((1, 3, 2, 2), 2.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"interpolation": "bicubc"}, "Did you mean 'bicubic'"),
        ({"crop_mode": "centre"}, "Did you mean 'center'"),
        ({"size": 0}, "at least 1 px"),
        ({"crop_pct": 1.5}, "at most 1"),
        ({"std": (0.5, 0.0, 0.5)}, "positive"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Preprocessing(**{"size": 8, **settings})
