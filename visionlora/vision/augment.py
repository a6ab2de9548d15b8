"""What training does to the pictures, each one with a random generator of its own.

In: stored squares, uint8 (n, 3, s, s). Out: normalised float32 (n, 3, size, size). The transforms are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from visionlora.data.preprocess import Preprocessing

SMALLEST_CROP = 0.6
"""Share of the area that a random crop keeps at least."""
LARGEST_TURN, LARGEST_SLANT, LARGEST_SHIFT, LARGEST_ZOOM = 12.0, 8.0, 0.1, 1.2
"""Of affine: degrees, degrees, share of the side, factor."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training pictures."""

    preprocessing: Preprocessing
    kind: str = "light"
    """none, light (crops, brightness and contrast), affine (small turns and shifts that cut nothing off, for letters, digits
    and other things that fill the picture), trivial (arXiv 2103.10158) or rand (arXiv 1909.13719)."""
    flip: bool = True
    """Mirror half of the pictures."""
    erasing: float = 0.0
    """Share of the pictures that lose a rectangle (arXiv 1708.04896)."""

    @cached_property
    def on_pixels(self) -> Any:
        """Changes of uint8 pictures, from the stored to the input size."""
        from torchvision.transforms import v2

        size = self.preprocessing.size
        parts: list[Any] = []
        if self.kind in ("none", "affine"):
            parts.append(v2.CenterCrop(size))
        else:
            parts.append(v2.RandomResizedCrop(size, (SMALLEST_CROP, 1.0), (0.85, 1.18), antialias=True))
        if self.flip:
            parts.append(v2.RandomHorizontalFlip())
        if self.kind in ("light", "affine"):
            parts.append(v2.ColorJitter(brightness=0.2, contrast=0.2))
        elif self.kind == "trivial":
            parts.append(v2.TrivialAugmentWide())
        elif self.kind == "rand":
            parts.append(v2.RandAugment())
        return v2.Compose(parts)

    @cached_property
    def on_values(self) -> Any:
        """Changes of normalised pictures."""
        from torchvision.transforms import v2

        return v2.RandomErasing(self.erasing) if self.erasing else None

    def moved(self, picture: Tensor) -> Tensor:
        """Turned, stretched and shifted a little, uint8 (3, h, w); what comes in from outside has the colour of the border."""
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional

        edges = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1).float()
        angle, right, down, zoom, slant = (torch.rand(5) * 2 - 1).tolist()
        shift = [round(LARGEST_SHIFT * side * by) for side, by in zip(picture.shape[:0:-1], (right, down), strict=True)]
        ground = edges.median(1).values.view(3, 1, 1)
        # Around zero, so that what comes in from outside is blended with the ground and not with black.
        moved = functional.affine(
            picture.float() - ground,
            LARGEST_TURN * angle,
            shift,
            LARGEST_ZOOM**zoom,
            [LARGEST_SLANT * slant, 0.0],
            v2.InterpolationMode.BILINEAR,
        )
        whole: Tensor = (moved + ground).round().clamp(0, 255).to(torch.uint8)
        return whole

    def __call__(self, stored: Tensor, seeds: Sequence[int]) -> Tensor:
        """Each picture depends on its own seed alone, whatever stands beside it in the batch.

        Args:
            stored: uint8 (n, 3, s, s).
            seeds: n whole numbers.
        """
        changed = []
        with torch.random.fork_rng(devices=[]):
            for picture, seed in zip(stored, seeds, strict=True):
                torch.manual_seed(seed)
                if self.kind == "affine":
                    picture = self.moved(picture)
                x = self.preprocessing.normalised(self.on_pixels(picture))
                changed.append(x if self.on_values is None else self.on_values(x))
        return torch.stack(changed)


def mixed(x: Tensor, targets: Tensor, mixup: float, cutmix: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of each picture with the one before it; one of both per batch.

    Args:
        x: (n, 3, h, w).
        targets: (n, c), shares of the classes.
        mixup: alpha of its Beta distribution, 0 for none.
        cutmix: likewise.
        generator: of everything random.
    """
    if not (mixup or cutmix) or len(x) < 2:
        return x, targets
    use_cutmix = bool(cutmix) and (not mixup or bool(torch.rand((), generator=generator) < 0.5))
    share = beta(cutmix if use_cutmix else mixup, generator)
    other, others = x.roll(1, 0), targets.roll(1, 0)
    if not use_cutmix:
        return torch.lerp(other, x, share), torch.lerp(others, targets, share)
    h, w = x.shape[-2:]
    tall, wide = (round(side * (1 - share) ** 0.5) for side in (h, w))
    top = int(torch.randint(h - tall + 1, (), generator=generator))
    left = int(torch.randint(w - wide + 1, (), generator=generator))
    x = x.clone()
    x[..., top : top + tall, left : left + wide] = other[..., top : top + tall, left : left + wide]
    return x, torch.lerp(others, targets, 1 - tall * wide / (h * w))


def beta(alpha: float, generator: torch.Generator) -> float:
    """A draw of Beta(alpha, alpha)."""
    shape = torch.full((2,), alpha, dtype=torch.float64)
    one, two = torch._standard_gamma(shape, generator=generator).tolist()
    return float(one / (one + two)) if one + two > 0 else 0.5
