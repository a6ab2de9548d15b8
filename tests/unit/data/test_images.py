from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from visionlora.data.images import IMAGE_SUFFIXES, as_seen, decode, decode_noted, fit, printable
from visionlora.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)


def said(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        decode_noted(path, shown=path.name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_rgb_is_kept_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    decoded = decode_noted(tmp_path / "a.png")
    assert decoded.note is None
    assert decoded.image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded.image), PIXELS)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "ppm", "pgm"])
def test_other_endings(tmp_path: Path, suffix: str) -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    grey.save(tmp_path / f"a.{suffix}", quality=100)
    assert f".{suffix}" in IMAGE_SUFFIXES
    decoded = np.asarray(decode(tmp_path / f"a.{suffix}")).astype(int)
    assert np.abs(decoded - PIXELS[..., :1]).max() <= 3


def test_16_bit_pgm_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 1\n4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.pgm"))[0, :, 0], [0, 128, 255])


def test_transparent_is_put_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 255, 128], [255, 255, 255, 3]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    decoded = decode_noted(tmp_path / "a.png")
    expected = [[[255, 255, 255], [10, 20, 30], [127, 177, 255], [255, 255, 255]]]
    np.testing.assert_array_equal(np.asarray(decoded.image), expected)
    assert decoded.note == "transparent, put on white"


def test_blending_is_rounded_to_nearest_for_every_alpha(tmp_path: Path) -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([colour, colour, colour, alpha], -1).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = np.floor((colour * alpha + 255.0 * (255 - alpha)) / 255 + 0.5)
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png"))[..., 0], expected)


def test_opaque_alpha_is_no_news(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).convert("RGBA").save(tmp_path / "a.png")
    decoded = decode_noted(tmp_path / "a.png")
    assert decoded.note is None
    np.testing.assert_array_equal(np.asarray(decoded.image), PIXELS)


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (7, 255))
    image.putpixel((1, 0), (7, 0))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), [[[7] * 3, [255] * 3]])


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_with_transparency(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    decoded = decode_noted(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decoded.image), [[[1, 2, 3], [255, 255, 255]]])
    assert decoded.note == "palette, converted to RGB; transparent, put on white"


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([1, 2, 3])
    image.save(tmp_path / "a.gif")
    decoded = decode_noted(tmp_path / "a.gif")
    np.testing.assert_array_equal(np.asarray(decoded.image), [[[1, 2, 3]]])
    assert decoded.note == "palette, converted to RGB"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    decoded = decode_noted(tmp_path / f"a.{suffix}")
    expected = np.floor(deep / 257.0 + 0.5)
    assert expected.max() == 255
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(decoded.image)[..., channel], expected)
    assert decoded.note == "16-bit, reduced to 8"


def test_grey_of_12_bits_in_16_is_said_to_be_dark(tmp_path: Path) -> None:
    for name, lightest in (("a", 4095), ("b", 8191), ("c", 8192), ("d", 0)):
        Image.fromarray(np.array([[0, lightest]], np.uint16)).save(tmp_path / f"{name}.png")
    decoded = decode_noted(tmp_path / "a.png")
    assert decoded.note == (
        "16-bit, reduced to 8; dark, as all its values are below 4096 of 65535: stretch them and save it again"
    )
    np.testing.assert_array_equal(np.asarray(decoded.image)[..., 0], [[0, 16]])
    dark = ["dark" in str(decode_noted(tmp_path / f"{name}.png").note) for name in "bcd"]
    assert dark == [True, False, False], "not where much of the range is used, nor black alone"


def test_32_bit_grey_within_16_bits_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 65535]], np.int32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif"))[..., 0], [[0, 1, 255]])


def test_deeper_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65536]], np.int32)).save(tmp_path / "a.tif")
    assert said(tmp_path / "a.tif") == (
        "a.tif stores 32-bit grey from 0 to 65536, for which white is not defined; save it with 8 or 16 bits"
    )


def test_fractional_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "a.tif")
    assert said(tmp_path / "a.tif") == (
        "a.tif stores grey as fractions, for which white is not defined; save it as 8-bit PNG"
    )


