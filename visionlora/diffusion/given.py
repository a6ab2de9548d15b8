"""Pictures that drawing starts from or follows: one to change, a mask of what of it, one for a ControlNet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionlora.diffusion.recipe import Recipe
from visionlora.errors import DataError

PICTURES = {"init_image": "picture to start from", "mask": "mask", "control": "picture to follow"}
"""Fields of a recipe that name pictures, and what they are."""


def named(path: Path | None, what: str) -> tuple[str, str]:
    """The path of a picture and the SHA-256 of its file, for a recipe; empty when there is none.

    Raises:
        DataError: when the file cannot be read.
    """
    if path is None:
        return "", ""
    try:
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError(f"The {what} cannot be read: {path}: {e.strerror or e}.") from None


def opened(path: Path | None, what: str) -> Image.Image | None:
    """A picture in RGB.

    Raises:
        DataError: when it is no picture.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:
        raise DataError(f"The {what} cannot be read: {path}: {e}.") from None


@dataclass(frozen=True)
class Given:
    """Such pictures, the same for every picture of a run."""

    start: Image.Image | None = None
    mask: Image.Image | None = None
    """Grey, in the size of `start`."""
    control: Image.Image | None = None
    latents: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Of `start`, by (width, height), once they were needed."""

    @classmethod
    def of(cls, init_image: Path | None, mask: Path | None, control: Path | None) -> Given:
        """Opened and checked.

        Raises:
            DataError: when one cannot be read, or the mask has another size than the picture.
        """
        paths = (init_image, mask, control)
        start, where, follow = (opened(path, what) for path, what in zip(paths, PICTURES.values(), strict=True))
        if start is not None and where is not None and start.size != where.size:
            sizes = " and ".join("x".join(map(str, p.size)) for p in (where, start))
            raise DataError(f"The mask {mask} and the picture differ in size: {sizes} px.")
        return cls(start, None if where is None else where.convert("L"), follow)

    def arguments(self, batch: Sequence[Recipe]) -> dict[str, Any]:
        """What a pipeline of diffusers is told of them."""
        recipe = batch[0]
        size = (recipe.width, recipe.height)
        found: dict[str, Any] = {}
        if self.start is None or self.control is not None:
            found = {"width": recipe.width, "height": recipe.height}
        if self.start is not None:
            start = self.start.resize(size, Image.Resampling.LANCZOS)
            found |= {"image": [start] * len(batch), "strength": recipe.strength}
        if self.control is not None:
            control = self.control.resize(size, Image.Resampling.LANCZOS)
            found["image" if self.start is None else "control_image"] = [control] * len(batch)
            found["controlnet_conditioning_scale"] = recipe.control_scale
        return found

    @torch.no_grad()
    def held(self, pipe: Any, batch: Sequence[Recipe]) -> dict[str, Any]:
        """What holds the latents outside of the mask at those of the picture while it is drawn, as an argument of the pipeline.

        After each step they are the picture's own, with as much noise as the next step expects; this works for latents of any
        number of channels, where diffusers' pipelines for it know four alone.
        """
        if self.start is None or self.mask is None:
            return {}
        size, vae = (batch[0].width, batch[0].height), pipe.vae
        if size not in self.latents:
            pixels = pipe.image_processor.preprocess(self.start.resize(size, Image.Resampling.LANCZOS))
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
            self.latents[size] = latents * vae.config.scaling_factor
        clean = self.latents[size]
        mask = self.mask.resize((clean.shape[3], clean.shape[2]), Image.Resampling.BOX)
        new = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255).to(clean)
        generators = [torch.Generator().manual_seed(recipe.seed) for recipe in batch]
        noise = torch.cat([torch.randn(clean.shape, generator=g) for g in generators]).to(clean)

        def hold(pipe: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
            latents, timesteps = values["latents"], pipe.scheduler.timesteps
            first = len(timesteps) - pipe.num_timesteps  # strength leaves out those before
            later = timesteps[first + step + 1 :][:1]
            kept = pipe.scheduler.add_noise(clean, noise, later) if len(later) else clean
            return {"latents": torch.lerp(kept.to(latents), latents, new.to(latents))}

        return {"callback_on_step_end": hold}

    def finished(self, picture: Image.Image) -> Image.Image:
        """Outside of the mask the picture that it started from, to the last bit."""
        if self.start is None or self.mask is None:
            return picture
        start = self.start.resize(picture.size, Image.Resampling.LANCZOS)
        return Image.composite(picture, start, self.mask.resize(picture.size, Image.Resampling.BILINEAR))
