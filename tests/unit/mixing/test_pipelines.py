"""Mixes on the other pipelines of diffusers: every mode draws, and what comes off leaves the base."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.models.base import open_base

from .test_mix import adapter, bits, run

pytestmark = pytest.mark.filterwarnings("ignore")
PICTURE = Image.effect_noise((32, 32), 60).convert("RGB")


def img2img(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), {
        "image": PICTURE,
        "strength": 0.8,
    }


def inpaint(pipe):
    from diffusers import StableDiffusionInpaintPipeline

    mask = Image.new("L", (32, 32), 255)
    made = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    return made, {"image": PICTURE, "mask_image": mask, "strength": 1.0, "height": 32, "width": 32}


def controlnet(pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for p in net.parameters():
        p.data += 0.01
    made = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    return made, {"image": PICTURE, "height": 32, "width": 32}


def sdxl(pipe):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=2, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    made = StableDiffusionXLPipeline(
        vae=pipe.vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer, unet=unet, scheduler=pipe.scheduler, add_watermarker=False,
    )  # fmt: skip
    return made, {"height": 32, "width": 32}


PIPELINES = {"img2img": img2img, "inpaint": inpaint, "controlnet": controlnet, "sdxl": sdxl}


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_mode_draws_the_same_and_comes_off(kind: str, tiny_model: Path) -> None:
    pipe, options = PIPELINES[kind](open_base(str(tiny_model)).pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False).eval()

    def drawn() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        found = pipe("dog", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np", **options)
        return torch.from_numpy(found.images)

    made = {"a": adapter(pipe, 0, ("lora",)), "b": adapter(pipe, 1, ("lora",))}
    plain = drawn()
    found = {}
    for mode in ("merged", "stacked", "batched"):
        mix = vl.attach(pipe, made, scales={"a": 0.3, "b": 0.2}, mode=mode)
        found[mode] = drawn()
        mix.detach()
    assert (found["merged"] - plain).abs().max() > 1e-3
    torch.testing.assert_close(found["stacked"], found["merged"], rtol=0, atol=5e-3)
    torch.testing.assert_close(found["batched"], found["merged"], rtol=0, atol=5e-3)
    mix = vl.attach(pipe, made, scales={"a": vl.Scale(0.3, steps=vl.Window(0, 0.4)), "b": 0.2}, compose="composite")
    assert drawn().shape == plain.shape
    mix.set_composition("switch", tau=1)
    assert drawn().shape == plain.shape
    mix.detach()
    assert torch.equal(drawn(), plain)


@pytest.mark.parametrize("mode", ["merged", "stacked", "batched"])
def test_an_adapter_that_diffusers_loads_acts_beside_a_mix(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    """PEFT makes its factors of a convolution with the class of the layer, which was ours."""
    pipe = open_base(str(tiny_model)).pipe
    made = {name: adapter(pipe, seed, ("lora",)) for seed, name in enumerate("abc")}
    vl.save_adapter(made["c"], tmp_path / "c.safetensors", "diffusers")
    before, mix = bits(pipe), vl.attach(pipe, made, scales={"a": 0.3, "b": 0.2, "c": 0.1})
    wanted = run(pipe)
    mix.detach()
    mix = vl.attach(pipe, {n: made[n] for n in "ab"}, scales={"a": 0.3, "b": 0.2}, mode=mode)
    pipe.load_lora_weights(tmp_path, weight_name="c.safetensors", adapter_name="c")
    pipe.set_adapters("c", 0.1)
    torch.testing.assert_close(run(pipe), wanted, rtol=1e-3, atol=2e-4)
    now = run(pipe)
    for change in (
        lambda: mix.add("d", made["c"]),
        lambda: mix.replace("a", made["c"]),
        lambda: mix.set_composition("balanced"),
    ):
        with pytest.raises(
            TargetError, match=r"PEFT adapters are loaded on this .*call pipe\.unload_lora_weights\(\) first"
        ):
            change()
        assert mix.names == ["a", "b"] and torch.equal(run(pipe), now), "they could not be put on again"
    mix.set_scales(0.0)
    pipe.unload_lora_weights()
    mix.detach()
    assert all(torch.equal(before[n], now) for n, now in bits(pipe).items())
