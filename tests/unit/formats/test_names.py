"""Names in files against the topologies of SD 1.5, SD 2.x and SDXL, built without weights, and diffusers' own map."""

import warnings
from functools import cache

import pytest
import torch
from torch import nn

from visionlora.formats.kohya import flat_name
from visionlora.formats.names import dotted, flattened, from_sgm, locate, to_sgm
from visionlora.lora.config import AdapterConfig
from visionlora.lora.names import resolve_names, spelling_key
from visionlora.lora.targets import resolve

SD1 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {**SD1, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


@cache
def unet(family: str) -> nn.Module:
    """The UNet of a family on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**FAMILIES[family])


@cache
def text_encoder() -> nn.Module:
    """SDXL's second text encoder on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )


def layers(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    return [n for n, m in model.named_modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_unet_is_found_again(family: str) -> None:
    names = layers(unet(family))
    assert len({flattened(n) for n in names}) == len(names)
    for name in names:
        assert dotted(flattened(name)) == name
        assert locate(flat_name("unet", name, family == "sdxl")) == ("unet", name)
        assert locate("unet." + name) == ("unet", name)


def test_every_layer_of_a_text_encoder_is_found_again() -> None:
    for name in layers(text_encoder()):
        assert locate(flat_name("text_encoder_2", name, True)) == ("text_encoder_2", name)
        assert locate(flat_name("text_encoder", name.removeprefix("text_model."), False))[0] == "text_encoder"
    assert locate("lora_te2_text_projection") == ("text_encoder_2", "text_projection")


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("sd1", "attn", 128), ("sd1", "attn,mlp,proj", 192), ("sd1", "attn,mlp,proj,conv,time", 278),
        ("sd2", "attn", 128), ("sd2", "attn,mlp,proj", 192),
        ("sdxl", "attn", 560), ("sdxl", "attn,mlp,proj", 722), ("sdxl", "attn,mlp,proj,conv,time", 788),
    ],
)  # fmt: skip
def test_kohya_names_and_their_number(family: str, targets: str, count: int) -> None:
    sites = resolve(unet(family), AdapterConfig(targets=targets)).sites
    flat = {flat_name("unet", s.name, family == "sdxl") for s in sites}
    assert len(flat) == count
    sgm = sum(n.startswith(("lora_unet_input_", "lora_unet_output_", "lora_unet_middle_")) for n in flat)
    assert sgm == (count if family == "sdxl" else 0)


KNOWN_SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.1.resnets.2.conv_shortcut": "output_blocks_5_0_skip_connection",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "conv_in": "input_blocks_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


@pytest.mark.parametrize("name", KNOWN_SDXL)
def test_names_of_the_original_code(name: str) -> None:
    assert to_sgm(flattened(name)) == KNOWN_SDXL[name]
    assert from_sgm(KNOWN_SDXL[name]) == flattened(name)


def test_upsampler_of_a_block_without_attention() -> None:
    """SD 1.x: `output_blocks_2_1_conv`."""
    assert from_sgm("output_blocks_2_1_conv") == "up_blocks_0_upsamplers_0_conv"
    assert to_sgm("up_blocks_0_upsamplers_0_conv", attends=frozenset({1, 2, 3})) == "output_blocks_2_1_conv"


@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_our_sdxl_names_as_the_same_layers() -> None:
    from diffusers.loaders import lora_conversion_utils as theirs

    sites = resolve(unet("sdxl"), AdapterConfig(targets="attn,mlp,proj")).sites
    state = {}
    for k, site in enumerate(sites):
        flat = flat_name("unet", site.name, True)
        state |= {f"{flat}.lora_down.weight": torch.full((1, 2), k), f"{flat}.lora_up.weight": torch.full((3, 1), k)}
        state[flat + ".alpha"] = torch.tensor(1.0)
    state = theirs._maybe_map_sgm_blocks_to_diffusers(state, unet("sdxl").config)
    converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(state)
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    found = convert_unet_state_dict_to_peft({k.removeprefix("unet."): t for k, t in converted.items()})
    assert {k: int(t[0, 0]) for k, t in found.items() if "lora_A" in k} == {
        f"{site.name}.lora_A.weight": k for k, site in enumerate(sites)
    }


OLD_SPELLINGS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q":
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out":
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q":
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out":
        ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj"),
    "text_encoder.encoder.layers.0.mlp.fc1": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
    "base_model.model.blocks.0.attn.qkv": ("model", "blocks.0.attn.qkv"),
    "base_model.model.blocks.0.attn.to_out": ("model", "blocks.0.attn.to_out"),
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q":
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    "diffusion_model.middle_block.0.in_layers.2": ("unet", "mid_block.resnets.0.conv1"),
    "diffusion_model.double_blocks.0.img_attn.qkv": ("model", "diffusion_model.double_blocks.0.img_attn.qkv"),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj":
        ("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj"),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1":
        ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1"),
    "lycoris_blocks_0_attn_qkv": ("model", "blocks_0_attn_qkv"),
    "lora_te_text_model_encoder_layers_11_mlp_fc2": ("text_encoder", "text_model.encoder.layers.11.mlp.fc2"),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_older_spellings(name: str) -> None:
    assert locate(name) == OLD_SPELLINGS[name]


def test_vits_of_older_transformers_are_found_in_newer_ones() -> None:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(num_hidden_layers=2))
    known = [n for n, _ in model.named_modules()]
    old = {
        f"encoder.layer.1.{old}": new
        for old, new in {
            "attention.attention.query": "q_proj", "attention.attention.key": "k_proj", "attention.output.dense": "o_proj",
            "intermediate.dense": "fc1", "output.dense": "fc2",
        }.items()
    }  # fmt: skip
    if not any(n.endswith("attention.q_proj") for n in known):
        pytest.skip("this transformers still has the older names")
    found = resolve_names(old, known)
    assert {k: v.rpartition(".")[2] for k, v in found.items()} == old
    assert all(".1." in v for v in found.values())


def test_names_that_differ_in_what_a_flat_name_loses_are_not_confused() -> None:
    known = ["a.b_c", "a_b.c", "d.e"]
    assert spelling_key(known[0]) == spelling_key(known[1])
    assert resolve_names(["a_b_c", "a.b_c", "d_e"], known) == {"a.b_c": "a.b_c", "d_e": "d.e"}


def test_towers_of_a_whole_clip_are_told_apart_and_one_alone_is_found_without_its_level() -> None:
    known = [f"{tower}_model.encoder.layers.0.mlp.fc1" for tower in ("text", "vision")]
    flat = {name.replace(".", "_"): name for name in known}
    assert resolve_names(flat, known) == flat
    assert resolve_names([known[1]], ["encoder.layers.0.mlp.fc1"]) == {known[1]: "encoder.layers.0.mlp.fc1"}
