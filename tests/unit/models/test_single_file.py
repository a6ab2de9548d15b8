"""One checkpoint in the original layout, against diffusers' own reader of such files."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from visionlora.cli.main import app
from visionlora.errors import ModelError
from visionlora.models.base import open_base
from visionlora.models.single_file import single_file

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sd15_in_small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with all the blocks of Stable Diffusion 1.5, narrow."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny_model, safety_checker=None,
        unet=UNet2DConditionModel(block_out_channels=(8, 8, 16, 16), cross_attention_dim=16, norm_num_groups=4,
                                  attention_head_dim=2),
        vae=AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4,
                          down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd15") / "model"
    pipe.save_pretrained(folder)
    return folder


def test_diffusers_reads_every_tensor_back(sd15_in_small: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    pipe = open_base(str(sd15_in_small)).pipe
    tensors = single_file(pipe)
    for part, convert in ((pipe.unet, convert_ldm_unet_checkpoint), (pipe.vae, convert_ldm_vae_checkpoint)):
        found = convert(dict(tensors), dict(part.config))
        own = part.state_dict()
        assert found.keys() == own.keys()
        assert all(torch.equal(found[n].view_as(t), t) for n, t in own.items())
    prefix = "cond_stage_model.transformer.text_model."
    text = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    own = {n.removeprefix("text_model."): t for n, t in pipe.text_encoder.state_dict().items()}
    assert own.keys() - {"embeddings.position_ids"} == text.keys()
    assert all(torch.equal(own[n], t) for n, t in text.items())


def test_what_is_predicted_is_marked(sd15_in_small: Path) -> None:
    pipe = open_base(str(sd15_in_small)).pipe
    assert not {"v_pred", "ztsnr"} & single_file(pipe).keys()
    for more, marks in (({}, {"v_pred"}), ({"rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"})):
        pipe.scheduler = DDIMScheduler(prediction_type="v_prediction", **more)
        assert {"v_pred", "ztsnr"} & single_file(pipe).keys() == marks


def test_bake_writes_one(sd15_in_small: Path, tmp_path: Path) -> None:
    import visionlora as vl

    base = open_base(str(sd15_in_small))
    handle = vl.inject(base.pipe.unet, vl.AdapterConfig(rank=2, targets="attn"))
    for lora in handle.methods.values():
        lora.lora_B.data.normal_()
    vl.save_adapter(handle.adapter("unet", {"base": {"id": str(sd15_in_small)}}), tmp_path / "a.safetensors")
    words = [
        "bake",
        "auto",
        str(tmp_path / "a.safetensors"),
        "-o",
        str(tmp_path / "model.safetensors"),
        "--dtype",
        "float16",
    ]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    handle.merge()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    found = load_file(tmp_path / "model.safetensors")[
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    ]
    assert torch.equal(found, base.pipe.unet.get_parameter(name).half())


UNET = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
RESAMPLED = "model.diffusion_model.output_blocks.2.1.conv.bias"


@pytest.fixture
def offline(sd15_in_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of a checkpoint comes from a folder, where diffusers fetches that of its family."""
    from diffusers import StableDiffusionPipeline

    read = StableDiffusionPipeline.from_single_file
    own = {"config": str(sd15_in_small), "local_files_only": True}
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", lambda path, **more: read(path, **own, **more))
    save_file(single_file(open_base(str(sd15_in_small)).pipe), tmp_path / "probe.safetensors")
    try:
        StableDiffusionPipeline.from_single_file(str(tmp_path / "probe.safetensors"))
    except AttributeError as e:
        pytest.skip(f"this diffusers is too old for this transformers: {e}")


def test_a_diffusers_older_than_its_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    def cannot(path: str, **more: object) -> None:
        raise AttributeError("'CLIPTextModel' object has no attribute 'text_model'")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", cannot)
    parts = ("model.diffusion_model.input_blocks.0", "first_stage_model", "cond_stage_model.model")
    save_file({f"{part}.x": torch.zeros(1) for part in parts}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"cannot be opened: diffusers .* is too old for transformers .*: update diffusers\.$"
    ):
        open_base(str(tmp_path / "model.safetensors"))


