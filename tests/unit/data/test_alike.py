"""What counts as the same picture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from visionlora.data import alike
from visionlora.data.alike import linked, look_alikes, looks_of, perceptual_hash, thumbnail
from visionlora.data.images import decode

ASSETS = Path(__file__).parents[3] / "assets"


def known(
    images: Sequence[Image.Image], groups: Sequence[str | None] = (), mirrored: bool = False
) -> npt.NDArray[np.int64]:
    """The numbers of pictures no two of which are the same file."""
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    small = np.stack([thumbnail(image) for image in images])
    return linked(
        hashes, small, [str(i) for i in range(len(images))], groups or [None] * len(images), mirrored=mirrored
    )


def test_equal_bytes_and_groups_are_chained() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 62, 7, dtype=np.uint64)
    small = rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    sha256 = ["p", "q", "r", "q", "s", "t", "u"]
    groups = [None, None, "x", "x", None, "y", None]
    assert linked(hashes, small, sha256, groups).tolist() == [0, 1, 1, 1, 2, 3, 4]


@given(
    near=st.lists(
        st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=4), st.integers(0, 9), st.integers(0, 4)),
        min_size=1,
    ),
    seed=st.integers(0, 9),
    many=st.sampled_from([0, alike._MANY]),
)
@example(near=[(1, set(), 0, 0), (1, set(), 4, 0), (1, set(), 9, 0)], seed=0, many=0)
def test_near_duplicates_are_those_of_the_definition(
    near: list[tuple[int, set[int], int, int]], seed: int, many: int
) -> None:
    rng = np.random.default_rng(seed)
    bases, faces = rng.integers(0, 1 << 62, 6), rng.integers(60, 160, (6, 16, 16, 3))
    faces[::2] = 110 + faces[::2] // 10  # with less spread than their grain
    grain = rng.normal(0, 1, (5, 16, 16, 3)) * np.arange(5).reshape(5, 1, 1, 1)
    hashes = np.array([int(bases[b]) ^ sum(1 << bit for bit in flipped) for b, flipped, *_ in near], np.uint64)
    tint = np.array([3, 0, 0])
    small = np.stack([faces[b] + brighter * tint + grain[rough] for b, _, brighter, rough in near]).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "_MANY", many)
        number = linked(hashes, small, [str(i) for i in range(len(near))], [None] * len(near))

    luma = np.array([0.299, 0.587, 0.114])
    colours = small.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4)).repeat(4, axis=1).repeat(4, axis=2)  # of each block
    seen = colours + ((small - colours) @ luma)[..., None]
    chroma = colours - (colours @ luma)[..., None]
    own = seen - seen.mean(axis=(1, 2), keepdims=True)  # without the mean of each colour
    spread = [np.sqrt(np.square(o).mean()) for o in own]

    parent = list(range(len(near)))  # the definition, pair by pair
    for i in range(len(near)):
        for j in range(i):
            bits = (int(hashes[i]) ^ int(hashes[j])).bit_count()
            levels = max(np.abs((seen[i] - seen[j]) @ luma).mean(), np.abs(chroma[i] - chroma[j]).mean())
            apart = np.sqrt(np.square(own[i] - own[j]).mean())
            if bits <= 3 and levels <= 6 and apart <= 0.25 * min(spread[i], spread[j]) + 0.5:
                parent = [parent[i] if p == parent[j] else p for p in parent]
    expected = list(dict.fromkeys(parent))
    assert number.tolist() == [expected.index(p) for p in parent]


def test_thousands_of_flat_pictures_take_no_time() -> None:
    n = 5000
    colours = np.random.default_rng(0).integers(0, 2, (n, 1, 1, 3), dtype=np.uint8) * 200
    small = np.broadcast_to(colours, (n, 16, 16, 3))
    number = linked(np.zeros(n, np.uint64), small, [str(i) for i in range(n)], [None] * n)
    assert len(set(number.tolist())) == 8  # colours
    shades = np.broadcast_to(np.arange(n, dtype=np.int64).reshape(n, 1, 1, 1) % 256, (n, 16, 16, 3)).astype(np.uint8)
    assert set(linked(np.zeros(n, np.uint64), shades, [str(i) for i in range(n)], [None] * n).tolist()) == {0}


@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_digits_are_not_taken_for_each_other(resample: Image.Resampling) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    grey = (digits.images * (255 / 16)).astype(np.uint8)
    for mirrored in (False, True):
        images = [Image.fromarray(g).convert("RGB").resize((64, 64), resample) for g in grey]
        number = known(images, mirrored=mirrored)
        sizes = Counter(number.tolist())
        assert len(sizes) >= len(grey) - 5
        assert all(len(set(digits.target[number == k])) == 1 for k, size in sizes.items() if size > 1)


def photo(seed: int) -> Image.Image:
    """Coarse and fine noise, as a photo has."""
    rng, pixels = np.random.default_rng(seed), np.full((192, 192, 3), 128.0)
    for side in (4, 8, 16, 64):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, 90 / side**0.5, (side, side)).astype(np.float32))
            pixels[..., channel] += np.asarray(noise.resize((192, 192), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def resaved(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def test_tiny_pictures_saved_again_are_linked_and_no_others() -> None:
    """JPEG, of which two px share a colour, changes much of the few px that they have."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    grey = [Image.fromarray(g).convert("RGB") for g in (digits.images * (255 / 16)).astype(np.uint8)]
    emoji = sorted((ASSETS / "styles" / "fluent-emoji-flat").rglob("*.png"))
    whole = [decode(path) for path in emoji]
    coloured, tiny = ([image.resize((n, n), Image.Resampling.LANCZOS) for image in whole] for n in (32, 20))
    for images, same, missed in ((grey, 3, 2), (coloured, 1, 2), (tiny, 1, 26)):
        n = len(images)
        number = known([*images, *map(resaved, images)])
        assert n - len(set(number[:n].tolist())) <= same
        assert np.sum(number[:n] != number[n:]) <= missed, "of about 1,800 and 700"


