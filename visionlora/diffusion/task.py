"""Denoising as a task of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.diffusion.encode import Encoded
from visionlora.diffusion.objective import denoising_losses


@dataclass(frozen=True)
class DenoisingTask:
    """The data and the objective."""

    data: Encoded
    noise_scheduler: Any
    caption_dropout: float
    """Share of captions replaced by the empty one."""
    timestep_range: tuple[int, ...] = (0, 1000)
    """First and one past the last noise level that is learned, in thousandths of the model's own."""

    def __len__(self) -> int:
        return len(self.data)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Random numbers are drawn for the whole step and cut to `part`, so that every process draws the same."""
        n, data = len(index), self.data
        shape = (n, *data.mean.shape[2:])
        of_latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        levels = self.noise_scheduler.config.num_train_timesteps
        low, high = (bound * levels // 1000 for bound in self.timestep_range)
        timesteps = torch.randint(low, max(high, low + 1), (n,), generator=generator)
        variant = torch.randint(data.mean.shape[1], (n,), generator=generator)
        drop = torch.rand(n, generator=generator) < self.caption_dropout
        device = next(model.parameters()).device
        latents = data.latents(index[part], variant[part], of_latents[part]).to(device)
        text = torch.where(drop[part, None, None], data.empty_text, data.text[index[part]]).to(device)
        return denoising_losses(
            model, self.noise_scheduler, latents, text, noise[part].to(device), timesteps[part].to(device)
        )
