"""Pictures that drawing starts from or follows, as a person sees them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.diffusion.given import Given, check_regions, shape_of, sized
from visionlora.diffusion.recipe import Recipe
from visionlora.errors import DataError


def test_a_photo_is_upright(tmp_path: Path) -> None:
    photo, turned = Image.new("RGB", (64, 32), "white"), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 32, 32))
    turned[0x0112] = 6
    photo.save(tmp_path / "phone.jpg", exif=turned, quality=95)
    start = Given.of(tmp_path / "phone.jpg").start
    assert start is not None and start.size == (32, 64)
    assert start.getpixel((16, 8))[1] < 20 and start.getpixel((16, 56))[1] > 235, "what was left is above"
    assert shape_of(tmp_path / "phone.jpg", None) == (32, 64) and shape_of(None, None) == (1, 1)


def test_depth_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)).save(tmp_path / "depth.png")
    control = Given.of(control=tmp_path / "depth.png").control
    assert control is not None and len(set(np.asarray(control)[..., 0].ravel().tolist())) == 256


def test_nothing_shows_through_what_is_transparent(tmp_path: Path) -> None:
    """The picture is on white; masks, and pictures to follow, are on black."""
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((10, 200, 30, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "alpha.png")
    given = Given.of(*[tmp_path / "alpha.png"] * 3)
    start, mask, control = (picture.getpixel((7, 0)) for picture in (given.start, given.mask, given.control))
    assert (start, mask, control) == ((255, 255, 255), 0, (0, 0, 0))
    assert given.start.getpixel((0, 0)) == given.control.getpixel((0, 0)) == (10, 200, 30)


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"The picture to follow cannot be read: .*a\.png is not a picture"):
        Given.of(control=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("shape", "width", "height", "expected"),
    [
        ((1, 1), None, None, (32, 32)),
        ((1, 1), 64, None, (64, 64)),
        ((1, 1), None, 48, (48, 48)),
        ((96, 32), None, None, (56, 16)),
        ((96, 32), None, 32, (96, 32)),
        ((3000, 4000), None, None, (24, 40)),
        ((96, 32), 40, 40, (40, 40)),
        ((1, 1), 33, None, (33, 32)),
        ((9000, 1), None, None, (3032, 8)),
    ],
)
def test_sizes_follow_the_picture(
    shape: tuple[int, int], width: int | None, height: int | None, expected: tuple[int, int]
) -> None:
    assert sized(shape, width, height, 32, 8) == expected


def test_a_mask_of_a_region_has_the_shape_of_the_picture(tmp_path: Path) -> None:
    masks = {size: str(tmp_path / f"{size[0]}.png") for size in ((32, 128), (96, 100))}
    for size, path in masks.items():
        Image.new("L", size, 255).save(path)
    wrong, fine = (
        Recipe(
            "a", "m", 32, 32, compose="regional", compose_options={"regions": {"dog": masks[size], "ink": [0, 0, 1, 1]}}
        )
        for size in masks
    )
    check_regions([fine, Recipe("a", "m", 32, 32)])
    with pytest.raises(
        DataError, match=r"The mask of 'dog', .*, is 32x128 px and would be stretched over pictures of 32x32"
    ):
        check_regions([fine, wrong])