@pytest.mark.usefixtures("offline")
def test_a_checkpoint_opens_as_the_folder_that_it_was_written_from(sd15_in_small: Path, tmp_path: Path) -> None:
    folder = open_base(str(sd15_in_small))
    tensors = single_file(folder.pipe)
    average = {f"model_ema.{n.replace('.', '')}": t + 1 for n, t in tensors.items() if "diffusion" in n}
    save_file({**tensors, **average}, tmp_path / "model.safetensors")
    assert open_base(str(tmp_path / "model.safetensors")).weights_hash == folder.weights_hash


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (UNET, r"it lacks tensors of its UNet or VAE\. Copy or download it again\."),
        (VAE, r"it lacks tensors of its UNet or VAE\. Copy or download it again\."),
        (
            TEXT,
            r"the weights of its text_encoder are not those .*lacks 1 tensor \(first '.*layers\.0\.mlp\.fc1\.weight'\)",
        ),
        (RESAMPLED, r"it lacks the tensor 'output_blocks\.2\.1\.conv\.bias'\."),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(sd15_in_small: Path, tmp_path: Path, lost: str, said: str) -> None:
    """diffusers leaves it without values, and drawing would end in a traceback."""
    tensors = single_file(open_base(str(sd15_in_small)).pipe)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"The checkpoint .* cannot be opened: {said}"):
        open_base(str(tmp_path / "model.safetensors"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("cut", [UNET, TEXT])
def test_a_checkpoint_of_other_sizes_is_refused(sd15_in_small: Path, tmp_path: Path, cut: str) -> None:
    tensors = single_file(open_base(str(sd15_in_small)).pipe)
    save_file({**tensors, cut: tensors[cut][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"its weights are not those .* has '.*weight' of shape \(\d+, 16\) where the model"
    ):
        open_base(str(tmp_path / "model.safetensors"))


def test_a_checkpoint_of_the_refiner_is_told_by_its_header(tmp_path: Path) -> None:
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    with pytest.raises(ModelError, match="is SDXL's refiner, which only finishes pictures; visionlora opens"):
        open_base(str(tmp_path / "refiner.safetensors"))


def test_other_families_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"for Stable Diffusion 1\.x alone .* Name a folder as the output"):
        single_file(open_base(str(tiny_model)).pipe)


def test_a_vae_of_another_kind_is_in_no_checkpoint(sd15_in_small: Path) -> None:
    """Its tensors have other names, which nothing reads from one."""
    pipe = open_base(str(sd15_in_small)).pipe
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                               num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(ModelError, match="an AutoencoderKL"):
        single_file(pipe)


def test_the_guidance_that_a_unet_reads_is_in_no_checkpoint(sd15_in_small: Path) -> None:
    """diffusers leaves it out in silence."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    pipe = open_base(str(sd15_in_small)).pipe
    config, tensors = dict(pipe.unet.config), single_file(pipe)
    more = {f"model.diffusion_model.{n}.cond_proj.weight": torch.ones(2) for n in ("time_embed", "time_embedding")}
    assert convert_ldm_unet_checkpoint(tensors | more, config).keys() == pipe.unet.state_dict().keys()
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ModelError, match="no guidance that the UNet reads"):
        single_file(pipe)


def test_an_added_word_is_beside_the_checkpoint_and_not_in_its_table(sd15_in_small: Path, tmp_path: Path) -> None:
    """A1111 and ComfyUI refuse a table that is longer than CLIP's."""
    vectors = torch.randn(1, 16)
    save_file({"<rex>": vectors}, tmp_path / "word.safetensors")
    words = ["bake", str(sd15_in_small), str(tmp_path / "word.safetensors"), "-o", str(tmp_path / "one.safetensors")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pipe = open_base(str(sd15_in_small)).pipe
    table = load_file(tmp_path / "one.safetensors")[
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    ]
    assert torch.equal(table, pipe.text_encoder.get_input_embeddings().weight)
    assert torch.equal(load_file(tmp_path / "one-rex.safetensors")["<rex>"], vectors)
