"""One checkpoint in the original layout, against diffusers' own reader of such files."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
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


def test_other_families_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"for Stable Diffusion 1\.x alone .* Name a folder as the output"):
        single_file(open_base(str(tiny_model)).pipe)


def test_an_added_word_is_beside_the_checkpoint_and_not_in_its_table(sd15_in_small: Path, tmp_path: Path) -> None:
    """A1111 and ComfyUI refuse a table that is longer than CLIP's."""
    from safetensors.torch import save_file

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
