"""train-sd and generate on Stable Diffusion 2.x and XL, through the real command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from visionlora.loaders import load_adapter

SMALL = ("--rank", 2, "--steps", 2, "sample_steps=1", "sample_columns=1", "learning_rate=0.01")


@pytest.mark.parametrize(
    ("family", "version", "architecture", "prediction"),
    [
        ("tiny_sd2", "sd_v1", "stable-diffusion-v1/lora", "v"),
        ("tiny_xl", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
    ],
)
def test_a_family_trains_draws_and_loads_in_diffusers(
    family: str, version: str, architecture: str, prediction: str, cli, request: pytest.FixtureRequest, dogs: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = request.getfixturevalue(family)
    code, out, err = cli("train-sd", "--images", dogs, "--model", model, "--output", tmp_path / "r", *SMALL, "flip=true",
                         "train_text_encoder=true", "token=<it>", "--prompt", "a <it> dog", "val_share=0.3")  # fmt: skip
    assert code == 0, err
    assert "Adapter of text_encoder" in out
    adapter = load_adapter(tmp_path / "r")
    encoders = ["text_encoder", "text_encoder_2"] if family == "tiny_xl" else ["text_encoder"]
    assert adapter.components == [*encoders, "unet"]
    assert sorted(adapter.embeddings["<it>"]) == encoders
    assert all(
        any(m.tensors["lora_B"].abs().max() > 0 for m in adapter.component(c).values()) for c in adapter.components
    )
    with safe_open(tmp_path / "r" / "adapter.safetensors", "pt") as file:
        told = file.metadata()
    assert told["modelspec.prediction_type"] == prediction and told["ss_base_model_version"] == version
    assert told["modelspec.trigger_phrase"] == "<it>"
    assert json.loads(told["ss_tag_frequency"]) == {"dog": {"a <it> dog": 2}}
    assert (
        "diffusers alone draws otherwise: it does not read the word <it>" in (tmp_path / "r" / "README.md").read_text()
    )
    for more in ((), ("--init-image", dogs / "0.png")):
        code, _, err = cli("generate", "--prompt", "a <it> dog", "--model", model, "--lora", tmp_path / "r", "--steps", 2,
                           "--output", tmp_path / "g", *more)  # fmt: skip
        assert code == 0, err
    assert len(list((tmp_path / "g").glob("*.png"))) == 2


def test_a_small_vae_draws_also_from_a_picture(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """TAESD's kind, which gives its latents without mean and spread."""
    from diffusers import AutoencoderTiny

    model, channels = (
        tmp_path / "small",
        {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3},
    )
    shutil.copytree(tiny_model, model)
    shutil.rmtree(model / "vae")
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    vae.save_pretrained(model / "vae")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    Image.new("L", (32, 32), 255).save(mask := tmp_path / "mask.png")
    given = next(dogs.glob("*.png"))
    for name, extra in (("plain", ()), ("masked", ("--init-image", given, "--mask", mask, "--strength", 1))):
        code, _, err = cli(
            "generate", "--prompt", "a dog", "--model", model, "--steps", 2, *extra, "--output", tmp_path / name
        )
        assert code == 0 and len(list((tmp_path / name).glob("*.png"))) == 1, err


def test_a_model_of_few_steps_draws_but_does_not_train(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """Its UNet reads the guidance too, which a step of training has not."""
    from diffusers import UNet2DConditionModel

    model = tmp_path / "lcm"
    shutil.copytree(tiny_model, model)
    config = UNet2DConditionModel.load_config(model / "unet")
    UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 8}).save_pretrained(model / "unet")
    code, _, err = cli("train-sd", "--images", dogs, "--model", model, "--output", tmp_path / "r", *SMALL)
    assert code == 2 and "made to draw in a few steps" in err and "time_cond_proj_dim 8" in err
    assert not (tmp_path / "r").exists()
    code, _, err = cli("generate", "--prompt", "a dog", "--model", model, "--steps", 2, "--output", tmp_path / "g")
    assert code == 0, err


@pytest.mark.filterwarnings("ignore")
def test_the_file_of_sdxl_gives_the_same_pictures_in_diffusers(cli, tiny_xl: Path, dogs: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    from visionlora.loaders import apply
    from visionlora.models.base import open_base

    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_xl, "--output", tmp_path / "r", *SMALL, "--alpha", 3,
                       "train_text_encoder=true")  # fmt: skip
    assert code == 0, err
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_xl)
    theirs.load_lora_weights(tmp_path / "r", weight_name="adapter.safetensors")
    base = open_base(str(tiny_xl))
    apply(base, load_adapter(tmp_path / "r"))
    found = []
    for pipe in (theirs, base.pipe):
        pipe.set_progress_bar_config(disable=True)
        found.append(
            pipe(
                "a dog", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
            ).images
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_each_picture_became_is_in_the_report(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((96, 32), 90).convert("RGB").save(dogs / "wide.png")
    code, out, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--output", tmp_path / "r", *SMALL)
    assert code == 0, err
    assert "Sizes, width x height in px: 32x32: 3, 48x16: 1 (wide.png)." in out
    found = {
        i["file"]: (i["size"], i["trained_at"]) for i in json.loads((tmp_path / "r" / "run.json").read_text())["images"]
    }
    assert found["wide.png"] == ([96, 32], [48, 16]) and found["0.png"] == ([32, 32], [32, 32])
