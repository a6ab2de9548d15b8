"""Pictures that drawing starts from or follows: one to change, a mask of what of it, one for a ControlNet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from visionlora.data.images import Decoded, decode_noted
from visionlora.data.masks import grey
from visionlora.diffusion.recipe import Recipe
from visionlora.errors import DataError

PICTURES = {"init_image": "picture to start from", "mask": "mask", "control": "picture to follow"}
"""Fields of a recipe that name pictures, and what they are."""
MOST_STRETCHED = 1.2
"""Of the mask of a region, in one direction; sizes that a model takes are not of every shape."""


def named(path: Path | None, what: str) -> tuple[str, str]:
    """The path of a picture and the SHA-256 of its file, for a recipe; empty when there is none.

    Raises:
        DataError: when the file cannot be read.
    """
    if path is None:
        return "", ""
    try:
        state = path.stat()
        return str(path), _sha256_in_state(path, state.st_size, state.st_mtime_ns)
    except OSError as e:
        raise DataError(f"The {what} cannot be read: {path}: {e.strerror or e}.") from None


@lru_cache(maxsize=1024)
def _sha256_in_state(path: Path, size: int, changed: int) -> str:
    """Of a file with this size and time of change, which every cell of a grid may name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def opened(path: Path, what: str) -> Decoded:
    """A picture as a person sees it: upright, 16 bits brought to 8, with its alpha channel.

    Raises:
        DataError: when it is no picture.
    """
    try:
        return decode_noted(path)
    except DataError as e:
        raise DataError(f"The {what} cannot be read: {e}.") from None


def on_black(picture: Decoded) -> Image.Image:
    """With black behind what is transparent, as pictures of edges, poses and depths have it; `decode` puts it on white."""
    if picture.alpha is None:
        return picture.image
    return ImageChops.subtract(picture.image, Image.merge("RGB", [ImageOps.invert(picture.alpha)] * 3))


def shape_of(init_image: str | Path | None, control: str | Path | None) -> tuple[int, int]:
    """Width and height of the picture that drawing starts from, else of the one that it follows; of none a square.

    Raises:
        DataError: when it is no picture.
    """
    for path, what in ((init_image, PICTURES["init_image"]), (control, PICTURES["control"])):
        if path:
            return opened(Path(path), what).image.size
    return 1, 1


def sized(shape: tuple[int, int], width: int | None, height: int | None, native: int, multiple: int) -> tuple[int, int]:
    """Width and height to draw at, px: those given; a missing one by the shape, both of about the native area.

    >>> sized((1, 1), None, 96, 64, 8), sized((1600, 900), None, None, 512, 64), sized((3, 1), 96, None, 32, 8)
    ((96, 96), (704, 384), (96, 32))

    Args:
        shape: width and height of a picture.
        width: to draw at.
        height: likewise.
        native: side of the model's own pictures.
        multiple: of which sides must be.
    """
    ratio = shape[0] / shape[1]
    wide = width or (native * math.sqrt(ratio) if height is None else height * ratio)
    high = height or (native / math.sqrt(ratio) if width is None else width / ratio)

    def fitting(side: float) -> int:
        return max(multiple, round(side / multiple) * multiple)

    return fitting(wide) if width is None else width, fitting(high) if height is None else height


def check_given(recipes: Iterable[Recipe]) -> None:
    """Raises DataError when a picture of a recipe cannot be read, or a mask has another size than its picture."""
    for pictures in dict.fromkeys(map(files_of, recipes)):
        Given.of(*pictures)


def files_of(recipe: Recipe) -> tuple[str, str, str]:
    """The files of its pictures, as `Given.of` takes them."""
    return recipe.init_image, recipe.mask, recipe.control


def check_regions(recipes: Iterable[Recipe]) -> None:
    """Raises DataError when a mask of a region cannot be read, or has another shape than the picture."""
    sizes = (
        (name, region, recipe.width, recipe.height)
        for recipe in recipes
        for name, region in recipe.compose_options.get("regions", {}).items()
        if isinstance(region, str)
    )
    for name, region, width, height in dict.fromkeys(sizes):
        across, down = opened(Path(region), f"mask of {name!r}").image.size
        stretched = across * height / (down * width)
        if max(stretched, 1 / stretched) > MOST_STRETCHED:
            raise DataError(
                f"The mask of {name!r}, {region}, is {across}x{down} px and would be stretched over pictures of "
                f"{width}x{height} px. Save it in their shape, or set theirs with --width and --height."
            )


@dataclass(frozen=True)
class Given:
    """Such pictures, the same for every picture of a batch."""

    start: Image.Image | None = None
    mask: Image.Image | None = None
    """Grey, in the size of `start`."""
    control: Image.Image | None = None
    latents: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Of `start`, by (width, height), once they were needed."""

    @classmethod
    def of(cls, init_image: str | Path = "", mask: str | Path = "", control: str | Path = "") -> Given:
        """Opened and checked; an empty path is none.

        Raises:
            DataError: when one cannot be read, or the mask has another size than the picture.
        """
        paths = (init_image, mask, control)
        start, where, follow = (
            opened(Path(path), what) if path else None for path, what in zip(paths, PICTURES.values(), strict=True)
        )
        if start is not None and where is not None and start.image.size != where.image.size:
            sizes = " and ".join("x".join(map(str, p.image.size)) for p in (where, start))
            raise DataError(f"The mask {mask} and the picture differ in size: {sizes} px.")
        return cls(
            None if start is None else start.image,
            None if where is None else Image.fromarray(grey(where)),
            None if follow is None else on_black(follow),
        )

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
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
            latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
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
