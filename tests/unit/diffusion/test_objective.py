"""What the UNet is asked to predict, at which noise, and how much an error counts."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from visionlora.diffusion.conditioning import Conditioning
from visionlora.diffusion.objective import (
    Batch,
    Objective,
    check_objective,
    denoising_losses,
    fixed_losses,
    snr_of,
    target_of,
    zero_terminal,
)
from visionlora.diffusion.sampling import sampling_scheduler
from visionlora.errors import ConfigError, ModelError

KINDS = ("epsilon", "v_prediction", "sample")
TIMES = torch.tensor([0, 300, 700, 999])


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=kind)


def batch_of(noise: torch.Tensor, times: torch.Tensor, **more: object) -> Batch:
    b, c, h, w = noise.shape
    return Batch(torch.zeros(b, c, h, w), noise, times, Conditioning(torch.zeros(b, 1, 1)), **more)


class Says(torch.nn.Module):
    """Predicts what it was told."""

    def __init__(self, said: torch.Tensor) -> None:
        super().__init__()
        self.said = said

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
        self.noisy = noisy
        return (self.said,)


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


def test_losses_are_per_picture() -> None:
    noise = torch.randn(2, 4, 2, 2)
    wrong = noise.clone()
    wrong[1] += 2.0
    losses = denoising_losses(Says(wrong), scheduler("epsilon"), batch_of(noise, torch.tensor([1, 2])))
    torch.testing.assert_close(losses, torch.tensor([0.0, 4.0]))


def test_a_mask_leaves_out_what_it_covers_and_no_scale_changes() -> None:
    noise = torch.zeros(2, 4, 2, 2)
    said = torch.zeros(2, 4, 2, 2)
    said[:, :, 0, 0], said[:, :, 1, 1] = 1.0, 100.0
    mask = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[0.5, 0.0], [0.0, 0.0]]])
    losses = denoising_losses(Says(said), scheduler("epsilon"), batch_of(noise, torch.tensor([1, 2]), mask=mask))
    torch.testing.assert_close(losses, torch.tensor([1 / 3, 1.0]))


def test_perturbed_input_leaves_the_target_alone() -> None:
    noise, more = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    unet, levels = Says(noise), scheduler("epsilon")
    losses = denoising_losses(unet, levels, batch_of(noise, torch.tensor([500]), perturbation=more))
    assert losses.tolist() == [0.0]
    sigma = (1 - levels.alphas_cumprod[500]).sqrt()
    torch.testing.assert_close(unet.noisy, sigma * (noise + more))


def test_the_signal_to_noise_ratio_is_that_of_diffusers() -> None:
    torch.testing.assert_close(snr_of(scheduler("epsilon"), TIMES), compute_snr(scheduler("epsilon"), TIMES))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_by_the_formulas_of_its_paper(gamma: float) -> None:
    """arXiv 2303.09556: min(SNR, γ)/SNR for noise, min(SNR, γ)/(SNR + 1) for velocity, min(SNR, γ) for pictures."""
    snr, objective = snr_of(scheduler("epsilon"), TIMES), Objective(min_snr_gamma=gamma)
    low = snr.clamp(max=gamma)
    torch.testing.assert_close(objective.weights(snr, "epsilon"), low / snr)
    torch.testing.assert_close(objective.weights(snr, "v_prediction"), low / (snr + 1))
    torch.testing.assert_close(objective.weights(snr, "sample"), low)


@pytest.mark.parametrize("objective", [Objective(min_snr_gamma=5), Objective(debiased=True)])
@pytest.mark.parametrize("level", [50, 500, 950])
def test_weighted_losses_do_not_depend_on_what_is_predicted(objective: Objective, level: int) -> None:
    """The same error in the picture costs the same, whether noise, velocity or picture is predicted."""
    x, noise, t = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 4, 2, 2).double(), torch.tensor([level])
    found = []
    for kind in KINDS:
        levels = scheduler(kind)
        alpha = levels.alphas_cumprod[t].double().sqrt()
        sigma = (1 - alpha**2).sqrt()
        noisy = alpha * x + sigma * noise
        guess = x + 0.1  # what the model thinks the picture is
        said = {"epsilon": (noisy - alpha * guess) / sigma, "sample": guess,
                "v_prediction": alpha * (noisy - alpha * guess) / sigma - sigma * guess}[kind]  # fmt: skip
        batch = Batch(x, noise, t, Conditioning(torch.zeros(1, 1, 1)))
        found.append(float(denoising_losses(Says(said), levels, batch, objective)))
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("objective", [Objective(min_snr_gamma=5), Objective(debiased=True)])
def test_where_nothing_is_seen_of_the_picture_all_but_the_noise_is_learned(objective: Objective) -> None:
    last = snr_of(zero_terminal(scheduler("v_prediction")), torch.tensor([999]))
    assert last.tolist() == [0.0]
    assert objective.weights(last, "epsilon").tolist() == [0.0]
    assert objective.weights(last, "v_prediction").tolist() == objective.weights(last, "sample").tolist() == [1.0]
    assert Objective().weights(last, "epsilon").tolist() == [1.0]


def test_huber_is_a_square_where_errors_are_small_and_a_line_where_they_are_large() -> None:
    objective, small, large = Objective(huber=0.1), torch.tensor([1e-3]), torch.tensor([50.0, 51.0])
    zero = torch.zeros(())
    torch.testing.assert_close(objective.errors(small, zero), small**2, rtol=1e-2, atol=0)
    one, two = objective.errors(large, zero).tolist()
    assert two - one == pytest.approx(2 * 0.1, rel=1e-3)


def test_noise_levels_are_drawn_from_their_range() -> None:
    dice = torch.Generator().manual_seed(0)
    drawn = [Objective(timestep_range=(200, 600)).timestep(1000, dice) for _ in range(4000)]
    assert min(drawn) == 200 and max(drawn) == 599
    assert abs(sum(drawn) / len(drawn) - 400) < 6
    middle = [Objective(logit_normal=(0.0, 0.5)).timestep(1000, dice) for _ in range(4000)]
    assert abs(sum(middle) / len(middle) - 500) < 10
    assert sum(250 < t < 750 for t in middle) / 4000 == pytest.approx(0.972, abs=0.01)  # |z| < logit(0.75)/0.5
    assert {Objective().timestep(10, dice) for _ in range(300)} == set(range(10))


def test_levels_that_end_in_nothing_but_noise() -> None:
    levels = zero_terminal(scheduler("v_prediction"))
    assert float(levels.alphas_cumprod[-1]) < 1e-8 < float(scheduler("v_prediction").alphas_cumprod[-1])
    assert levels.config.timestep_spacing == "trailing"
    check_objective(Objective(), levels)
    assert sampling_scheduler(levels, "ddim").alphas_cumprod[-1] == 0
    with pytest.raises(ConfigError, match="scheduler is 'heun', which cannot start from nothing but noise"):
        sampling_scheduler(levels, "heun")
    with pytest.raises(ConfigError, match="zero_terminal_snr: this model predicts the noise"):
        check_objective(Objective(), zero_terminal(scheduler("epsilon")))


def test_fixed_losses_repeat(tiny_model) -> None:
    from visionlora.models.base import open_base

    base = open_base(str(tiny_model))
    latents, text = torch.randn(3, 4, 8, 8), Conditioning(torch.randn(3, 16, 16))
    args = (base.pipe.unet, base.pipe.scheduler, latents, text, (100, 900), torch.randn(3, 4, 8, 8))
    first = fixed_losses(*args)
    assert first.shape == (3, 2)
    torch.testing.assert_close(first, fixed_losses(*args, batch=2), rtol=1e-5, atol=1e-6)
