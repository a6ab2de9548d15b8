"""Writes a pipeline as one checkpoint in the layout of the original Stable Diffusion 1.x code, as A1111 and ComfyUI load it.

model.diffusion_model.*                        the UNet, in sgm's names (`input_blocks.1.1.proj_in`)
first_stage_model.*                            the VAE (`encoder.down.0.block.0.conv1`)
cond_stage_model.transformer.text_model.*      CLIP's text encoder
v_pred, ztsnr                                  of no values, where the velocity is predicted, where the last level is noise
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import ModelError
from visionlora.formats.names import flattened, to_sgm, with_text_model
from visionlora.models.checkpoint_header import V_PREDICTION, ZERO_SNR

SGM_WORDS = re.compile(
    r"input_blocks|output_blocks|middle_block|transformer_blocks|proj_in|proj_out|to_[qkv]|to_out|in_layers|out_layers|"
    r"emb_layers|skip_connection|time_embed|label_emb|[a-z]+\d*|\d+"
)
VAE_RENAMES = (
    (r"\bdown_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"\bup_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0\.conv", r"up.\1.upsample.conv"),
    (r"\bmid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"\bmid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"\bmid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"\bconv_shortcut\b", "nin_shortcut"),
    (r"\bconv_norm_out\b", "norm_out"),
)


def sgm_dotted(path: str, attends: frozenset[int]) -> str:
    """The dotted name of a UNet's layer in the original code.

    >>> sgm_dotted("down_blocks.0.resnets.1.time_emb_proj", frozenset({1, 2, 3}))
    'input_blocks.2.0.emb_layers.1'
    """
    return ".".join(SGM_WORDS.findall(to_sgm(flattened(path), attends)))


def vae_name(name: str, levels: int) -> str:
    """The name of a VAE's parameter in the original code, which counts the decoder's levels from the other end.

    >>> vae_name("decoder.up_blocks.0.resnets.1.conv1.weight", 4), vae_name("encoder.mid_block.resnets.1.norm1.bias", 4)
    ('decoder.up.3.block.1.conv1.weight', 'encoder.mid.block_2.norm1.bias')
    """
    name = re.sub(r"\bmid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"\bup_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)
    for pattern, replacement in VAE_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def single_file(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of a pipeline under its name in one checkpoint.

    Raises:
        ModelError: for another family than Stable Diffusion 1.x: their checkpoints have another layout.
    """
    config = pipe.unet.config
    if (
        config.layers_per_block != 2
        or getattr(pipe, "text_encoder_2", None) is not None
        or config.use_linear_projection
        or config.time_cond_proj_dim is not None
        or type(pipe.vae).__name__ != "AutoencoderKL"
    ):
        raise ModelError(
            "One checkpoint can be written for Stable Diffusion 1.x alone (two layers in each block, one CLIP text encoder, no "
            "guidance that the UNet reads, an AutoencoderKL). "
            "Name a folder as the output: it keeps any model."
        )
    attends = frozenset(i for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind)
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        tensors[f"model.diffusion_model.{sgm_dotted(layer, attends)}.{parameter}"] = tensor
    levels = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        attention = re.search(r"mid_block\.attentions\.0\.to_.*weight$", name) is not None
        tensors["first_stage_model." + vae_name(name, levels)] = tensor[:, :, None, None] if attention else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        if not name.endswith("position_ids"):
            if name.endswith("token_embedding.weight"):  # other programs want the usual table, without added words
                tensor = tensor[: pipe.tokenizer.vocab_size]
            tensors["cond_stage_model.transformer." + with_text_model("text_encoder", name)] = tensor
    scheduler = pipe.scheduler.config
    if scheduler.get("prediction_type") == "v_prediction":
        tensors[V_PREDICTION] = torch.tensor([])
        if scheduler.get("rescale_betas_zero_snr"):
            tensors[ZERO_SNR] = torch.tensor([])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
