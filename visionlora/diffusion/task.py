"""Denoising as a task of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.diffusion.encode import Encoded
from visionlora.diffusion.objective import Batch, Objective, denoising_losses, predict, target_of


class Captions(Protocol):
    """The captions of a data set in another form than text embeddings."""

    def conditioning(self, pictures: Sequence[int], captions: Sequence[int], variants: Sequence[int]) -> Any:
        """See `Encoded.conditioning`."""


class Teacher(Protocol):
    """The base model's own word, to which the adapter is held where nothing should change."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """The adapter is off meanwhile."""


@dataclass(frozen=True)
class Preservation:
    """Keeps what the base knows of the class that the subject belongs to.

    With class pictures (arXiv 2208.12242, section 3.3) these are learned too; without them, the base's prediction for the
    same pictures under the class's caption is the target.
    """

    weight: float = 1.0
    """Of the class pictures, or of the second loss."""
    caption: int | None = None
    """Position of the class's caption, for the loss against the base's prediction."""
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Drawn:
    """What chance gave one picture of a step."""

    picture: int
    variant: int
    caption: int
    timestep: int
    of_latents: Tensor
    """(c, h, w), standard normal, as the two below."""
    noise: Tensor
    perturbation: Tensor | None


@dataclass(frozen=True)
class DenoisingTask:
    """The data and the objective."""

    data: Encoded
    noise_scheduler: Any
    caption_dropout: float
    """Share of captions replaced by the empty one."""
    objective: Objective = field(default_factory=Objective)
    unmasked_weight: float = 0.0
    """How much what lies outside of the masks counts."""
    preservation: Preservation | None = None
    tokens: Captions | None = None
    """The captions as token ids, for a model whose text encoders learn too."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Pictures that may share a forward pass."""
        return self.data.groups

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Every picture of the step has random numbers of its own, so that it does not matter which process takes it."""
        seeds = torch.randint(2**62, (len(index),), generator=generator)[part].tolist()
        drawn = [self.drawn(i, seed) for i, seed in zip(index[part].tolist(), seeds, strict=True)]
        device = next(model.parameters()).device
        captions, kept = [d.caption for d in drawn], self.preservation
        if kept is None or kept.caption is None or kept.teacher is None:
            losses = denoising_losses(
                model, self.noise_scheduler, self.batch(drawn, captions).to(device), self.objective
            )
            if kept is None:
                return losses
            sides = torch.tensor([self.data.sides[d.picture] for d in drawn], device=device)
            return torch.where(sides == 1, kept.weight * losses, losses)
        # The pictures under their own captions and under the class's, in one forward pass.
        batch = self.batch([*drawn, *drawn], captions + [kept.caption] * len(drawn)).to(device)
        with torch.no_grad(), kept.teacher.without_adapter():
            said = predict(model, self.noise_scheduler, self.batch(drawn, [kept.caption] * len(drawn)).to(device))
        target = target_of(self.noise_scheduler, batch.latents, batch.noise, batch.timesteps)
        target = torch.cat([target[: len(drawn)].float(), said])
        own, held = denoising_losses(model, self.noise_scheduler, batch, self.objective, target).chunk(2)
        return own + kept.weight * held

    def drawn(self, picture: int, seed: int) -> Drawn:
        """Chance's part for one picture."""
        dice, data, shape = torch.Generator().manual_seed(seed), self.data, self.data.shape(picture)
        of_latents, noise = torch.randn(shape, generator=dice), torch.randn(shape, generator=dice)
        timestep = self.objective.timestep(self.noise_scheduler.config.num_train_timesteps, dice)
        variant, which = (
            int(torch.randint(n, (), generator=dice)) for n in (data.variants(picture), len(data.caption_of[picture]))
        )
        dropped = float(torch.rand((), generator=dice)) < self.caption_dropout
        caption = 0 if dropped else data.caption_of[picture][which]
        perturbation = None
        if self.objective.noise_offset:
            noise = noise + self.objective.noise_offset * torch.randn(shape[0], 1, 1, generator=dice)
        if self.objective.input_perturbation:
            perturbation = self.objective.input_perturbation * torch.randn(shape, generator=dice)
        return Drawn(picture, variant, caption, timestep, of_latents, noise, perturbation)

    def batch(self, drawn: Sequence[Drawn], captions: Sequence[int]) -> Batch:
        """The pictures with these captions."""
        data = self.data
        pictures, variants = [d.picture for d in drawn], [d.variant for d in drawn]
        more = [d.perturbation for d in drawn if d.perturbation is not None]
        return Batch(
            torch.stack([data.latent(d.picture, d.variant, d.of_latents) for d in drawn]),
            torch.stack([d.noise for d in drawn]),
            torch.tensor([d.timestep for d in drawn]),
            self.conditioning(pictures, captions, variants),
            data.masks(pictures, variants, self.unmasked_weight),
            torch.stack(more) if more else None,
        )

    def conditioning(self, pictures: Sequence[int], captions: Sequence[int], variants: Sequence[int]) -> Any:
        """What the model is told: token ids, or text embeddings from the cache."""
        return (self.tokens or self.data).conditioning(pictures, captions, variants)
