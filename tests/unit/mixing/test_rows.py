"""Scales by picture: of prompts with several pictures, of batches of another size, of what all pictures share."""

from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import open_base

from .test_mix import adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipe(tiny_model: Path):
    made = open_base(str(tiny_model)).pipe
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, prompt, guidance: float = 3.0, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(k) for k in range(options.pop("pictures"))]
    return pipe(
        prompt, num_inference_steps=2, height=32, width=32, guidance_scale=guidance, output_type="latent",
        generator=generators, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("pictures", [1, 3, 4])
def test_scales_for_another_number_of_pictures_are_refused(pipe, guidance: float, pictures: int) -> None:
    mix = vl.attach(pipe, {"a": adapter(pipe, 0, ("lora",), text=False)}, scales={"a": vl.Scale(images=[1.0, 0.0])})
    with pytest.raises(ConfigError, match=f"scales for 2 pictures, and a batch of {pictures} is drawn"):
        draw(pipe, ["dog"] * pictures, guidance, pictures=pictures)
    assert draw(pipe, ["dog"] * 2, guidance, pictures=2).shape[0] == 2
    mix.set_scales({"a": vl.Scale(images=[0.5])})
    assert draw(pipe, ["dog"] * pictures, guidance, pictures=pictures).shape[0] == pictures


def test_several_pictures_of_a_prompt(pipe) -> None:
    """The text encoder reads every prompt once."""
    made = {"a": adapter(pipe, 0, ("lora",))}
    alone = []
    for scale in (1.0, 0.25):
        mix = vl.attach(pipe, made, scales={"a": scale})
        alone.append(draw(pipe, ["dog", "cat"], pictures=4, num_images_per_prompt=2))
        mix.detach()
    mix = vl.attach(pipe, made, scales={"a": vl.Scale(images=[1.0, 1.0, 0.25, 0.25])})
    found = draw(pipe, ["dog", "cat"], pictures=4, num_images_per_prompt=2)
    torch.testing.assert_close(found[:2], alone[0][:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2:], alone[1][2:], rtol=1e-3, atol=1e-3)
    mix.set_scales({"a": vl.Scale(images=[1.0, 0.0])})
    with pytest.raises(ConfigError, match="reads a prompt once for all its pictures"):
        draw(pipe, "dog", pictures=2, num_images_per_prompt=2)
    mix.set_scales({"a": vl.Scale(blocks={"text_encoder": 0.0}, images=[1.0, 0.0])})
    assert draw(pipe, "dog", pictures=2, num_images_per_prompt=2).shape[0] == 2


@pytest.mark.parametrize("images", [[0.0, 0.0], [0.5, 0.5]])
def test_what_all_pictures_share_follows_a_number_that_all_share(images: list[float]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    modules = {
        "model.0": AdapterModule.lora(torch.randn(2, 4), torch.randn(3, 2), 2.0),
        "model.0.bias": AdapterModule("shift", {"shift": torch.randn(3)}, 1.0),
    }
    with torch.no_grad():
        mix = vl.attach(model, {"a": Adapter(modules)}, scales={"a": images[0]})
        wanted = model(x)
        mix.set_scales({"a": vl.Scale(images=images)})
        torch.testing.assert_close(model(x), wanted)
        with pytest.raises(ConfigError, match="changes norms or biases"):
            mix.set_scales({"a": vl.Scale(images=[0.0, 1.0])})
        torch.testing.assert_close(model(x), wanted)


def test_what_is_refused_when_a_model_runs_is_refused_again() -> None:
    """The rows are known at the first call alone: the second went on with what the first had set in part."""
    lora = AdapterModule.lora(torch.ones(2, 4), torch.ones(3, 2), 2.0)
    shift = AdapterModule("shift", {"shift": torch.ones(3)}, 1.0)
    adapters = {"a": Adapter({"model.0": lora}), "b": Adapter({"model.0.bias": shift})}
    model = nn.Sequential(nn.Linear(4, 3))
    vl.attach(model, adapters, compose="composite")
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ConfigError, match="changes norms or biases"):
            model(torch.ones(2, 4))


def test_a_step_that_is_refused_is_refused_again() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, timestep: int) -> torch.Tensor:
            return self.inner(x)

    model, lora = Timed(), AdapterModule.lora(torch.ones(2, 4), torch.ones(3, 2), 2.0)
    steps = vl.Scale(steps=lambda progress: 1.0 if progress == 0 else float("nan"))
    vl.attach(model, {"a": Adapter({"model.inner": lora})}, scales={"a": steps})
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ConfigError, match="must give a finite number"):
            model(torch.ones(2, 4), 500)
