"""Choosing and opening base models, and every refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from visionlora.errors import ModelError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.base import DEFAULT_ON_GPU, SPREADS, choose, fetch_default, load_single_file, open_base
from visionlora.models.checkpoint_header import read_checkpoint_header
from visionlora.models.fingerprint import architecture_fingerprint, content_fingerprint, weights_fingerprint
from visionlora.models.kinds import check_trains

STYLE = Path(__file__).parents[3] / "assets" / "adapters" / "fxemoji"


def test_a_folder_opens_frozen(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    assert (base.resolution, base.scale_factor, base.multiple) == (32, 4, 8)
    assert base.prediction_type == "epsilon"
    assert not any(p.requires_grad for part in base.components().values() for p in part.parameters())
    assert all(p.dtype == torch.float32 for p in base.pipe.unet.parameters())


def test_auto_takes_the_embedded_model_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, why = choose("Base model", "auto", "emoji-64", DEFAULT_ON_GPU, fetch_default)
    assert model == "emoji-64"
    assert why == "Base model: emoji-64, the embedded one, as there is no GPU. Choose with --model."


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_auto_does_not_say_that_there_is_no_gpu_where_there_is_another(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = {"xpu": torch.xpu, "mps": torch.backends.mps}[kind]
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: int(kind == "xpu"))
    assert choose("Base model", "auto", "emoji-64", DEFAULT_ON_GPU, fetch_default) == (
        "emoji-64",
        f"Base model: emoji-64, the embedded one, as {kind} is no CUDA GPU, where it would be {DEFAULT_ON_GPU}. Choose with "
        "--model.",
    )


def test_auto_with_a_gpu_but_no_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, why = choose("Base model", "auto", "emoji-64", DEFAULT_ON_GPU, fetch_default)
    assert model == "emoji-64"
    assert "is neither cached nor reachable" in why


def test_resolution_must_fit_the_grid(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    base.check_resolution(40)
    with pytest.raises(ModelError, match=r"A resolution of 36 px does not fit .* Use 32 or 40 \(native: 32\)"):
        base.check_resolution(36)


def test_refusals(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(STYLE, tmp_path / "run")
    (tmp_path / "own").symlink_to(tiny_model)
    unet = tiny_model / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "notes.txt").write_text("")
    for given, words in (
        (tmp_path / "emty", "There is no model at"),
        (tmp_path / "emty", "Allowed: emoji-64, own. Give"),
        (tmp_path / "ow", "Did you mean 'own'?"),
        (tmp_path / "run", "is an adapter, not a base model"),
        (tmp_path / "run" / "adapter.safetensors", "is an adapter, not a base model"),
        (unet, "is a UNet alone: name the folder of the whole model"),
        (tiny_model / "vae" / unet.name, "is a VAE alone: name"),
        (tiny_model / "text_encoder" / "model.safetensors", "is a text encoder alone: name"),
        (tmp_path / "empty", "is not a diffusers model: it has no model_index.json"),
        (tmp_path / "notes.txt", "is not a model: a single file ends in .safetensors or .ckpt"),
    ):
        with pytest.raises(ModelError) as caught:
            open_base(str(given))
        assert words in str(caught.value)


def test_a_hub_id_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="The model nobody/nothing cannot be opened") as caught:
        open_base("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_fingerprints_tell_weights_and_architectures_apart(tiny_model: Path) -> None:
    a, b = open_base(str(tiny_model)).pipe.unet, open_base(str(tiny_model)).pipe.unet
    assert weights_fingerprint(a) == weights_fingerprint(b)
    inject(b, AdapterConfig(rank=2))
    assert weights_fingerprint(a) == weights_fingerprint(b), "an adapter does not count"
    assert content_fingerprint(a) == content_fingerprint(b.to(memory_format=torch.channels_last))
    assert content_fingerprint(a, without=a.mid_block) != content_fingerprint(a) != content_fingerprint(a.mid_block)
    assert architecture_fingerprint(a) == architecture_fingerprint(b)
    b.conv_in.weight.data += 0.1
    assert weights_fingerprint(a) != weights_fingerprint(b)
    assert architecture_fingerprint(a) == architecture_fingerprint(b)


def test_the_fp16_file_of_a_model_has_the_same_fingerprint(tiny_model: Path) -> None:
    unet = open_base(str(tiny_model)).pipe.unet
    full = weights_fingerprint(unet)
    assert weights_fingerprint(unet.half()) == full


def test_each_family_opens_as_what_it_is(tiny_sd2: Path, tiny_xl: Path) -> None:
    second, xl = open_base(str(tiny_sd2)), open_base(str(tiny_xl))
    assert (second.prediction_type, second.is_xl, list(second.components())) == (
        "v_prediction", False, ["unet", "text_encoder"],
    )  # fmt: skip
    assert (xl.prediction_type, xl.is_xl) == ("epsilon", True)
    assert list(xl.components()) == list(xl.fingerprints()) == ["unet", "text_encoder", "text_encoder_2"]
    assert not any(p.requires_grad for part in xl.components().values() for p in part.parameters())


def test_training_has_noise_levels_of_its_own(tiny_xl: Path) -> None:
    """SDXL's scheduler scales noisy latents by 1/sqrt(sigma² + 1), which its UNet never saw in training."""
    base, x = open_base(str(tiny_xl)), torch.zeros(1, 4, 8, 8)
    noisy = base.noise_scheduler.add_noise(x, torch.ones_like(x), torch.tensor([999]))
    assert float(noisy.max()) < 1.0001
    assert torch.equal(base.noise_scheduler.alphas_cumprod, base.pipe.scheduler.alphas_cumprod)


