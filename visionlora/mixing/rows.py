"""Rows of a batch: which picture each belongs to, under guidance and where a model is evaluated several times."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import ConfigError

GUIDED_TWICE = re.compile(r"StableDiffusion(XL)?(ControlNet)?(Img2Img|Inpaint)?Pipeline")
"""Pipelines that give the UNet every picture once, or twice under classifier-free guidance."""


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The rows that a model is called with."""
    return len(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1))


def knows_pictures(target: Any) -> bool:
    """Whether the rows of its UNet say how many pictures a pipeline draws."""
    return GUIDED_TWICE.fullmatch(type(target).__name__) is not None


def check_pictures(target: Any, given: int, rows: int) -> None:
    """Raises ConfigError when such a pipeline gives its UNet the rows of more or fewer pictures than there are scales for."""
    guided = getattr(target, "do_classifier_free_guidance", None)  # as of the last picture: None before the first
    drawn, rest = divmod(rows, 2 if guided else 1)
    if guided is not None and not rest and drawn != given:
        raise ConfigError(
            f"There are scales for {given} pictures, and a batch of {drawn} is drawn: give one per picture of the batch."
        )


def of_prompts(images: Tensor, rows: int) -> Tensor:
    """Factors by picture as factors by prompt, for a text encoder: several pictures may be drawn for one prompt.

    Raises:
        ConfigError: when pictures of one prompt differ.
    """
    each, rest = divmod(len(images), rows)
    if rest or each < 2:
        return images
    by_prompt = images.view(rows, each)
    if bool((by_prompt != by_prompt[:, :1]).any()):
        raise ConfigError(
            f"There are scales for {len(images)} pictures of {rows} prompt{'s' * (rows > 1)}. The text encoder reads a prompt "
            "once for all its pictures, so their scales must be the same: give every picture a prompt of its own, the same "
            "one if need be, or leave the text encoder out (blocks={'text_encoder': 0})."
        )
    return by_prompt[:, 0].contiguous()


def tiled(images: Tensor, rows: int) -> Tensor:
    """One factor per picture -> one per row, pictures following each other.

    Raises:
        ConfigError: when the rows are no whole batches.
    """
    if rows % len(images):
        raise ConfigError(
            f"There are scales for {len(images)} pictures, and {rows} rows: give one per picture of the batch."
        )
    return images.repeat(rows // len(images))


def repeated(value: Any, rows: int, times: int) -> Any:
    """Every tensor of `rows` rows several times in a row, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return torch.cat([value] * times) if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {k: repeated(v, rows, times) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(repeated(v, rows, times) for v in value)
    return value
