"""Whether a denoiser learned what it can use elsewhere: the loss on pictures kept apart, at fixed noise levels and noise.

Nothing in it is random, so the curve of one run can be compared with that of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.data.folder import ImageFolder, ImageItem
from visionlora.diffusion.encode import Encoded
from visionlora.diffusion.objective import fixed_losses
from visionlora.diffusion.task import Captions
from visionlora.errors import DataError
from visionlora.models.evaluation import evaluating

LEVELS = (100, 300, 500, 700, 900)
"""Noise levels, in thousandths of the model's own."""
MOST = 64
"""Pictures by which a run is judged; more would cost time and tell little more."""
AT_ONCE = 32
"""Pictures in one forward pass at most."""


@dataclass(frozen=True)
class Evaluation:
    """What validation found at one moment."""

    step: int
    loss: float
    by_level: dict[str, float]
    """By noise level, in thousandths."""


@dataclass(frozen=True)
class Validation:
    """The pictures that are not trained on."""

    data: Encoded
    noise_scheduler: Any
    seed: int
    tokens: Captions | None = None
    """The captions as token ids, for a model whose text encoders learn too."""
    unmasked_weight: float = 0.0
    """How much what lies outside of the masks counts, as in training."""
    levels: tuple[int, ...] = LEVELS
    """Noise levels that are looked at, in thousandths of the model's own."""

    @torch.no_grad()
    def evaluate(self, unet: nn.Module, step: int, batch: int = AT_ONCE, accelerator: Any = None) -> Evaluation:
        """The loss as the model is now.

        Args:
            unet: the model.
            step: what is said of the moment.
            batch: pictures in one forward pass.
            accelerator: its processes share the pictures, and each sees what all have found.
        """
        first, every = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        with evaluating(unet):
            found = losses_at(
                unet, self.noise_scheduler, self.data, self.levels, self.seed, self.tokens, self.unmasked_weight, batch,
                first, every,
            )  # fmt: skip
        if every > 1:
            found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
        losses = found.mean(0).tolist()
        return Evaluation(step, sum(losses) / len(losses), dict(zip(map(str, self.levels), losses, strict=True)))


