"""What the UNet is asked to predict."""

import pytest
import torch
from diffusers import DDPMScheduler

from visionlora.diffusion.objective import denoising_losses, fixed_losses, target_of
from visionlora.errors import ModelError


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=kind)


def test_targets_by_their_definitions() -> None:
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    assert torch.equal(target_of(scheduler("epsilon"), x, noise, t), noise)
    assert torch.equal(target_of(scheduler("sample"), x, noise, t), x)
    alpha = scheduler("v_prediction").alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - scheduler("v_prediction").alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(target_of(scheduler("v_prediction"), x, noise, t), alpha * noise - sigma * x)


def test_another_prediction_type_is_refused() -> None:
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ModelError, match="predicts 'score'; known: epsilon, v_prediction, sample"):
        target_of(noise_scheduler, *(torch.zeros(1),) * 3)


class Oracle(torch.nn.Module):
    """Predicts the noise it was told."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
        return (self.noise,)


def test_losses_are_per_picture() -> None:
    noise = torch.randn(2, 4, 2, 2)
    wrong = noise.clone()
    wrong[1] += 2.0
    losses = denoising_losses(Oracle(wrong), scheduler("epsilon"), torch.zeros(2, 4, 2, 2), torch.zeros(2, 1, 1), noise,
                              torch.tensor([1, 2]))  # fmt: skip
    torch.testing.assert_close(losses, torch.tensor([0.0, 4.0]))


def test_fixed_losses_repeat(tiny_model) -> None:
    from visionlora.models.base import open_base

    base = open_base(str(tiny_model))
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 16)
    args = (base.pipe.unet, base.pipe.scheduler, latents, text, (100, 900), 7)
    first = fixed_losses(*args)
    assert first.shape == (3, 2)
    torch.testing.assert_close(first, fixed_losses(*args, batch=2), rtol=1e-5, atol=1e-6)
