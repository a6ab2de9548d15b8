"""Variants of a picture: where they come from, and that they repeat."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.data.augment import Variant, check_masks, made_of, variants
from visionlora.data.buckets import framing
from visionlora.data.folder import ImageItem, read_image_folder
from visionlora.data.images import decode, fit
from visionlora.errors import DataError


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


def test_a_cut_at_random_has_something_of_the_mask(item: ImageItem) -> None:
    levels = np.zeros((40, 60), np.uint8)
    levels[30:34, 50:53] = 255
    Image.fromarray(levels).save(item.mask)
    made = made_of(item, framing((40, 60), (16, 16)), [Variant(n, random_crop=True) for n in range(40)])
    assert all(m.mask.any() for m in made) and {m.corner for m in made} == {(0, x) for x in (5, 6, 7, 8)}
    levels[:] = 0
    Image.fromarray(levels).save(item.mask)
    assert not made_of(item, framing((40, 60), (16, 16)), [Variant(random_crop=True)])[0].mask.any()


def test_a_mask_that_is_cut_away_is_told_of(tmp_path: Path) -> None:
    for folder in ("dogs", "masks"):
        (tmp_path / folder).mkdir()
    for name, columns in (("a", slice(0, 8)), ("b", slice(28, 36))):
        Image.new("RGB", (64, 32), "red" if name == "a" else "blue").save(tmp_path / "dogs" / f"{name}.png")
        levels = np.full((32, 64), 3, np.uint8)  # noise of a JPEG
        levels[:, columns] = 255
        Image.fromarray(levels).save(tmp_path / "masks" / f"{name}.png")
    items = read_image_folder(tmp_path / "dogs", "a", masks=str(tmp_path / "masks")).items
    square, wide = ([framing((32, 64), size)] * 2 for size in ((32, 32), (32, 64)))
    with pytest.raises(DataError, match=r"^The mask of a\.png lies wholly outside of what is cut .* buckets=true"):
        check_masks(items, square, variants(True, False, 0.1, 2))
    check_masks(items, wide, variants(True, False, 0.0, 1))
    check_masks(items, square, variants(True, True, 0.0, 4))
