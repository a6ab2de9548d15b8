"""Variants of a picture: where they come from, and that they repeat."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.data.augment import Variant, made_of, variants
from visionlora.data.buckets import framing
from visionlora.data.folder import ImageItem
from visionlora.data.images import decode, fit


@pytest.fixture
def item(tmp_path: Path) -> ImageItem:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(np.arange(60, dtype=np.uint8)[None] * 4, 40, 0)).save(tmp_path / "mask.png")
    data = (tmp_path / "a.png").read_bytes()
    return ImageItem(tmp_path / "a.png", "a", hashlib.sha256(data).hexdigest(), mask=tmp_path / "mask.png")


@pytest.mark.parametrize("size", [(32, 32), (40, 48), (40, 60), (64, 96)])
def test_the_plain_variant_is_the_centre(item: ImageItem, size: tuple[int, int]) -> None:
    (made,) = made_of(item, framing(decode(item.path).size[::-1], size), [Variant()])
    assert made.pixels.shape == (*size, 3) and made.mask.shape == size
    difference = np.abs(made.pixels.astype(int) - fit(decode(item.path), size))
    assert difference.max() <= 40 and difference.mean() < 4, "to the rounding of the box"
    (mirrored,) = made_of(item, framing(decode(item.path).size[::-1], size), [Variant(mirrored=True)])
    assert np.array_equal(mirrored.pixels, made.pixels[:, ::-1]) and np.array_equal(mirrored.mask, made.mask[:, ::-1])


def test_the_mask_is_cut_as_the_picture_is(item: ImageItem) -> None:
    f = framing(decode(item.path).size[::-1], (40, 40))
    for variant in (Variant(), *(Variant(n, random_crop=True) for n in range(4))):
        (made,) = made_of(item, f, [variant])
        whole = np.asarray(decode(item.path))
        top, left = made.corner
        assert np.array_equal(made.pixels, whole[top : top + 40, left : left + 40])
        assert np.abs(made.mask[0] * 255 - 4 * np.arange(left, left + 40)).max() < 0.01


def test_chance_repeats_and_differs(item: ImageItem) -> None:
    f = framing(decode(item.path).size[::-1], (32, 32))
    made = made_of(item, f, [Variant(n, random_crop=True, colour_jitter=0.3) for n in (0, 1, 2, 0)])
    assert np.array_equal(made[0].pixels, made[3].pixels)
    assert len({m.pixels.tobytes() for m in made}) == 3
    assert len({v.key for v in variants(True, True, 0.1, 3)}) == 6
