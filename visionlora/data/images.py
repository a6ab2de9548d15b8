"""One picture file to the pixels a person sees, or to one sentence that says why not.

In: a file. Out: an upright sRGB `PIL.Image` on white (`decode`), or a uint8 array of a wanted size (`fit`).

Letters: `h`, `w` height and width in pixels.
"""

from __future__ import annotations

import codecs
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from visionlora.data.profiles import in_srgb
from visionlora.errors import DataError

IMAGE_SUFFIXES = tuple(".avif .bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
"""File name endings (in lower case) that count as a picture."""

# Only these readers are tried. Pillow has more, and one of them (EPS) would start Ghostscript on the file.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PROFILE = "colour profile, converted to sRGB"
_CMYK_PROFILE = "CMYK, converted to RGB by its colour profile"
_INVERTED = "white is zero, turned round"
_RULES = (_PROFILE, _CMYK_PROFILE, _INVERTED)  # notes on how numbers were read
_DARK = 8192  # of 65536: what cameras and scanners of 12 or 13 bits leave, nearly black
_WHITE_IS = 262  # the tag of a TIFF that says it

_REMOVE = "remove it or rename it"
_COPY = "copy it again from its source, or remove it"

# How a file begins -> what it is, what to do with it.
_NOT_PICTURES = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the picture with `git lfs pull`"),
    (b"%PDF", "a PDF document", "export its page as PNG"),
    (b"%!PS", "a PostScript document", "export its page as PNG"),
    (b"8BPS", "a Photoshop document", "export it as PNG"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
)
_PICTURES = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)


@dataclass(frozen=True)
class Decoded:
    """A picture and what had to be done to it."""

    image: Image.Image
    """Upright, mode RGB."""
    note: str | None
    """What was converted, e.g. `CMYK, converted to RGB`; None where the file was plain."""
    alpha: Image.Image | None = None
    """The alpha channel, upright, mode L; None where the file has none."""
    rule: str = ""
    """How its numbers were read where they are not plain sRGB: with the file's bytes it says what the pixels are."""


class _Unusable(Exception):
    """A picture that Pillow reads but that has no defined look; the text goes after the file's name."""


def printable(name: str | Path) -> str:
    r"""A file name that is safe to print: control characters and undecodable bytes are escaped.

    >>> printable("a\nb.png")
    'a\\nb.png'
    """
    text = name.as_posix() if isinstance(name, Path) else name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def legible(name: str) -> str:
    r"""A file name without the bytes that are no UTF-8, which archives of other systems leave in names.

    >>> legible("caf\udce9 1")
    'caf 1'
    """
    return name.encode("utf-8", "ignore").decode("utf-8")


def decode(path: Path) -> Image.Image:
    """The picture as a person sees it: upright, sRGB, transparent parts white.

    Raises:
        DataError: one sentence that says what is wrong with the file and what to do.
    """
    return decode_noted(path).image


def as_seen(image: Image.Image) -> Image.Image:
    """An opened picture as `decode` would give it: upright by its EXIF, sRGB, transparent parts white, 16 bits brought to 8.

    Raises:
        DataError: when its colours have no defined look.
    """
    try:
        return _upright(image).image
    except _Unusable as error:
        raise DataError(f"The picture {error}") from None


def decode_noted(path: Path, shown: str | None = None) -> Decoded:
    """Like `decode`, and says what was converted.

    Not for several threads at once: it sets the warning filters, which belong to the whole process.

    Args:
        path: the file.
        shown: how messages name the file; the path when not given.
    """
    name = printable(shown if shown is not None else path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); check that it is there and readable") from None
    if not head:
        raise DataError(f"{name} is empty (0 bytes); {_COPY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{name} {_too_large(str(error))}") from None
    except _Unusable as error:
        raise DataError(f"{name} {error}") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} {_not_a_picture(head)}") from None
    except Exception as error:  # Pillow's readers raise whatever broken bytes lead to, from IndexError to zlib.error
        raise DataError(f"{name} {_damaged(error)}") from None


def decode_again(path: Path) -> Image.Image:
    """Like `decode`, for a file that it has decoded before; also for several threads at once.

    The warning filters are left as they are.

    Raises:
        DataError: when the file can no longer be decoded.
    """
    try:
        return _decode(path).image
    except Exception as error:  # see decode_noted
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{printable(path)} could be read before but not any more ({printable(reason)}); leave the pictures as they are "
            "while they are in use"
        ) from None