def saved_as(model: Path, kind: str, folder: Path, **parts: object) -> Path:
    """The model's folder under the name of another pipeline, with other parts."""
    import shutil

    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind, **parts}))
    return folder


def test_a_folder_saved_by_another_pipeline_opens_too(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved_as(tiny_model, "StableDiffusionImg2ImgPipeline", tmp_path / "m")
    assert type(open_base(str(folder)).pipe).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("family", ["tiny_model", "tiny_xl"])
def test_an_inpainting_model_is_refused(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(family)
    folder = saved_as(model, json.loads((model / "model_index.json").read_text())["_class_name"], tmp_path / "m")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "conv_in.weight": torch.zeros(16, 9, 3, 3)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="is an inpainting or depth model: its UNet takes 9 channels where"):
        open_base(str(folder))


def test_the_refiner_is_refused(tiny_xl: Path, tmp_path: Path) -> None:
    folder = saved_as(
        tiny_xl, "StableDiffusionXLImg2ImgPipeline", tmp_path / "m", text_encoder=[None, None], tokenizer=[None, None]
    )
    with pytest.raises(ModelError, match="is SDXL's refiner, which only finishes pictures"):
        open_base(str(folder))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FluxPipeline", r"is FLUX \(FluxPipeline\); visionlora opens"),
        ("StableDiffusion3Pipeline", r"is Stable Diffusion 3 \(StableDiffusion3Pipeline\)"),
        ("NewestPipeline", r"is a model of another kind \(NewestPipeline\)"),
    ],
)
def test_families_without_a_unet_are_named_before_they_are_read(tmp_path: Path, kind: str, said: str) -> None:
    parts = {
        "transformer": ["diffusers", "SomeTransformer2DModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    with pytest.raises(ModelError, match=said):
        open_base(str(tmp_path))


def test_a_folder_of_fp16_files_alone_opens(tiny_xl: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(tiny_xl).to(torch.float16).save_pretrained(tmp_path / "m", variant="fp16")
    assert not [p for p in (tmp_path / "m").rglob("*.safetensors") if ".fp16." not in p.name]
    base = open_base(str(tmp_path / "m"))
    assert base.pipe.unet.dtype == torch.float32
    assert base.fingerprints() == open_base(str(tiny_xl)).fingerprints()
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be opened"):
        open_base(str(tmp_path / "m"))


def test_a_model_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved_as(tiny_model, "DDIMPipeline", tmp_path / "m")
    with pytest.raises(
        ModelError, match=r"is a DDIMPipeline; visionlora opens text-to-image models of Stable Diffusion 1\.x"
    ):
        open_base(str(folder))


@pytest.mark.parametrize(
    ("part", "config", "said"),
    [
        ("scheduler", {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0}, "EDM"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching"),
        ("scheduler", {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
                       "use_flow_sigmas": True}, "flow matching"),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0] * 4}, "latents_mean"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
        ("vae", {"scaling_factor": None}, r"has the scaling_factor None in its config.json, .* 0.13025 for XL"),
        ("vae", {"scaling_factor": 0}, r"has the scaling_factor 0 in its config.json"),
    ],
)  # fmt: skip
def test_noise_and_latents_that_training_does_not_know_are_refused(
    tiny_xl: Path, tmp_path: Path, part: str, config: dict, said: str
) -> None:
    """`DDPMScheduler.from_config` would take defaults where such a config says nothing, and train on another schedule."""
    kind = {"scheduler": ["diffusers", str(config.get("_class_name"))]} if part == "scheduler" else {}
    folder = saved_as(tiny_xl, "StableDiffusionXLPipeline", tmp_path / "m", **kind)
    file = folder / part / {"scheduler": "scheduler_config.json", "vae": "config.json"}[part]
    before = {} if part == "scheduler" else json.loads(file.read_text())
    file.write_text(json.dumps({**before, **config}))
    with pytest.raises(ModelError, match=said):
        open_base(str(folder))


def test_a_unet_that_reads_more_than_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """As that of unCLIP; the first step would end in a traceback."""
    folder = saved_as(tiny_model, "StableDiffusionPipeline", tmp_path / "m")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "class_embed_type": "identity"}))
    with pytest.raises(ModelError, match=r"a model whose UNet reads more than text \(class_embed_type 'identity'\)"):
        open_base(str(folder))


