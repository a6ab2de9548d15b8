"""Layers of two encoders of one model, which are called alike."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import merge_adapters
from visionlora.lora.inject import attach
from visionlora.lora.names import common_names, resolve_names
from visionlora.lora.overlap import overlap

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = CLIPConfig(
    text_config={**SMALL, "vocab_size": 100, "max_position_embeddings": 16},
    vision_config={**SMALL, "image_size": 32, "patch_size": 8},
    projection_dim=16,
)


def fresh() -> Any:
    torch.manual_seed(0)
    return CLIPModel(CONFIG).eval()


def seen(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, pixels = torch.arange(8)[None], torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    return out.text_embeds, out.image_embeds


@pytest.fixture(scope="module")
def towers() -> tuple[Adapter, Adapter]:
    """An adapter on the text encoder, and one on the encoder of pictures."""
    found = []
    for tower in ("text_model", "vision_model"):
        handle = vl.inject(fresh(), vl.AdapterConfig(rank=2, targets=f"re:{tower}.*q_proj"))
        for p in handle.parameters():
            nn.init.normal_(p)
        found.append(handle.adapter("model"))
    return found[0], found[1]


def test_adapters_of_two_encoders_stay_apart(towers: tuple[Adapter, Adapter]) -> None:
    text, vision = towers
    both = fresh()
    for name, adapter in (("text", text), ("vision", vision)):
        attach(both, adapter, "model", name)
    wanted = seen(both)
    assert not torch.allclose(wanted[1], seen(fresh())[1])
    mixed, merged = fresh(), fresh()
    mix = vl.attach(mixed, {"text": text, "vision": vision})
    assert all("vision_model" in layer for _, layer in mix.layers("vision"))
    result = merge_adapters([(text, 1.0), (vision, 1.0)])
    assert len(result.adapter.modules) == 4
    attach(merged, result.adapter, "model")
    for model in (mixed, merged):
        torch.testing.assert_close(seen(model), wanted)
    assert not overlap({"text": text, "vision": vision})[0].layers


def test_an_encoder_by_itself_takes_no_layers_of_the_other(towers: tuple[Adapter, Adapter]) -> None:
    alone = CLIPTextModel(CONFIG.text_config).eval()
    attach(alone, towers[0], "model")
    with pytest.raises(TargetError, match="which CLIPTextModel has not"):
        attach(CLIPTextModel(CONFIG.text_config), towers[1], "model")


def test_a_name_without_prefix_beside_both_is_of_neither() -> None:
    files = [["layers.0.fc1"], ["text_model.layers.0.fc1"], ["vision_model.layers.0.fc1"]]
    assert common_names(files) == {}
    assert common_names(files[:2]) == {"layers.0.fc1": "text_model.layers.0.fc1"}


RENAMED = {
    "ViT, DeiT, BEiT": {
        "vit.encoder.layer.1.attention.attention.query": "vit.layers.1.attention.q_proj",
        "vit.encoder.layer.1.attention.attention.key": "vit.layers.1.attention.k_proj",
        "vit.encoder.layer.1.attention.attention.value": "vit.layers.1.attention.v_proj",
        "vit.encoder.layer.1.attention.output.dense": "vit.layers.1.attention.o_proj",
        "vit.encoder.layer.1.intermediate.dense": "vit.layers.1.mlp.fc1",
        "vit.encoder.layer.1.output.dense": "vit.layers.1.mlp.fc2",
    },
    "DINOv2": {
        "dinov2.encoder.layer.1.attention.attention.query": "dinov2.encoder.layer.1.attention.q_proj",
        "dinov2.encoder.layer.1.attention.output.dense": "dinov2.encoder.layer.1.attention.o_proj",
        "dinov2.encoder.layer.1.mlp.fc1": "dinov2.encoder.layer.1.mlp.fc1",
        "dinov2.encoder.layer.1.mlp.weights_out": "dinov2.encoder.layer.1.mlp.down_proj",
    },
    "DINOv3": {"layer.1.attention.q_proj": "model.layer.1.attention.q_proj"},
    "Swin": {
        "swin.encoder.layers.0.blocks.1.attention.self.query": "swin.encoder.layers.0.blocks.1.attention.q_proj",
        "swin.encoder.layers.0.blocks.1.attention.self.key": "swin.encoder.layers.0.blocks.1.attention.k_proj",
        "swin.encoder.layers.0.blocks.1.attention.self.value": "swin.encoder.layers.0.blocks.1.attention.v_proj",
        "swin.encoder.layers.0.blocks.1.attention.output.dense": "swin.encoder.layers.0.blocks.1.attention.o_proj",
        "swin.encoder.layers.0.blocks.1.intermediate.dense": "swin.encoder.layers.0.blocks.1.mlp.fc1",
        "swin.encoder.layers.0.blocks.1.output.dense": "swin.encoder.layers.0.blocks.1.mlp.fc2",
    },
    "SegFormer": {
        "segformer.encoder.patch_embeddings.2.proj": "segformer.stages.2.patch_embeddings.proj",
        "segformer.encoder.block.0.1.attention.self.query": "segformer.stages.0.blocks.1.attention.q_proj",
        "segformer.encoder.block.0.1.attention.self.sr": (
            "segformer.stages.0.blocks.1.attention.sequence_reduction.sequence_reduction"
        ),
        "segformer.encoder.block.0.1.attention.output.dense": "segformer.stages.0.blocks.1.attention.o_proj",
        "segformer.encoder.block.0.1.mlp.dense1": "segformer.stages.0.blocks.1.mlp.fc1",
        "segformer.encoder.block.0.1.mlp.dense2": "segformer.stages.0.blocks.1.mlp.fc2",
    },
}
"""Layers in the names before and since transformers 5.9."""


@pytest.mark.parametrize("family", RENAMED)
def test_layers_that_transformers_renamed_are_found_from_either_side(family: str) -> None:
    newer = RENAMED[family]
    older = {new: old for old, new in newer.items()}
    assert resolve_names(newer, older) == newer and resolve_names(older, newer) == older
    for names in (newer, older):  # as LyCORIS has them
        flat = {name.replace(".", "_"): other for name, other in names.items()}
        assert resolve_names(flat, names.values()) == flat
