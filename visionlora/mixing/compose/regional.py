"""Regional: each adapter draws its own part of the picture; the predictions are blended by soft masks.

Every step evaluates the model once per adapter and once without any, in one batch. Cross-attention and normalisation see the
whole picture in every evaluation, so the parts fit together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visionlora.data.images import decode_noted
from visionlora.data.masks import grey
from visionlora.diffusion.given import MOST_STRETCHED
from visionlora.errors import ConfigError, DataError, nearest
from visionlora.lora.adapter import Adapter
from visionlora.mixing.compose.base import Composition
from visionlora.mixing.scales import is_number, plain

Region = "tuple[float, float, float, float] | Tensor | np.ndarray[Any, Any] | Image.Image | str | Path"
FINE = 512
"""Side on which boxes are drawn before they are resized to the latents."""


class Regional(Composition):
    """One region per adapter.

    Args:
        regions: adapter -> box (left, top, right, bottom, each 0 to 1), or a mask (picture, array or file; white is inside).
        softness: width of the soft edge as a share of the picture, 0 for hard edges.

    Raises:
        ConfigError: when a box is out of order, or a mask cannot be read or is none.
    """

    def __init__(self, regions: Mapping[str, Any] | None = None, softness: float = 0.05) -> None:
        if not regions or not isinstance(regions, Mapping):
            raise ConfigError(
                "Composition 'regional' needs a region per adapter: regions={'dog': (0, 0, 0.5, 1), …}, on the command line "
                "--region dog=0,0,0.5,1 for each."
            )
        softness = plain(softness)
        if not is_number(softness) or not 0 <= softness <= 0.5:
            raise ConfigError(f"softness is {softness!r}; it must be between 0 and 0.5 of the picture.")
        self.masks = {name: blurred(mask_of(name, region), softness) for name, region in regions.items()}
        self.boxes = {name for name, region in regions.items() if isinstance(region, (tuple, list))}
        """Regions that are of any shape of picture."""

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """As they are.

        Raises:
            ConfigError: when an adapter has no region or a region no adapter.
        """
        for name in self.masks:
            if name not in adapters:
                raise ConfigError(f"There is a region for {name!r}, which is not attached. {nearest(name, adapters)}")
        for name in adapters:
            if name not in self.masks:
                raise ConfigError(f"Adapter {name!r} has no region: give it a box or a mask, (0, 0, 1, 1) for all.")
        return dict(adapters)

    def evaluations(self, names: Sequence[str]) -> list[dict[str, float]]:
        """The base alone, then each adapter alone; the region of one at scale 0 is as if it were not there."""
        self.names = list(names)
        return [dict.fromkeys(names, 0.0), *({other: float(other == name) for other in names} for name in names)]

    def blend(self, outputs: Tensor) -> Tensor:
        """By the masks; where they overlap they share, where there is none the base draws.

        Raises:
            ConfigError: when the outputs are no pictures, or of another shape than a mask.
        """
        if outputs.dim() != 5:
            raise ConfigError(
                "Composition 'regional' is for models whose output is pictures; this one's has shape "
                f"{tuple(outputs.shape[1:])}."
            )
        size = outputs.shape[-2:]
        for name in self.names:
            self.check_shape(name, *size)
        masks = torch.stack(
            [F.interpolate(self.masks[n], size=size, mode="area")[0, 0] for n in self.names]
        ).to(outputs.device, outputs.dtype)  # fmt: skip
        total = masks.sum(0)
        masks = masks / total.clamp_min(1)
        rest = (1 - total).clamp_min(0)
        weights = torch.cat([rest[None], masks])[:, None, None]
        return (outputs * weights).sum(0)

    def check_shape(self, name: str, height: int, width: int) -> None:
        """Raises ConfigError when a mask would be stretched over outputs of this size; what rounding does to sides is borne."""
        down, across = self.masks[name].shape[-2:]
        stretched = across * height / (down * width)
        if name not in self.boxes and max(stretched, 1 / stretched) > MOST_STRETCHED:
            raise ConfigError(
                f"The mask of {name!r} is {across} wide and {down} high, and would be stretched over what is drawn, which is "
                f"{width} wide and {height} high (in latents). Give a mask in the shape of the picture, or draw in its shape."
            )


def mask_of(name: str, region: Any) -> Tensor:
    """A box or mask as (1, 1, h, w) in 0..1."""
    if isinstance(region, (tuple, list)):
        box = [plain(v) for v in region]
        if (
            len(box) != 4
            or not all(map(is_number, box))
            or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1)
        ):
            raise ConfigError(
                f"The region of {name!r} is {tuple(box)}; a box is (left, top, right, bottom), each between 0 and 1 and in "
                "order."
            )
        left, top, right, bottom = (round(v * FINE) for v in box)
        mask = torch.zeros(1, 1, FINE, FINE)
        mask[:, :, top:bottom, left:right] = 1
        return mask
    if isinstance(region, (str, Path)):
        try:
            region = Image.fromarray(grey(decode_noted(Path(region))))
        except DataError as e:
            raise ConfigError(f"The mask of {name!r} cannot be read: {e}.") from None
    if isinstance(region, Image.Image):
        region = np.asarray(region.convert("L"), dtype=np.float32) / 255
    try:
        found = torch.as_tensor(region).float().squeeze()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"The region of {name!r} is {region!r}; give a box (left, top, right, bottom), each 0 to 1, or a mask: a picture, "
            "its file, or an array (height, width) with values 0 to 1."
        ) from None
    if found.dim() != 2 or not found.numel() or not bool(((found >= 0) & (found <= 1)).all()):
        raise ConfigError(
            f"The mask of {name!r} has shape {tuple(found.shape)}; it must be (height, width) with values 0 to 1."
        )
    return found[None, None]


def blurred(mask: Tensor, softness: float) -> Tensor:
    """With a soft edge of this width; three box blurs are nearly a Gaussian."""
    width = round(softness * min(mask.shape[-2:]) / 3) * 2 + 1
    for _ in range(3 if width > 1 else 0):
        padded = F.pad(mask, (width // 2,) * 4, mode="replicate")
        mask = F.avg_pool2d(padded, width, stride=1)
    return mask