def test_a_vae_of_another_kind_opens_and_does_not_train(tiny_model: Path, tmp_path: Path) -> None:
    """Its latents have no mean and spread; to draw it needs none."""
    from diffusers import AutoencoderTiny

    folder = saved_as(tiny_model, "StableDiffusionPipeline", tmp_path / "m", vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(folder / "vae")
    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**channels, **counts).save_pretrained(folder / "vae")
    base = open_base(str(folder))
    with pytest.raises(ModelError, match=r"The VAE of .*m is of the kind AutoencoderTiny; visionlora trains on"):
        check_trains(base.id, base.pipe)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "v_predicton",
            r"has the prediction_type 'v_predicton' .*scheduler_config\.json.* Did you mean 'v_prediction'\?",
        ),
        ("velocity", r"has the prediction_type 'velocity' .* Did you mean 'v_prediction'\?"),
        ("x0", r"has the prediction_type 'x0' .* Allowed: epsilon, sample, v_prediction\."),
    ],
)
def test_a_prediction_that_nobody_knows_is_named(tiny_sd2: Path, tmp_path: Path, given: str, said: str) -> None:
    folder = saved_as(tiny_sd2, "StableDiffusionPipeline", tmp_path / "m")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": given}))
    with pytest.raises(ModelError, match=said):
        open_base(str(folder))


WHOLE_XL = (
    "model.diffusion_model.input_blocks.0", "first_stage_model", "conditioner.embedders.0", "conditioner.embedders.1",
)  # fmt: skip
"""What a checkpoint of SDXL holds, by the beginnings of the names."""