def smaller(image: Image.Image) -> Image.Image:
    return image.resize((round(image.width * 0.9), round(image.height * 0.9)), Image.Resampling.LANCZOS)


def test_a_picture_saved_again_or_made_smaller_is_linked_and_no_other() -> None:
    emoji = sorted((ASSETS / "styles" / "noto" / "heldout").glob("*.png"))[:25]
    images = [*map(photo, range(10)), *map(decode, emoji), decode(ASSETS / "dog" / "poodle.png")]
    for change in (resaved, smaller):
        number = known([*images, *map(change, images)]).tolist()
        assert number == [*range(len(images)), *range(len(images))]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_a_mirrored_copy_is_linked_where_that_counts_and_no_other() -> None:
    emoji = sorted((ASSETS / "styles" / "noto" / "heldout").glob("*.png"))[:25]
    images = [*map(photo, range(10)), *map(decode, emoji), decode(ASSETS / "dog" / "poodle.png")]
    copies, n = [resaved(mirror(image)) for image in images], len(images)
    assert known([*images, *copies], mirrored=True).tolist() == [*range(n), *range(n)]
    assert len(set(known([*images, *copies]).tolist())) > 1.5 * n
    assert known([*images, *copies[5:]], mirrored=True).tolist() == [*range(n), *range(5, n)]


def test_the_styles_hold_few_mirrored_copies() -> None:
    """Icons are simple and many are symmetric: those that look alike as they are stay apart by their hashes."""
    icons = [decode(path) for path in sorted((ASSETS / "styles" / "fluent-emoji-high-contrast").rglob("*.png"))]
    plain, more = (len(set(known(icons, mirrored=mirrored).tolist())) for mirrored in (False, True))
    assert plain - 2 <= more < plain, "two hearts, hatched from either side"


def granite(seed: int, grey: int = 128) -> Image.Image:
    """Fine grains, of which little is left in small."""
    tint = np.array([10, 0, -10])
    grains = np.random.default_rng(seed).normal(grey, 40, (128, 128, 1)) + tint
    return Image.fromarray(grains.clip(0, 255).astype(np.uint8))


def test_textures_are_like_their_copies_and_no_other() -> None:
    images = [granite(seed, 120 + seed % 4) for seed in range(120)]
    assert known([*images, *map(resaved, images[:5])]).tolist() == [*range(120), *range(5)]


def test_thousands_of_textures_take_no_time() -> None:
    n = 3000
    small = np.random.default_rng(0).normal(128, 4, (n, 16, 16, 3)).astype(np.uint8)
    small[-1] = small[0]
    small[-1, 0, 0, 0] += 1
    number = linked(np.zeros(n, np.uint64), small, [str(i) for i in range(n)], [None] * n)
    assert number.tolist() == [*range(n - 1), 0]


def test_flat_areas_do_not_leave_a_hash_to_noise() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = rng.integers(118, 139, (90, 80, 3), dtype=np.uint8)
        assert perceptual_hash(Image.fromarray(noisy)) == 0
    ramp = np.repeat(np.linspace(0, 255, 90, dtype=np.uint8)[None, :, None], 80, axis=0).repeat(3, axis=2)
    assert perceptual_hash(Image.fromarray(ramp)) == (1 << 64) - 1
    assert perceptual_hash(Image.fromarray(ramp[:, ::-1])) == 0


def test_sets_of_look_alikes() -> None:
    images = [photo(0), photo(1), resaved(photo(0)), photo(2), resaved(photo(1)), smaller(photo(0))]
    hashes, small = [perceptual_hash(image) for image in images], [thumbnail(image) for image in images]
    assert look_alikes(hashes, small) == [[0, 2, 5], [1, 4]]
    assert look_alikes(hashes[:2], small[:2]) == look_alikes([], []) == []


def test_large_pictures_are_made_smaller_once() -> None:
    image = photo(3)
    assert looks_of(image)[0] == perceptual_hash(image)
    np.testing.assert_array_equal(looks_of(image)[1], thumbnail(image))
    value, small = looks_of(image.resize((1921, 1500), Image.Resampling.BICUBIC))
    assert (value ^ perceptual_hash(image)).bit_count() <= 3
    assert np.abs(small.astype(int) - thumbnail(image)).mean() <= 6
