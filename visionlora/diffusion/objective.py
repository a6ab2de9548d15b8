"""The denoising objective. Letters in shapes: b batch, c latent channels, h w latent height and width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionlora.diffusion.conditioning import Conditioning
from visionlora.errors import ConfigError, ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """What is learned at which noise level, and how much an error counts."""

    min_snr_gamma: float | None = None
    """Errors in the picture count at most so much at low noise (arXiv 2303.09556, eq. 5); 5 there."""
    debiased: bool = False
    """Errors in the picture count by the root of the signal-to-noise ratio (arXiv 2310.08442, eq. 13)."""
    huber: float | None = None
    """Large errors count by their size, not their square, from about this size on (arXiv 2403.16728, eq. 11)."""
    noise_offset: float = 0.0
    """Part of the noise that is the same all over a channel, so that very dark and bright pictures are learned."""
    input_perturbation: float = 0.0
    """More noise on the input than is to be predicted (arXiv 2301.11706, algorithm 2); 0.1 there."""
    timestep_range: tuple[int, ...] = (0, 1000)
    """First and one past the last noise level that is learned, in thousandths of the model's own."""
    logit_normal: tuple[float, float] | None = None
    """Mean and deviation of the logit of the noise level (arXiv 2403.03206, eq. 19); all levels alike when None."""

    def timestep(self, levels: int, generator: torch.Generator) -> int:
        """A noise level of a model that has so many."""
        low, high = (bound * levels // 1000 for bound in self.timestep_range)
        if self.logit_normal is None:
            share = float(torch.rand((), generator=generator, dtype=torch.float64))
        else:
            mean, deviation = self.logit_normal
            share = float(torch.sigmoid(mean + deviation * torch.randn((), generator=generator, dtype=torch.float64)))
        return min(low + int(share * max(1, high - low)), levels - 1)

    def weights(self, snr: Tensor, prediction_type: str) -> Tensor:
        """How much the error at a signal-to-noise ratio counts, (b,).

        The error in what is predicted is that in the picture times SNR (noise), SNR + 1 (velocity) or 1 (picture), so one
        weight of the error in the picture is divided by it. A ratio of zero leaves nothing to see of the picture: there the
        noise is predicted in vain and has no weight, while velocity and picture count whole, as no weight by the picture
        would ever learn this level, at which drawing begins (arXiv 2305.08891, section 3.2).
        """
        if self.min_snr_gamma is not None:
            of_picture = snr.clamp(max=self.min_snr_gamma)
        elif self.debiased:
            of_picture = snr.clamp(max=SNR_MOST).sqrt()
        else:
            return torch.ones_like(snr)
        unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
        nothing = torch.full_like(snr, 0.0 if prediction_type == "epsilon" else 1.0)
        return torch.where(snr > 0, of_picture / unit.clamp(min=1e-12), nothing)

    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Of each value; squares, or the pseudo-Huber loss, which is the square where an error is small."""
        squares = (predicted - target).square()
        if self.huber is None:
            return squares
        return 2 * self.huber * ((squares + self.huber**2).sqrt() - self.huber)


SNR_MOST = 1000.0
"""At the lowest noise the ratio is taken for this, or the debiased weight of a model that predicts pictures explodes."""


def check_objective(objective: Objective, noise_scheduler: Any) -> None:
    """Raises ConfigError when an objective makes no sense for a model's noise levels."""
    if float(noise_scheduler.alphas_cumprod[-1]) < 1e-8 and noise_scheduler.config.prediction_type == "epsilon":
        raise ConfigError(
            "zero_terminal_snr: this model predicts the noise, which at full noise is all it sees, so it could learn nothing "
            "there. It is meant for models that predict the velocity (Stable Diffusion 2.1 at 768 px, emoji-64)."
        )


def snr_of(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio α²/σ² at timesteps, (b,)."""
    alphas: Tensor = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas / (1 - alphas)


def zero_terminal(noise_scheduler: Any) -> Any:
    """The scheduler with levels that end at nothing but noise (arXiv 2305.08891, algorithm 1), to train and draw with."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(noise_scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


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


@dataclass(frozen=True)
class Batch:
    """Noisy pictures of one size, and what is known of them."""

    latents: Tensor
    """(b, c, h, w), scaled by the VAE's factor."""
    noise: Tensor
    """To be predicted, (b, c, h, w)."""
    timesteps: Tensor
    """(b,), in 0 … num_train_timesteps - 1."""
    conditioning: Any
    """A `Conditioning`, or anything with its `arguments` and `to`."""
    mask: Tensor | None = None
    """How much each position counts, (b, h, w)."""
    perturbation: Tensor | None = None
    """More noise on the input alone, (b, c, h, w)."""

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        own = (self.latents, self.noise, self.timesteps, self.conditioning, self.mask, self.perturbation)
        return Batch(*(None if part is None else part.to(device) for part in own))  # type: ignore[arg-type]


def predict(unet: Any, noise_scheduler: Any, batch: Batch) -> Tensor:
    """What the UNet says, (b, c, h, w), in fp32."""
    noise = batch.noise if batch.perturbation is None else batch.noise + batch.perturbation
    noisy = noise_scheduler.add_noise(batch.latents, noise, batch.timesteps)
    said: Tensor = unet(noisy, batch.timesteps, **batch.conditioning.arguments(), return_dict=False)[0]
    return said.float()


def denoising_losses(
    unet: Any,
    noise_scheduler: Any,
    batch: Batch,
    objective: Objective | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Loss of each picture, (b,), in fp32: the mean error over its positions, those outside its mask left out.

    Args:
        unet: called as in diffusers.
        noise_scheduler: a DDPM-like scheduler of the model.
        batch: the pictures.
        objective: mean squared error at all noise levels when not given.
        target: what should be predicted, (b, c, h, w); by default what the model's scheduler says.
    """
    objective = objective or Objective()
    predicted = predict(unet, noise_scheduler, batch)
    if target is None:
        target = target_of(noise_scheduler, batch.latents, batch.noise, batch.timesteps)
    errors = objective.errors(predicted, target.float()).mean(1)
    if batch.mask is None:
        losses = errors.mean((1, 2))
    else:
        losses = (errors * batch.mask).sum((1, 2)) / batch.mask.sum((1, 2)).clamp(min=1e-6)
    if objective.min_snr_gamma is None and not objective.debiased:
        return losses
    kind = noise_scheduler.config.prediction_type
    return losses * objective.weights(snr_of(noise_scheduler, batch.timesteps), kind)


@torch.no_grad()
def fixed_losses(
    unet: Any,
    noise_scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    timesteps: tuple[int, ...],
    noise: Tensor,
    batch: int = 32,
    mask: Tensor | None = None,
) -> Tensor:
    """Losses at fixed timesteps and fixed noise, (pictures, timesteps): comparable between runs and adapters.

    Args:
        unet: called as in diffusers.
        noise_scheduler: a DDPM-like scheduler of the model.
        latents: (pictures, c, h, w), scaled.
        conditioning: of the pictures.
        timesteps: those that are looked at.
        noise: (pictures, c, h, w), standard normal.
        batch: pictures in one forward pass.
        mask: see `Batch.mask`.
    """
    noise = noise.to(latents)
    columns = []
    for t in timesteps:
        parts = []
        for i in range(0, len(latents), batch):
            part = slice(i, i + batch)
            steps = torch.full((len(latents[part]),), t, device=latents.device)
            own = None if mask is None else mask[part]
            some = Batch(latents[part], noise[part], steps, conditioning[part], own)
            parts.append(denoising_losses(unet, noise_scheduler, some))
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)
