"""Colour profiles: from the numbers that a file stores to the colours that are meant, in sRGB.

In: a picture and the profile in its file. Out: an RGB picture; or None where the numbers are sRGB's already, or the profile
is broken or of another kind of picture, which viewers pass over too.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# What a profile describes -> modes of pictures it can be of, and the mode they are handed over in.
_SPACES = {
    "RGB": (("RGB", "RGBA", "RGBX", "P", "PA", "L", "LA"), "RGB"),
    "GRAY": (("L", "LA"), "L"),
    "CMYK": (("CMYK",), "CMYK"),
}
_UNSEEN = 2  # levels of 255: names of profiles say little, so those that change no more than this count as sRGB


def in_srgb(image: Image.Image, profile: object) -> Image.Image | None:
    """The picture in sRGB, mode RGB and without its alpha channel; None where its profile is not needed or not usable.

    Args:
        image: as Pillow opens it.
        profile: the bytes of its ICC profile, if it has one.
    """
    if not profile or not isinstance(profile, bytes):
        return None
    try:
        found = _conversion(profile)
        if found is None or image.mode not in found[0]:
            return None
        _, mode, transform = found
        return transform.apply(image if image.mode == mode else image.convert(mode))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):  # broken, or Pillow without LittleCMS
        return None


@lru_cache(maxsize=8)
def _conversion(content: bytes) -> tuple[tuple[str, ...], str, ImageCms.ImageCmsTransform] | None:
    """Modes of the pictures, the mode they are handed over in, and the way to sRGB; None where there is none to go."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    space = _SPACES.get(profile.profile.xcolor_space.strip())
    if space is None:
        return None
    modes, mode = space
    # Without its cache a transform may serve several threads.
    flags = ImageCms.Flags.NOCACHE
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    if mode != "CMYK":
        levels = np.linspace(0, 255, 17).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
        colours = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
        seen, stored = (np.asarray(i, np.int16) for i in (transform.apply(colours), colours.convert("RGB")))
        if np.abs(seen - stored).max() <= _UNSEEN:
            return None
    return modes, mode, transform
