"""Steps of every scheduler, of pictures to start from, of samplings that end early and of several pipelines of one model."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing.holder import mix_on
from visionlora.mixing.moments import Moments
from visionlora.models.base import open_base

from .test_mix import adapter

pytestmark = pytest.mark.filterwarnings("ignore")


class Seen:
    """Notes the scale of the first adapter's first layer at every call of the UNet."""

    def __init__(self, pipe, mix) -> None:
        self.scales: list[float] = []
        method = next(iter(dict(mix.handles["a"])["unet"].methods.values()))
        self.hook = pipe.unet.conv_out.register_forward_hook(lambda *_: self.scales.append(method.scale))

    def by(self, pipe, steps: int, **options) -> list[float]:
        self.scales.clear()
        pipe("dog", num_inference_steps=steps, height=32, width=32, output_type="latent", guidance_scale=1.0, **options)
        return list(self.scales)


def drawing(pipe, steps: vl.Scale) -> Seen:
    pipe.set_progress_bar_config(disable=True)
    mix = vl.attach(pipe, {"a": adapter(pipe, 0, ("lora",), text=False)}, scales={"a": steps})
    return Seen(pipe, mix)


SIX = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
SCHEDULERS = {
    "DDIMScheduler": ({}, SIX),
    "EulerDiscreteScheduler": ({}, SIX),
    "DPMSolverMultistepScheduler": ({}, SIX),
    "PNDMScheduler": ({"skip_prk_steps": True}, [1, 2, 2, 3, 4, 5, 6]),
    "HeunDiscreteScheduler": ({}, [1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
    "KDPM2DiscreteScheduler": ({}, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_has_its_turn(tiny_model: Path, name: str) -> None:
    options, expected = SCHEDULERS[name]
    pipe = open_base(str(tiny_model)).pipe
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    seen = drawing(pipe, vl.Scale(steps=SIX))
    assert seen.by(pipe, 6) == expected
    assert seen.by(pipe, 6) == expected, "the next picture begins anew"


def test_the_first_steps_of_runge_and_kutta(tiny_model: Path) -> None:
    pipe = open_base(str(tiny_model)).pipe
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    found = drawing(pipe, vl.Scale(steps=SIX)).by(pipe, 6)
    assert len(found) == 15 and found == sorted(found) and set(found) == set(SIX)


def test_a_sampling_that_ends_early_is_cut_at_its_end(tiny_xl: Path) -> None:
    pipe = open_base(str(tiny_xl)).pipe
    seen = drawing(pipe, vl.Scale(steps=vl.Ramp(1.0, 0.0)))
    assert seen.by(pipe, 10, denoising_end=0.8) == pytest.approx([1 - k / 9 for k in range(8)])


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_steps_that_are_set_during_a_sampling_are_those_of_the_whole(tiny_model: Path, name: str, kind: str) -> None:
    """Counting began with the step at which it was asked for."""
    pipe = open_base(str(tiny_model)).pipe
    pipe = getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    given = {"image": Image.new("RGB", (32, 32)), "strength": 0.5} if "Img2Img" in kind else {"height": 32, "width": 32}
    seen = drawing(pipe, vl.Scale(steps=SIX))
    mix = mix_on(pipe.unet)

    def change(pipe, step: int, timestep: torch.Tensor, values: dict) -> dict:
        if step == 3:
            mix.set_scales({"a": vl.Scale(steps=SIX)})
        return values

    for _ in range(2):
        found = []
        for changes in (None, change):
            seen.scales.clear()
            mix.set_scales({"a": 9.0 if changes else vl.Scale(steps=SIX)})
            pipe("dog", num_inference_steps=12, output_type="latent", callback_on_step_end=changes, **given)
            found.append(list(seen.scales))
        counted, late = found
        assert counted[0] == 1.0 and late == [9.0] * 4 + counted[4:]


def test_a_loop_of_ones_own_begins_where_it_begins(tiny_model: Path) -> None:
    pipe = open_base(str(tiny_model)).pipe
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(12)
    seen = drawing(pipe, vl.Scale(steps=SIX))
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 16)
    for t in pipe.scheduler.timesteps[6:]:
        x = pipe.scheduler.step(pipe.unet(pipe.scheduler.scale_model_input(x, t), t, text).sample, t, x).prev_sample
    assert seen.scales == SIX


def test_another_pipeline_of_the_same_parts_starts_where_it_starts(tiny_model: Path) -> None:
    pipe = open_base(str(tiny_model)).pipe
    seen = drawing(pipe, vl.Scale(steps=vl.Ramp(1.0, 0.0)))
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert seen.by(pipe, 4) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    seen.scales.clear()
    other("dog", image=Image.new("RGB", (32, 32)), strength=0.5, num_inference_steps=10, output_type="latent")
    assert seen.scales == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("how", [{"scales": {"a": vl.Scale(steps=[1.0, 0.0])}}, {"compose": "switch"}])
def test_models_without_timesteps_are_told_so(how: dict) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lora = Adapter({"model.0": AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    with pytest.raises(ConfigError, match="follow the timestep, which Sequential is not given"):
        vl.attach(model, {"a": lora, "b": lora}, **how)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("how", [{"scales": {"a": vl.Scale(steps=[1.0, 0.0])}}, {"compose": "switch"}])
def test_text_encoders_take_any_keyword_and_no_timestep(tiny_model: Path, how: dict) -> None:
    """They were taken for models with a timestep, and the mask of a text for it."""
    pipe = open_base(str(tiny_model)).pipe
    made = Adapter({n: m for n, m in adapter(pipe, 0, ("lora",)).modules.items() if n.startswith("text_encoder.")})
    with pytest.raises(ConfigError, match="follow the timestep, which CLIPTextModel is not given"):
        vl.attach(pipe.text_encoder, {"a": made, "b": made}, **how)


def test_a_wrapper_that_is_called_without_a_timestep() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, **more: object) -> torch.Tensor:
            return self.inner(x)

    model = Wrapper()
    lora = Adapter({"model.inner": AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    vl.attach(model, {"a": lora, "b": lora}, compose="switch")
    model(torch.ones(2, 4), timestep=999)
    with pytest.raises(ConfigError, match="follow the timestep, which Wrapper is not given"):
        model(torch.ones(2, 4))


def test_a_pipeline_with_a_scheduler_of_its_own_is_noticed() -> None:
    target = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([900, 500, 100]), num_inference_steps=3))
    moments = Moments(target)
    assert [moments.at(t) for t in (900, 500)] == [(0, 3), (1, 3)]
    with pytest.warns(UserWarning, match=r"SimpleNamespace, which has no timestep 749: another pipeline") as told:
        assert moments.at(749) == moments.at(torch.tensor([749])) == (250, 1000)
    assert len(told) == 1