@pytest.mark.parametrize(
    ("marks", "metadata", "prediction", "zero", "said"),
    [
        ((), {}, "epsilon", False, ""),
        (("v_pred",), {}, "v_prediction", False, "It predicts the velocity (v_prediction), says its header."),
        (("v_pred", "ztsnr"), {}, "v_prediction", True, "a last noise level of nothing but noise (ztsnr)"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False, "It predicts the velocity"),
        ((), {"modelspec.prediction_type": "V-Prediction"}, "v_prediction", False, "It predicts the velocity"),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", False, ""),
        ((), {"modelspec.prediction_type": ""}, "epsilon", False, ""),
        (("ztsnr",), {}, "epsilon", False, ""),
    ],
)
def test_a_checkpoint_is_trained_as_its_header_says(
    tiny_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks, metadata, prediction, zero, said
) -> None:
    import diffusers

    tensors = {f"{part}.x": torch.zeros(1) for part in WHOLE_XL} | {mark: torch.tensor([]) for mark in marks}
    save_file(tensors, tmp_path / "own.safetensors", metadata)
    monkeypatch.setattr(
        diffusers.StableDiffusionXLPipeline, "from_single_file",
        lambda _: diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_xl),
    )  # fmt: skip
    base = open_base(str(tmp_path / "own.safetensors"))
    assert (base.prediction_type, base.noise_scheduler.config.prediction_type) == (prediction, prediction)
    assert (float(base.noise_scheduler.alphas_cumprod[-1]) < 1e-8) is zero
    assert said in base.why and ("header" in base.why) is bool(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "rf",
            r"that it predicts 'rf' \(modelspec\.prediction_type\)\. That is flow matching; .*epsilon, v_prediction, sample",
        ),
        ("flow_prediction", "That is flow matching"),
        ("epsilom", r"Did you mean 'epsilon'\?"),
        ("x0", r"Allowed: eps, epsilon, sample, v, v_pred, v_prediction, velocity\."),
    ],
)
def test_a_checkpoint_that_predicts_what_nobody_knows_is_refused(tmp_path: Path, given: str, said: str) -> None:
    """It was taken for one that predicts the noise."""
    tensors = {f"{part}.x": torch.zeros(1) for part in WHOLE_XL}
    save_file(tensors, tmp_path / "own.safetensors", {"modelspec.prediction_type": given})
    with pytest.raises(ModelError, match=said):
        open_base(str(tmp_path / "own.safetensors"))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            WHOLE_XL[:1],
            r"has no VAE, no text encoder, so it is no whole model: take the full checkpoint, or a diffusers",
        ),
        (WHOLE_XL[1:], r"has no UNet, so it is no whole model"),
        (WHOLE_XL[::3], r"has no VAE, no first text encoder, so"),
        ((*WHOLE_XL[:3], "model.diffusion_model.label_emb.0.0"), r"has no second text encoder, so"),
        (
            ("model_ema.diffusion_modelinput_blocks00", *WHOLE_XL[1:]),
            r"has no UNet \(it has its averaged weights alone, model_ema",
        ),
        (
            ("model_ema.diffusion_modelinput_blocks00",),
            r"has no UNet, no VAE, no text encoder \(it has its averaged weights",
        ),
        (
            ("model.diffusion_model.double_blocks.0", *WHOLE_XL[1:]),
            "has no UNet: it is of another family, such as FLUX",
        ),
        (("joint_blocks.0",), "has no UNet: it is of another family, such as FLUX"),
        (
            (*WHOLE_XL[:2], "cond_stage_model.transformer.embeddings"),
            r"has no text encoder \(it has one in the oldest layout",
        ),
        ((*WHOLE_XL, "edm_vpred.sigma_max"), "was trained with EDM noise levels"),
        (
            (*WHOLE_XL, "model.diffusion_model.time_embed.cond_proj"),
            "made to draw in a few steps, .* its diffusers folder",
        ),
        (("input_blocks.0",), "is a UNet alone: name the folder"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_checkpoint_that_lacks_a_part_is_refused(
    tmp_path: Path, parts: tuple[str, ...], said: str, pickled: bool
) -> None:
    """diffusers said so in its own words, or took the part of another model that it had fetched before."""
    tensors, file = (
        {f"{part}.{'weight' if 'cond_proj' in part else 'x'}": torch.zeros(1) for part in parts},
        tmp_path / ("a.ckpt" if pickled else "a.safetensors"),
    )
    torch.save({"state_dict": tensors}, file) if pickled else save_file(tensors, file)
    with pytest.raises(ModelError, match=said):
        open_base(str(file))


@pytest.mark.parametrize(
    ("metadata", "spread", "prediction", "side", "said"),
    [
        ({}, 0.05, "epsilon", 64, "It predicts the noise (epsilon), by the look of its weights"),
        ({}, 0.2, "v_prediction", 96, "It predicts the velocity (v_prediction), by the look of its weights"),
        ({"modelspec.prediction_type": "epsilon"}, 0.2, "epsilon", 64, ""),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, 0.05, "v_prediction", 96, "says its header"),
    ],
)
def test_what_stable_diffusion_2_predicts_is_told_by_its_weights(
    tiny_sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict, spread: float, prediction: str, side: int,
    said: str,
) -> None:  # fmt: skip
    """diffusers takes the velocity for both kinds, and 768 px."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=96, block_out_channels=(8, 8, 16, 16), cross_attention_dim=1024, norm_num_groups=4, attention_head_dim=1,
        use_linear_projection=True,
    )  # fmt: skip
    bias = unet.get_parameter(SPREADS)
    bias.data.copy_(torch.tensor([-spread, spread]).repeat(len(bias) // 2))
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd2, unet=unet, safety_checker=None)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", lambda *_, **__: opened)
    parts = ("model.diffusion_model.input_blocks.0", "first_stage_model", "cond_stage_model.model")
    save_file({f"{part}.x": torch.zeros(1) for part in parts}, tmp_path / "two.safetensors", metadata)
    pipe, told = load_single_file(tmp_path / "two.safetensors", torch.float32)
    assert (pipe.scheduler.config.prediction_type, unet.config.sample_size) == (prediction, side)
    assert said in told and bool(told) is bool(said)


def test_weights_in_eight_bits_with_scales_are_refused(tmp_path: Path) -> None:
    """Without the scales they would be other weights."""
    tensors = {f"{part}.{end}": torch.ones(1) for part in WHOLE_XL for end in ("weight", "scale_weight")}
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match="holds weights in eight bits with scales beside them"):
        open_base(str(tmp_path / "own.safetensors"))


def test_a_checkpoint_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    tensors = {f"{part}.x": torch.zeros(1) for part in WHOLE_XL}
    save_file(tensors, tmp_path / "named.ckpt")
    torch.save(tensors, tmp_path / "named.safetensors")
    torch.save({"state_dict": tensors, "callbacks": {AdapterConfig: 1}}, tmp_path / "more.ckpt")
    save_file(tensors, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, said in (
        ("named.ckpt", "it is a safetensors file: rename it to end in .safetensors."),
        ("named.safetensors", "it is a pickle of torch's: rename it to end in .ckpt."),
        ("more.ckpt", "it holds more than tensors (visionlora.lora.config.AdapterConfig)"),
        ("cut.safetensors", "is not a whole safetensors file"),
        ("pointer.safetensors", "is not a whole safetensors file"),
    ):
        with pytest.raises(ModelError) as caught:
            open_base(str(tmp_path / name))
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_sdxl_is_told_by_its_header(tmp_path: Path) -> None:
    second = {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}
    save_file(second, tmp_path / "xl.safetensors")
    save_file({"cond_stage_model.x": torch.zeros(1)}, tmp_path / "one.safetensors")
    torch.save({"state_dict": {**second, "v_pred": torch.tensor([])}}, tmp_path / "xl.ckpt")
    torch.save(second, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    found = {p.name: read_checkpoint_header(p) for p in tmp_path.iterdir()}
    assert {name for name, header in found.items() if header.is_xl} == {"xl.safetensors", "xl.ckpt"}
    assert found["xl.ckpt"].prediction_type == "v_prediction" and not found["xl.ckpt"].zero_snr
