"""From an image processor of transformers to `Preprocessing`: what it does to a picture, in timm's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from visionlora.data.preprocess import Preprocessing
from visionlora.errors import ModelError

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
USUAL_SIZE = 224
"""Side of the input, px, of a model that does not say."""
WHOLE_FROM = 384
"""Side of the input, px, from which ConvNeXt's processor presses pictures into a square and crops nothing."""
LEVIT = 256 / 224
"""By how much LeViT's processor makes the short side longer than it says."""
BYTE = 255.0


def as_preprocessing(id: str, processor: Mapping[str, Any], image_size: Any) -> Preprocessing:
    """What an image processor does to a picture.

    Args:
        id: of the model, for messages.
        processor: its settings; empty for a model that has none.
        image_size: of the model's config: px, a pair of them, or None.

    Raises:
        ModelError: when it does what visionlora cannot.
    """
    if processor.get("do_flip_channel_order"):
        raise ModelError(
            f"{id} reads pictures as BGR (do_flip_channel_order of its image processor), visionlora gives RGB. Choose a model "
            "that reads RGB; of MobileViT there are such ones in timm: --model mobilevit_s, mobilevit_xs or mobilevitv2_100."
        )
    size, short, squash = sides(processor, image_size)
    share = min(1.0, size / short)
    if math.floor(size / share) != max(size, short):
        share = size / (short + 0.5)  # what rounds to the short side again
    mean, std = of_channels(processor)
    resample = processor.get("resample")
    interpolation = RESAMPLE.get(2 if resample is None else int(resample), "bilinear")
    return Preprocessing(size, mean, std, interpolation, share, "squash" if squash else "center")


def sides(processor: Mapping[str, Any], image_size: Any) -> tuple[int, int, bool]:
    """Side of the input, short side before the crop (px), and whether the picture is pressed into a square."""
    wanted = processor.get("size") if processor.get("do_resize", True) else None
    squash = isinstance(wanted, Mapping) and bool(wanted.get("height"))
    crop = side_of(processor.get("crop_size")) if processor.get("do_center_crop") else None
    short = side_of(wanted)
    if short and (share := processor.get("crop_pct")):
        whole = crop is None and short >= WHOLE_FROM
        crop, short, squash = crop or short, short if whole else int(short / share), whole
    elif short and not squash and str(processor.get("image_processor_type")).startswith("Levit"):
        short = int(LEVIT * short)
    size = crop or short or side_of(image_size) or USUAL_SIZE
    return size, short or size, squash


def side_of(given: Any) -> int | None:
    """A side in px, of a number, a pair, or a table by transformers' names; None for none."""
    if isinstance(given, Mapping):
        given = given.get("shortest_edge") or given.get("height")
    elif isinstance(given, list | tuple):
        given = given[0] if given else None
    return int(given) if given else None


def of_channels(processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread, of values 0 to 1, that make of a picture what the processor makes of it."""
    normalises = bool(processor.get("do_normalize")) if processor else True
    mean = tuple(processor.get("image_mean") or (0.5,) * 3) if normalises else (0.0,) * 3
    std = tuple(processor.get("image_std") or (0.5,) * 3) if normalises else (1.0,) * 3
    if normalises and processor.get("include_top"):  # EfficientNet's divides twice
        std = tuple(s * s for s in std)
    rescales = bool(processor.get("do_rescale", True))
    factor = BYTE * float(processor.get("rescale_factor") or 1 / BYTE) if rescales else BYTE
    if rescales and processor.get("rescale_offset"):  # from -1 on
        mean = tuple(m + 1 for m in mean)
    if abs(factor - 1) < 1e-6:
        return mean, std
    return tuple(m / factor for m in mean), tuple(s / factor for s in std)
