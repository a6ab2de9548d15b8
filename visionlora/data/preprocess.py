"""From a decoded picture to a classifier's input, the same way in training, in evaluation and in `predict`.

In: an RGB `PIL.Image`. Out: float32 (n, 3, size, size). The steps in between are open, as training keeps pictures at their
stored size on disk and cuts them anew each time.
Letters in shapes: n pictures, s side of a stored picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from visionlora.data.images import fit
from visionlora.errors import ConfigError, nearest

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone wants its pictures to look like; the names are timm's.

    Raises:
        ConfigError: for an interpolation or crop that does not exist, or a number out of range.
    """

    size: int
    """Side of the input, px."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Of each channel, of values 0 to 1."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Of each channel, of values 0 to 1."""
    interpolation: str = "bicubic"
    """nearest, bilinear, bicubic or lanczos."""
    crop_pct: float = 1.0
    """Share of the side that the centre crop keeps, above 0 up to 1."""
    crop_mode: str = "center"
    """center: what sticks out of a square is cut off; squash: the picture is pressed into a square."""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation is {self.interpolation!r}. {nearest(self.interpolation, INTERPOLATIONS)}")
        if self.crop_mode not in CROP_MODES:
            raise ConfigError(f"crop_mode is {self.crop_mode!r}. {nearest(self.crop_mode, CROP_MODES)}")
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"A picture of {self.size} px, {self.crop_pct:g} of its side, cannot be made: the size must be at least "
                "1 px and the share above 0 and at most 1."
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ConfigError("mean and std must be three numbers each, those of std positive.")

    @property
    def stored_size(self) -> int:
        """Side of a picture before the centre crop, px."""
        return max(self.size, math.floor(self.size / self.crop_pct))

    def stored(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """An RGB picture as a square before the crop, uint8 (s, s, 3)."""
        side, resample = self.stored_size, INTERPOLATIONS[self.interpolation]
        if self.crop_mode == "squash":
            return np.array(image.resize((side, side), resample), dtype=np.uint8)
        return fit(image, side, resample)

    def cropped(self, stored: Tensor) -> Tensor:
        """The centre of stored pictures, (n, 3, s, s) -> (n, 3, size, size)."""
        start = (stored.shape[-1] - self.size) // 2
        return stored[..., start : start + self.size, start : start + self.size]

    def normalised(self, pictures: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) -> float32 of the wanted mean and spread."""
        mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pictures.float() / 255 - mean) / std

    def batch(self, stored: npt.NDArray[np.uint8]) -> Tensor:
        """Stored pictures, uint8 (n, s, s, 3), as the model reads them, float32 (n, 3, size, size)."""
        return self.normalised(self.cropped(torch.from_numpy(stored).permute(0, 3, 1, 2)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON header."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)