def levels_in(timestep_range: Sequence[int]) -> tuple[int, ...]:
    """Those of `LEVELS` that are learned; the middle of a range that has none of them.

    >>> levels_in((0, 1000)), levels_in((600, 1000)), levels_in((0, 80))
    ((100, 300, 500, 700, 900), (700, 900), (40,))
    """
    low, high = timestep_range
    return tuple(level for level in LEVELS if low <= level < high) or ((low + high) // 2,)


def losses_at(
    unet: Any, noise_scheduler: Any, data: Encoded, levels: Sequence[int], seed: int,
    tokens: Captions | None = None, unmasked_weight: float = 0.0, batch: int = AT_ONCE, first: int = 0, every: int = 1,
) -> Tensor:  # fmt: skip
    """Losses at fixed noise levels and fixed noise, (pictures, levels), size by size.

    Args:
        unet: the model as it is now.
        noise_scheduler: of the model.
        data: the pictures.
        levels: in thousandths of the model's own.
        seed: of the noise.
        tokens: see `Validation.tokens`.
        unmasked_weight: see `Validation.unmasked_weight`.
        batch: pictures in one forward pass.
        first: of each size the picture to begin with.
        every: of each size one picture in so many; the losses of the others are 0.
    """
    count = len(data)
    trained, device = noise_scheduler.config.num_train_timesteps, next(unet.parameters()).device
    timesteps = tuple(level * trained // 1000 for level in levels)
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in range(count):
        by_size.setdefault(data.framings[i].bucket, []).append(i)
    found = torch.zeros(count, len(levels))
    for same in by_size.values():
        if not (own := same[first::every]):
            continue
        latents = torch.stack([data.latent(i, 0) for i in own]).to(device)
        plain, mask = [0] * len(own), data.masks(own, [0] * len(own), unmasked_weight)
        conditioning = (tokens or data).conditioning(own, [data.caption_of[i][0] for i in own], plain).to(device)
        mask = None if mask is None else mask.to(device)
        noise = torch.randn(len(same), *latents.shape[1:], generator=torch.Generator().manual_seed(seed))[first::every]
        found[own] = fixed_losses(unet, noise_scheduler, latents, conditioning, timesteps, noise, batch, mask).cpu()
    return found


def judges(items: Sequence[ImageItem]) -> tuple[ImageItem, ...]:
    """The pictures by which a run is judged, `MOST` at most, chosen by their contents: the same ones whatever their names.

    They stay in their order.
    """
    chosen = sorted(range(len(items)), key=lambda i: items[i].sha256)[:MOST]
    return tuple(items[i] for i in sorted(chosen))


def hold_out(
    folder: ImageFolder, share: float, seed: int, never: Collection[int] = ()
) -> tuple[ImageFolder, tuple[ImageItem, ...]]:
    """Keeps a share of the pictures apart, at least one, `MOST` at most; the same ones whatever the order of the files.

    Pictures that look alike stay on one side. A set of them that is larger than the share trains, unless there is nothing else.

    Args:
        folder: the pictures.
        share: of them, as far as there are others than `never`.
        seed: of the drawing.
        never: positions of pictures that are not kept apart, nor those that look like them.

    Raises:
        DataError: when nothing would be left to train on, or to judge by.
    """
    count = max(1, round(share * len(folder.items)))
    if count >= len(folder.items):
        raise DataError(
            f"val_share {share:g} of {len(folder.items)} pictures leaves none to train on: give more pictures or a "
            "smaller share."
        )
    count = min(count, MOST)
    by_content = sorted(range(len(folder.items)), key=lambda i: folder.items[i].sha256)
    order = torch.randperm(len(by_content), generator=torch.Generator().manual_seed(seed)).tolist()
    set_of = {i: members for members in folder.alike for i in members}
    together = list(dict.fromkeys(set_of.get(by_content[i], (by_content[i],)) for i in order))
    free = [members for members in together if not set(never).intersection(members)]
    apart: set[int] = set()
    for members in free:
        if len(apart) + len(members) <= count:
            apart.update(members)
    if free and not apart:
        smallest = min(free, key=len)
        apart.update(smallest)
    if not 0 < len(apart) < len(folder.items):
        raise DataError(
            f"val_share {share:g}: too many of the {len(folder.items)} pictures look alike, or like some that were learned "
            "before, to keep any apart that training does not see. Give more pictures, or others with validation=FOLDER."
        )
    kept = tuple(item for i, item in enumerate(folder.items) if i not in apart)
    return dataclasses.replace(folder, items=kept, alike=()), tuple(folder.items[i] for i in sorted(apart))


def verdict(evaluations: Sequence[Evaluation]) -> str:
    """What the curve says, in one line.

    >>> print(verdict([Evaluation(0, 1.0, {}), Evaluation(5, 0.5, {}), Evaluation(9, 0.8, {})]))
    Validation loss: 1.0000 untrained, 0.5000 at best (step 5), 0.8000 at the end. From step 5 on it learned the training \
pictures by heart: use checkpoints/best.safetensors, or fewer steps, more pictures, or a lower rank.
    """
    first, last = evaluations[0], evaluations[-1]
    best = min(evaluations, key=lambda e: e.loss)
    line = (
        f"Validation loss: {first.loss:.4f} untrained, {best.loss:.4f} at best (step {best.step}), {last.loss:.4f} at the "
        "end."
    )
    if best is first:
        return (
            line + " It never got better: a lower learning rate, or pictures and captions that fit together, may help."
        )
    if last.loss > 1.02 * best.loss:
        line += (
            f" From step {best.step} on it learned the training pictures by heart: use checkpoints/best.safetensors, or fewer "
            "steps, more pictures, or a lower rank."
        )
    return line
