"""What is made of a picture before it is encoded: mirrored, cut elsewhere, in other colours.

Latents are cached, so there are finitely many variants of each picture; which place is cut and how far colours shift
follows from the picture and the number of the variant alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from visionlora.data.buckets import Framing
from visionlora.data.folder import ImageItem
from visionlora.data.images import decode
from visionlora.data.masks import Box, learned_box, mask_of
from visionlora.data.wording import first_names
from visionlora.errors import DataError


@dataclass(frozen=True)
class Made:
    """One variant of one picture."""

    pixels: npt.NDArray[np.uint8]
    """(h, w, 3)."""
    mask: npt.NDArray[np.float32] | None
    """How much each pixel counts, (h, w) in 0 … 1."""
    corner: tuple[int, int]
    """Top and left of the cut in the resized picture, px."""


@dataclass(frozen=True)
class Variant:
    """How one variant of every picture is made."""

    number: int = 0
    mirrored: bool = False
    random_crop: bool = False
    """Cut anywhere, not at the centre."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this share."""

    @property
    def key(self) -> str:
        """Tells variants apart in the cache; the plain one is the same in every run."""
        return repr(self)

    def make(self, picture: Image.Image, mask: npt.NDArray[np.float32] | None, sha256: str, framing: Framing) -> Made:
        """The variant of a picture.

        Args:
            picture: RGB.
            mask: of the same size, (h, w) in 0 … 1; a cut at random then has something of it.
            sha256: of its file, from which chance follows.
            framing: how it is cut.
        """
        dice = np.random.default_rng(int(hashlib.sha256(f"{sha256} {self.number}".encode()).hexdigest()[:16], 16))
        (rh, rw), (h, w) = framing.resized, framing.bucket
        top, left = framing.corner
        if self.random_crop:
            whole = (0, 0, picture.width, picture.height)
            wanted = whole if mask is None or not mask.any() else learned_box(mask)
            top = int(dice.integers(*places(rh, h, wanted[1] * rh / picture.height, wanted[3] * rh / picture.height)))
            left = int(dice.integers(*places(rw, w, wanted[0] * rw / picture.width, wanted[2] * rw / picture.width)))
        # Straight from the source box to the result, so that a strip of 1 x 10000 never becomes a giant on the way.
        box = framing.source((top, left))
        part = (
            picture.crop((left, top, left + w, top + h))
            if (rh, rw) == picture.size[::-1]
            else resized(picture, (w, h), box)
        )
        if self.colour_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                part = enhance(part).enhance(1 + self.colour_jitter * float(dice.uniform(-1, 1)))
        pixels = np.asarray(part, dtype=np.uint8)
        if mask is not None:
            mask = np.asarray(resized(Image.fromarray(mask, mode="F"), (w, h), box), dtype=np.float32).clip(0, 1)
        if self.mirrored:
            pixels, mask = pixels[:, ::-1], None if mask is None else mask[:, ::-1]
            left = rw - w - left
        return Made(np.ascontiguousarray(pixels), None if mask is None else np.ascontiguousarray(mask), (top, left))


def places(length: int, part: int, start: float, end: float) -> tuple[int, int]:
    """First place, and one past the last, of a part of a length that has something of what lies from `start` to `end`.

    >>> places(10, 4, 0, 10), places(10, 4, 0, 2), places(10, 4, 8.5, 10)
    ((0, 7), (0, 2), (5, 7))
    """
    return max(0, math.floor(start) - part + 1), min(length - part, math.ceil(end) - 1) + 1


def check_masks(items: Sequence[ImageItem], framings: Sequence[Framing], variants: Sequence[Variant]) -> None:
    """Raises DataError for pictures whose mask lies outside of what is cut from them: nothing of them would be learned."""
    if all(variant.random_crop for variant in variants):
        return
    lost = [
        item.name or str(item.path)
        for item, framing in zip(items, framings, strict=True)
        if item.learned is not None and not meets(item.learned, framing.source(framing.corner))
    ]
    if lost:
        raise DataError(
            f"The mask of {first_names(lost)} lies wholly outside of what is cut from the picture, so nothing of it is "
            "learned; cut the picture around it yourself, pass buckets=true or random_crop=true, or remove it."
        )


def meets(one: Box, other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, top, right, bottom) have something in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def made_of(item: ImageItem, framing: Framing, variants: Sequence[Variant]) -> list[Made]:
    """All variants of a picture, which is read once."""
    picture, mask = decode(item.path), mask_of(item)
    return [variant.make(picture, mask, item.sha256, framing) for variant in variants]


def resized(picture: Image.Image, size: tuple[int, int], box: tuple[float, ...]) -> Image.Image:
    """A part of a picture in another size, (w, h) px."""
    return picture.resize(size, Image.Resampling.LANCZOS, box=box)  # type: ignore[arg-type]


def variants(flip: bool, random_crop: bool, colour_jitter: float, count: int) -> tuple[Variant, ...]:
    """Those that a run draws from: one, or two with the mirrored one, times `count` where chance has a part in them.

    >>> len(variants(True, False, 0.0, 4)), len(variants(True, True, 0.1, 4))
    (2, 8)
    """
    numbers = range(count if random_crop or colour_jitter else 1)
    mirrorings = (False, True) if flip else (False,)
    return tuple(Variant(n, m, random_crop, colour_jitter) for n in numbers for m in mirrorings)
