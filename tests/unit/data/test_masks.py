"""Masks: where they come from, that they lie on the picture, and what is said where they do not."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.data.folder import ImageFolder, read_image_folder
from visionlora.data.images import decode
from visionlora.data.masks import mask_of
from visionlora.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def noise(h: int = 6, w: int = 4, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (h, w, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def read(root: Path, masks: str | Path = "alpha", skip_broken: bool = False) -> ImageFolder:
    return read_image_folder(root / "dog", masks=str(masks), skip_broken=skip_broken)


def said(root: Path, masks: str | Path = "alpha", error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        read(root, masks)
    return str(caught.value)


def check_mask(folder: ImageFolder, name: str, expected: np.ndarray) -> None:
    """The mask has the levels of `expected` (uint8) and the size of the picture."""
    item = next(item for item in folder.items if item.name == name)
    mask = mask_of(item)
    assert mask is not None and mask.dtype == np.float32
    assert mask.shape == decode(item.path).size[::-1]
    np.testing.assert_array_equal(mask, expected.astype(np.float32) / np.float32(255))


def test_alpha_channels(tmp_path: Path) -> None:
    clear, opaque = noise(channels=4), noise(channels=4)
    opaque[..., 3] = 255
    save(tmp_path / "dog" / "clear.png", clear)
    save(tmp_path / "dog" / "opaque.png", opaque)
    save(tmp_path / "dog" / "grey.png", Image.fromarray(noise(channels=4)).convert("LA"))
    folder = read(tmp_path)
    check_mask(folder, "clear.png", clear[..., 3])
    check_mask(folder, "opaque.png", opaque[..., 3])
    item = folder.items[0]
    assert (item.mask, item.mask_sha256, item.content) == (item.path, item.sha256, f"{item.sha256} alpha")


def test_transparent_palettes_and_deep_grey(tmp_path: Path) -> None:
    indices = np.arange(24, dtype=np.uint8).reshape(6, 4)
    palette = Image.fromarray(indices)
    palette = palette.convert("P")
    save(tmp_path / "dog" / "palette.png", palette, transparency=bytes([7] * 10 + [255] * 14))
    deep = Image.fromarray(indices.astype(np.uint16) * 1000)
    save(tmp_path / "dog" / "deep.png", deep, transparency=3000)
    folder = read(tmp_path)
    check_mask(folder, "deep.png", np.where(indices == 3, 0, 255))
    stored = np.asarray(Image.open(tmp_path / "dog" / "palette.png"))
    check_mask(folder, "palette.png", np.where(stored < 10, 7, 255))


def test_masks_are_turned_with_their_pictures(tmp_path: Path) -> None:
    rgba, grey = noise(6, 4, 4), noise(6, 4)[..., 0]
    save(tmp_path / "dog" / "a.png", rgba, exif=TURNED)
    check_mask(read(tmp_path), "a.png", np.rot90(rgba[..., 3], -1))
    save(tmp_path / "masks" / "a.png", grey, exif=TURNED)
    check_mask(read(tmp_path, tmp_path / "masks"), "a.png", np.rot90(grey, -1))
    save(tmp_path / "masks" / "a.png", np.rot90(grey, -1).copy())
    check_mask(read(tmp_path, tmp_path / "masks"), "a.png", np.rot90(grey, -1))


def test_grey_pictures_of_the_same_name(tmp_path: Path) -> None:
    levels = noise()[..., 0]
    for name, ending in (("a.png", ".png"), ("sub/b.jpg", ".bmp"), ("c.png", ".tif")):
        save(tmp_path / "dog" / name, noise())
        save((tmp_path / "masks" / name).with_suffix(ending), levels)
    save(tmp_path / "masks" / "d.png", levels)
    folder = read(tmp_path, tmp_path / "masks")
    for item in folder.items:
        check_mask(folder, item.name, levels)
    assert folder.notes == ("masks without a picture, not used: d.png",)
    assert folder.items[1].mask == tmp_path / "masks" / "c.tif"
    assert folder.items[0].content == f"{folder.items[0].sha256} {folder.items[0].mask_sha256}"


def test_what_is_transparent_in_a_mask_is_black(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise())
    grey, alpha = noise()[..., :1], noise()[..., :1]
    save(tmp_path / "masks" / "a.png", np.concatenate([grey, alpha], -1))
    mask = mask_of(read(tmp_path, tmp_path / "masks").items[0])
    assert mask is not None
    np.testing.assert_allclose(mask * 255, grey[..., 0] * (alpha[..., 0] / 255), atol=1)


def test_the_mask_of_the_same_ending_comes_first(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise())
    levels = noise()[..., 0]
    save(tmp_path / "masks" / "a.bmp", noise()[..., 0])
    save(tmp_path / "masks" / "a.png", levels)
    check_mask(read(tmp_path, tmp_path / "masks"), "a.png", levels)
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "a.tif")
    assert f"a.png has several masks in {tmp_path}/masks: a.bmp, a.tif; keep one" in said(tmp_path, tmp_path / "masks")


def test_a_folder_of_masks_within_that_of_the_pictures(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise())
    save(tmp_path / "dog" / "masks" / "a.png", levels := noise()[..., 0])
    folder = read(tmp_path, tmp_path / "dog" / "masks")
    assert [item.name for item in folder.items] == ["a.png"]
    check_mask(folder, "a.png", levels)


def test_no_mask_where_none_is_wanted(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise(channels=4))
    item = read_image_folder(tmp_path / "dog").items[0]
    assert (item.mask, item.mask_sha256, mask_of(item), item.content) == (None, None, None, item.sha256)


def test_every_problem_is_named_with_its_remedy(tmp_path: Path) -> None:
    for stem in "abcdef":
        save(tmp_path / "dog" / f"{stem}.png", noise())
    masks = tmp_path / "masks"
    save(masks / "a.png", np.full((6, 4), 255, np.uint8))
    save(masks / "b.png", noise(4, 6)[..., 0])
    save(masks / "c.png", np.zeros((6, 4), np.uint8))
    save(masks / "D.png", noise()[..., 0])
    (masks / "e.png").write_bytes(b"")
    assert said(tmp_path, masks) == (
        f"{tmp_path}/dog has 5 problems:\n"
        f"  b.png is 4 x 6 px, but its mask {masks}/b.png 6 x 4; save the mask in the size of the upright picture\n"
        f"  c.png has a mask that is black all over, {masks}/c.png, so nothing of it is learned; paint white where to learn, "
        "or remove both\n"
        f"  d.png has no mask (did you mean {masks}/D.png?); add {masks}/d.png, white where to learn, or remove the picture\n"
        f"  {masks}/e.png is empty (0 bytes); copy it again from its source, or remove it\n"
        f"  f.png has no mask; add {masks}/f.png, white where to learn, or remove the picture\n"
        "Fix this, or pass --skip-broken to leave out what cannot be used and go on with 1 picture."
    )
    assert [item.name for item in read(tmp_path, masks, skip_broken=True).items] == ["a.png"]


@pytest.mark.parametrize(("level", "fine"), [(1, False), (31, False), (32, True)])
def test_a_mask_of_zeros_and_ones_is_refused(tmp_path: Path, level: int, fine: bool) -> None:
    save(tmp_path / "dog" / "a.png", noise())
    mask = save(tmp_path / "masks" / "a.png", np.eye(6, 4, dtype=np.uint8) * level)
    if fine:
        return check_mask(read(tmp_path, mask.parent), "a.png", np.eye(6, 4) * level)
    assert (
        f"a.png has a mask that is nearly black all over, {mask}: its brightest level is {level} of 255, so hardly anything is "
        "learned; save it with 255 where to learn (often 1 is meant as white)"
    ) in said(tmp_path, mask.parent)


def test_accents_may_be_encoded_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "dog" / unicodedata.normalize("NFC", "é.png"), noise())
    mask = save(tmp_path / "masks" / unicodedata.normalize("NFD", "é.png"), np.full((6, 4), 255, np.uint8))
    save(mask.with_suffix(".tif"), noise()[..., 0])
    folder = read(tmp_path, tmp_path / "masks")
    assert [item.mask for item in folder.items] == [mask]


def test_pictures_without_an_alpha_channel(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.jpg", noise())
    save(tmp_path / "dog" / "b.png", np.zeros((2, 2, 4), np.uint8))
    save(tmp_path / "dog" / "c.png", noise(channels=4))
    assert said(tmp_path).splitlines()[1:3] == [
        "  a.jpg has no alpha channel to take a mask from; cut out what is to be learned and save it as PNG, or move it to a "
        "folder without masks",
        "  b.png is transparent all over, so nothing of it is learned; make opaque what is to be learned, or remove it",
    ]


def test_folders_of_masks_that_cannot_be_used(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise())
    assert said(tmp_path, "Alhpa", ConfigError) == "masks is 'Alhpa'; Did you mean 'alpha'?"
    assert said(tmp_path, tmp_path / "dgo") == f"masks: There is no folder {tmp_path}/dgo; did you mean {tmp_path}/dog?"
    assert said(tmp_path, tmp_path / "dog", ConfigError).startswith(
        f"masks: {tmp_path}/dog holds the pictures themselves;"
    )
    file = tmp_path / "dog" / "a.png"
    assert said(tmp_path, file) == f"masks: {file} is a file; pass the folder that holds the masks, or alpha."
    (tmp_path / "masks").mkdir()
    assert said(tmp_path, tmp_path / "masks") == (
        f"masks: {tmp_path}/masks is empty; put the masks into it, or pass another."
    )


def test_a_picture_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.png", noise(channels=4))
    item = read(tmp_path).items[0]
    save(item.path, noise())
    with pytest.raises(
        DataError, match=r"a.png has lost its alpha channel; leave the pictures as they are while in use"
    ):
        mask_of(item)
