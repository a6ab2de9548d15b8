"""The denoising objective. Letters in shapes: b batch, c latent channels, h w latent height and width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.errors import ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def target_of(noise_scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should predict, (b, c, h, w): the noise, the velocity (arXiv 2202.00512, app. D) or the latents.

    Raises:
        ModelError: when the scheduler names another prediction type.
    """
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    if kind == "sample":
        return latents
    raise ModelError(f"The model's scheduler predicts {kind!r}; known: {', '.join(PREDICTION_TYPES)}.")


def denoising_losses(
    unet: Any, noise_scheduler: Any, latents: Tensor, text: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of each picture, (b,), in fp32.

    Args:
        unet: called as in diffusers.
        noise_scheduler: a DDPM-like scheduler of the model.
        latents: (b, c, h, w), scaled by the VAE's factor.
        text: (b, tokens, width), the text encoder's last hidden state.
        noise: standard normal, (b, c, h, w).
        timesteps: (b,), in 0 … num_train_timesteps-1.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    target = target_of(noise_scheduler, latents, noise, timesteps)
    return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))


@torch.no_grad()
def fixed_losses(
    unet: Any,
    noise_scheduler: Any,
    latents: Tensor,
    text: Tensor,
    timesteps: tuple[int, ...],
    seed: int,
    batch: int = 32,
) -> Tensor:
    """Losses at fixed timesteps and fixed noise, (pictures, timesteps): comparable between runs and adapters."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    columns = []
    for t in timesteps:
        parts = []
        for i in range(0, len(latents), batch):
            part = slice(i, i + batch)
            steps = torch.full((len(latents[part]),), t, device=latents.device)
            parts.append(denoising_losses(unet, noise_scheduler, latents[part], text[part], noise[part], steps))
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)