def test_one_bit_and_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    Image.fromarray(np.array([[9, 200]], np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "bit.png")), [[[255] * 3, [0] * 3]])
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "grey.png")), [[[9] * 3, [200] * 3]])


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    decoded = decode_noted(tmp_path / "a.jpg")
    assert decoded.note == "CMYK, converted to RGB"
    assert decoded.image.mode == "RGB"
    # Red, up to what JPEG itself loses: no ink of one kind, full ink of the others.
    assert np.abs(np.asarray(decoded.image).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("white", [0, 1])
def test_16_bit_tiff_says_what_white_is(tmp_path: Path, white: int) -> None:
    deep = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.tif", tiffinfo={262: white})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == white
    decoded = decode_noted(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(decoded.image)[..., 0], [[0, 1, 255] if white else [255, 254, 0]])
    assert decoded.rule == ("" if white else "white is zero, turned round")


# Colour profiles.


def profile(swap: bool = False) -> bytes:
    """sRGB's, or the same with red and green swapped."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if swap:
        red, green = content.index(b"rXYZ"), content.index(b"gXYZ")
        content[red : red + 4], content[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(content)


def test_srgb_profile_is_no_news(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", icc_profile=profile())
    decoded = decode_noted(tmp_path / "a.png")
    assert (decoded.note, decoded.rule) == (None, "")
    np.testing.assert_array_equal(np.asarray(decoded.image), PIXELS)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_other_profile_is_converted(tmp_path: Path, suffix: str) -> None:
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:] = [200, 10, 60]
    Image.fromarray(colours).save(
        tmp_path / f"a.{suffix}", icc_profile=profile(swap=True), quality=100, subsampling=0, lossless=True
    )
    decoded = decode_noted(tmp_path / f"a.{suffix}")
    assert decoded.note == decoded.rule == "colour profile, converted to sRGB"
    assert np.abs(np.asarray(decoded.image).astype(int) - [10, 200, 60]).max() <= 4


def test_profile_with_palette_transparency_and_turned(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 60, 4, 5, 6])
    image.putpixel((1, 0), 1)
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.png", transparency=1, icc_profile=profile(swap=True), exif=exif)
    decoded = decode_noted(tmp_path / "a.png")
    assert np.abs(np.asarray(decoded.image).astype(int) - [[[255, 255, 255], [10, 200, 60]]]).max() <= 2
    assert decoded.note == (
        "palette, converted to RGB; colour profile, converted to sRGB; transparent, put on white; turned upright by its EXIF "
        "orientation"
    )


@pytest.mark.parametrize("cut", [0, 60, 200])
def test_a_broken_profile_is_passed_over(tmp_path: Path, cut: int) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", icc_profile=profile(swap=True)[:cut] + b"x")
    decoded = decode_noted(tmp_path / "a.png")
    assert decoded.note is None
    np.testing.assert_array_equal(np.asarray(decoded.image), PIXELS)


def test_a_profile_of_another_kind_of_picture_is_passed_over(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100, icc_profile=profile(swap=True))
    assert decode_noted(tmp_path / "a.jpg").note == "CMYK, converted to RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    stored = PIXELS
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    decoded = decode_noted(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decoded.image), upright)
    assert decoded.note == (None if orientation == 1 else "turned upright by its EXIF orientation")


def test_a_decoded_picture_is_as_seen(tmp_path: Path) -> None:
    """Seen again it was turned again, and a colour of the same value as the clear one became white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(turned := tmp_path / "turned.png", exif=exif)
    palette = Image.frombytes("P", (2, 1), bytes([1, 2]))
    palette.putpalette([0] * 6 + [200, 30, 30] + [0] * 759)
    palette.save(clear := tmp_path / "clear.png", transparency=0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(profiled := tmp_path / "profiled.png", icc_profile=profile)
    for path in (turned, clear, profiled):
        with Image.open(path) as opened:
            once = as_seen(opened)
        for seen in (once, decode(path)):
            assert np.array_equal(np.asarray(as_seen(seen)), np.asarray(once)), path.name
            assert not seen.info and not seen.getexif()


def test_tiff_orientation_is_applied_once(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.tif")), np.rot90(PIXELS, -1))


def test_broken_exif_does_not_spoil_the_picture(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), PIXELS)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    decoded = decode_noted(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(decoded.image), np.full((2, 2, 3), [255, 0, 0]))
    assert decoded.note == "the first of 2 frames"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", "a.png is not a picture (its content is text); remove it or rename it"),
        ("\u00e9".encode() * 400, "a.png is not a picture (its content is text); remove it or rename it"),
        (b"x" + "\u00e9".encode() * 400, "a.png is not a picture (its content is text); remove it or rename it"),
        (b"\x80\x00\x01", "a.png is not a picture (its content is of no known kind); remove it or rename it"),
        (b"a\x00b", "a.png is not a picture (its content is of no known kind); remove it or rename it"),
        (
            b"<!DOCTYPE html><html>",
            "a.png is not a picture (its content is a web page); download the picture itself, or remove it",
        ),
        (b"<svg width='1'/>", "a.png is not a picture (its content is an SVG drawing); export it as PNG"),
        (
            b"%!PS-Adobe-3.0 EPSF",
            "a.png is not a picture (its content is a PostScript document); export its page as PNG",
        ),
        (b"PK\x03\x04...", "a.png is not a picture (its content is a ZIP archive); unpack it"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a.png is not a picture (its content is a Git LFS pointer); fetch the picture with `git lfs pull`",
        ),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a.png is a HEIC photo, which Pillow cannot open; export it as JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a.png is not a picture (its content is a video); remove it or rename it"),
        (
            b"\0" * 600,
            "a.png is not a picture (its content is only zero bytes); copy it again from its source, or remove it",
        ),
        (b"", "a.png is empty (0 bytes); copy it again from its source, or remove it"),
        (
            b"RIFF\x10\0\0\0WEB",
            "a.png begins like a WebP picture but is damaged; copy it again from its source, or remove it",
        ),
        (b"\x89PNG\r\n", "a.png begins like a PNG picture but is damaged; copy it again from its source, or remove it"),
    ],
)
def test_not_a_picture(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert said(tmp_path / "a.png") == message


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif"])
def test_cut_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert said(path) == (
        f"a.{suffix} is cut off (the end of its data is missing); copy it again from its source, or remove it"
    )


@pytest.mark.parametrize("limit", [99, 40])  # Pillow only warns up to twice its limit
def test_bomb(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert said(tmp_path / "a.png") == (
        f"a.png has 100 pixels, more than the limit of {limit}; make it smaller or remove it"
    )


def test_missing_file(tmp_path: Path) -> None:
    assert said(tmp_path / "a.png") == (
        "a.png cannot be read (No such file or directory); check that it is there and readable"
    )


def test_printable() -> None:
    assert printable("a\x1b[31m\n\udcff é.png") == r"a\x1b[31m\n\udcff é.png"


def test_fit_keeps_what_already_fits() -> None:
    image = Image.fromarray(PIXELS)
    fitted = fit(image, (6, 4))
    assert fitted.dtype == np.uint8
    np.testing.assert_array_equal(fitted, PIXELS)
    fitted[:] = 0  # an array of its own
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(("size", "rows"), [(4, slice(1, 5)), ((3, 4), slice(1, 4))])
def test_fit_crops_the_centre_without_resampling(size: int | tuple[int, int], rows: slice) -> None:
    np.testing.assert_array_equal(fit(Image.fromarray(PIXELS), size), PIXELS[rows])


def test_fit_resizes_as_pillow_does() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((12, 12), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(fit(image, 12), expected)


def test_fit_of_a_thin_strip() -> None:
    strip = np.zeros((1, 5000, 3), np.uint8)
    strip[:, 2400:2600] = 255
    np.testing.assert_array_equal(fit(Image.fromarray(strip), 64), np.full((64, 64, 3), 255))


@pytest.mark.parametrize("size", [(7, 5), (5, 7), 1, 33])
def test_fit_gives_the_asked_size(size: int | tuple[int, int]) -> None:
    h, w = (size, size) if isinstance(size, int) else size
    assert fit(Image.new("RGB", (13, 17)), size).shape == (h, w, 3)


def test_fit_refuses_other_modes_and_sizes() -> None:
    with pytest.raises(ValueError, match="not mode L"):
        fit(Image.new("L", (2, 2)), 2)
    with pytest.raises(ValueError, match="0 x 4 is no size"):
        fit(Image.new("RGB", (2, 2)), (0, 4))