def fit(
    image: Image.Image, size: int | tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> npt.NDArray[np.uint8]:
    """The centre of the picture at the wanted size, as a uint8 array `(h, w, 3)`.

    The short side is made to fit and what sticks out is cut off evenly on both sides. Where the scale is 1 the pixels
    are copied, not resampled.

    Args:
        image: an RGB picture, as `decode` returns it.
        size: the side of a square in pixels, or `(h, w)`.
        resample: how.
    """
    if image.mode != "RGB":
        raise ValueError(f"fit takes the RGB picture that decode returns, not mode {image.mode}.")
    h, w = (size, size) if isinstance(size, int) else size
    if h < 1 or w < 1:
        raise ValueError(f"fit: {h} x {w} is no size; both sides must be at least 1 pixel.")
    box_w, box_h = float(image.width), float(image.height)
    if w * image.height >= h * image.width:
        box_h = h * image.width / w
    else:
        box_w = w * image.height / h
    if (box_w, box_h) == (w, h):
        left, top = (image.width - w) // 2, (image.height - h) // 2
        return np.array(image.crop((left, top, left + w, top + h)), dtype=np.uint8)
    # The source box is resampled straight to the result: a strip of 1 x 10000 never becomes 512 x 5120000 on the way.
    x, y = (image.width - box_w) / 2, (image.height - box_h) / 2
    box = (x, y, min(x + box_w, image.width), min(y + box_h, image.height))
    return np.array(image.resize((w, h), resample, box=box), dtype=np.uint8)


def _decode(path: Path) -> Decoded:
    Image.init()
    with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
        notes = []
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # the further frames of an MPO are previews of the same photo
            notes.append(f"the first of {frames} frames")
        found = _upright(image)
    note = "; ".join([*notes, *([found.note] if found.note else [])]) or None
    return replace(found, note=note)


def _upright(image: Image.Image) -> Decoded:
    image.load()
    # After load: only then has a PNG been read to its end, and a TIFF been turned by Pillow itself.
    method = _UPRIGHT.get(_orientation(image))
    rgb, alpha, notes = _to_rgb(image)
    if method is not None:
        rgb, alpha = rgb.transpose(method), alpha and alpha.transpose(method)
        notes.append("turned upright by its EXIF orientation")
    rgb.info = {}  # what it said (which side is up, which colour is clear) has been done, and must not be done again
    return Decoded(rgb, "; ".join(notes) or None, alpha, "; ".join(note for note in notes if note in _RULES))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF does not spoil the pixels; viewers show such a picture as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The colours on white, the alpha channel if there is one, and what was converted."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;"):
        return _deep_grey_to_rgb(image)
    if mode == "F":
        raise _Unusable("stores grey as fractions, for which white is not defined; save it as 8-bit PNG")
    if mode == "LAB":
        raise _Unusable("stores Lab colours, which Pillow cannot show; save it as RGB")
    notes = ["palette, converted to RGB"] if mode in ("P", "PA") else []
    converted = in_srgb(image, image.info.get("icc_profile"))
    if mode == "CMYK":
        notes.append(_CMYK_PROFILE if converted else "CMYK, converted to RGB")
    elif converted:
        notes.append(_PROFILE)
    mask = None
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        colour, alpha = rgba[..., :3] if converted is None else np.asarray(converted).astype(np.uint16), rgba[..., 3:]
        mask = Image.fromarray(alpha[..., 0].astype(np.uint8))
        if alpha.min() < 255:
            # Rounded to nearest; the largest sum is 255 * 255 + 127, which a uint16 still holds.
            on_white = (colour * alpha + 255 * (255 - alpha) + 127) // 255
            return Image.fromarray(on_white.astype(np.uint8)), mask, [*notes, "transparent, put on white"]
    return converted or image.convert("RGB"), mask, notes


def _deep_grey_to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """16-bit grey to 8 bits: 65535 becomes 255. Pillow's own conversion would clip all above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _Unusable(
            f"stores 32-bit grey from {values.min()} to {values.max()}, for which white is not defined; "
            "save it with 8 or 16 bits"
        )
    notes = ["16-bit, reduced to 8"]
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_WHITE_IS) == 0:
        values = 65535 - values  # of 8 bits Pillow does it itself
        notes.append(_INVERTED)
    above = 1 << int(values.max()).bit_length()  # a power of two, so that pictures of a set say the same
    if 1 < above <= _DARK:
        notes.append(f"dark, as all its values are below {above} of 65535: stretch them and save it again")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if converted := in_srgb(Image.fromarray(grey), image.info.get("icc_profile")):
        grey = np.array(converted)
        notes.append(_PROFILE)
    clear, mask = image.info.get("transparency"), None
    if isinstance(clear, int):
        mask = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        if (values == clear).any():
            grey[values == clear] = 255
            notes.append("transparent, put on white")
    return Image.fromarray(grey).convert("RGB"), mask, notes


def _too_large(message: str) -> str:
    found = re.search(r"\((\d+) pixels\)", message)
    pixels = f"{int(found.group(1)):,} pixels" if found else "too many pixels"
    limit = f"{Image.MAX_IMAGE_PIXELS:,}" if Image.MAX_IMAGE_PIXELS else "what is allowed"
    return f"has {pixels}, more than the limit of {limit}; make it smaller or remove it"


def _damaged(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in reason.lower():
        return f"is cut off (the end of its data is missing); {_COPY}"
    return f"is damaged ({printable(reason)}); {_COPY}"


def _not_a_picture(head: bytes) -> str:
    kind = next((kind for start, kind in _PICTURES if head.startswith(start)), None)
    if head[:4] == b"RIFF" and head[8:12] in b"WEBP":  # also where the file ends before these four letters do
        kind = "WebP"
    if kind is not None:
        return f"begins like a {kind} picture but is damaged; {_COPY}"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "is an AVIF picture that is damaged or that this Pillow cannot open; save it as PNG"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1"):
        return "is a HEIC photo, which Pillow cannot open; export it as JPEG"
    content, remedy = _content(head)
    return f"is not a picture (its content is {content}); {remedy}"


def _content(head: bytes) -> tuple[str, str]:
    """What a file that is no picture holds, and what to do with it."""
    for start, content, remedy in _NOT_PICTURES:
        if head.startswith(start):
            return content, remedy
    if not head.strip(b"\x00"):
        return "only zero bytes", _COPY
    if head[4:8] == b"ftyp":
        return "a video", _REMOVE
    text = head.lower().lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page", "download the picture itself, or remove it"
    if b"<svg" in text:
        return "an SVG drawing", "export it as PNG"
    try:
        # Not final: the 512 bytes may end within a character.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=False)
    except UnicodeDecodeError:
        return "of no known kind", _REMOVE
    return ("of no known kind" if b"\x00" in head else "text"), _REMOVE
