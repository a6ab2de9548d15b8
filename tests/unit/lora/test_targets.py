"""Roles, names, suffixes and expressions -> modules; and every refusal."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from visionlora.errors import TargetError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.families import GROUPS, ROLES
from visionlora.lora.inject import inject
from visionlora.lora.targets import Resolution, resolve, suited_targets


def found(model: nn.Module, *targets: str, rank: int = 1, exclude: tuple[str, ...] = ()) -> Resolution:
    return resolve(model, AdapterConfig(targets=targets, rank=rank, exclude=exclude))


def block() -> nn.Module:
    """A transformer block with diffusers' names beside layers that look alike."""
    attn = nn.Module()
    attn.to_q, attn.to_k, attn.to_v = (nn.Linear(8, 8) for _ in range(3))
    attn.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])
    model = nn.Module()
    model.attn1, model.goto_q, model.norm = attn, nn.Linear(8, 8), nn.LayerNorm(8)
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv2d(3, 8, 2)
    return model


def names(*targets: str) -> list[str]:
    return [site.name for site in found(block(), *targets).sites]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("attn.q",), ["attn1.to_q"]),
        (("attn.qv",), ["attn1.to_q", "attn1.to_v"]),
        (("attn",), ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]),
        (("attn1.to_k",), ["attn1.to_k"]),
        (("to_q",), ["attn1.to_q"]),
        (("re:.*to_q",), ["attn1.to_q", "goto_q"]),
        (("attn.v", "attn.q", "to_q"), ["attn1.to_q", "attn1.to_v"]),
    ],
)
def test_targets_reach(targets: tuple[str, ...], expected: list[str]) -> None:
    assert names(*targets) == expected


def test_every_group_names_known_roles() -> None:
    assert {role for group in GROUPS.values() for role in group} <= set(ROLES)
    assert len(ROLES) >= 8


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("atn.q",), "Target 'atn.q' reaches no layer of Module. Did you mean 'attn.q'?"),
        (("attn", "to_x"), "Target 'to_x' reaches no layer of Module. Did you mean"),
        (("re:[",), "Target 're:[' is not a valid regular expression"),
        (("norm",), "reach no layer that can be adapted: norm (LayerNorm is neither linear nor a convolution)"),
        (("proj",), "reaches the patch embedding 'patch_embed.proj', which adapters leave alone"),
    ],
)
def test_refusals_say_what_and_what_else(targets: tuple[str, ...], words: str) -> None:
    model = block()
    if targets == ("proj",):
        targets = ("re:.*proj",)
    with pytest.raises(TargetError) as caught:
        found(model, *targets)
    assert words in str(caught.value)


def test_a_rank_above_the_layer_is_refused() -> None:
    with pytest.raises(TargetError, match=r"Rank 9 is larger than layer 'attn1.to_q' \(8 at its smaller side\)"):
        inject(block(), AdapterConfig(targets="attn", rank=9))


def test_text_encoder_roles(tiny_model) -> None:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder")
    assert len(found(encoder, "attn").sites) == 2 * 4
    assert len(found(encoder, "mlp").sites) == 2 * 2


def test_stable_diffusion_1_5_has_the_published_numbers_of_layers() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert len(found(unet, "attn", rank=4).sites) == 128
    assert len(found(unet, "attn", "mlp", rank=4).sites) == 160
    assert len(found(unet, "attn", "mlp", "proj", rank=4).sites) == 192


def test_stable_diffusion_2_and_xl_have_the_published_numbers_of_layers() -> None:
    from diffusers import UNet2DConditionModel

    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    ups = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    with torch.device("meta"):
        two = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
        xl = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), down_block_types=blocks, up_block_types=ups,
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    assert len(found(two, "attn", rank=4).sites) == 128
    assert len(found(xl, "attn", rank=4).sites) == 560
    assert len(found(xl, "attn", "mlp", "proj", rank=4).sites) == 722


def test_the_attention_names_of_transformers_before_5_9() -> None:
    """`vit.encoder.layer.0.attention.attention.query`, `…attention.output.dense`, `…intermediate.dense`, `…output.dense`."""
    layer = nn.Module()
    layer.attention, layer.intermediate, layer.output = nn.Module(), nn.Module(), nn.Module()
    layer.attention.attention, layer.attention.output = nn.Module(), nn.Module()
    for name in ("query", "key", "value"):
        setattr(layer.attention.attention, name, nn.Linear(8, 8))
    layer.attention.output.dense = nn.Linear(8, 8)
    layer.intermediate.dense, layer.output.dense = nn.Linear(8, 16), nn.Linear(16, 8)
    sites = {s.name: s.role for s in found(layer, "all").sites}
    assert sites == {
        "attention.attention.query": "attn.q",
        "attention.attention.key": "attn.k",
        "attention.attention.value": "attn.v",
        "attention.output.dense": "attn.out",
        "intermediate.dense": "mlp.in",
        "output.dense": "mlp.out",
    }


def test_what_is_left_out_need_not_have_been_reached() -> None:
    resolution = found(block(), "attn.q", exclude=("goto_q",))
    assert [site.name for site in resolution.sites] == ["attn1.to_q"]
    with pytest.raises(TargetError, match="Exclusion 'goto_x' reaches no layer"):
        found(block(), "attn.q", exclude=("goto_x",))


def test_a_role_that_a_model_has_not_is_the_name_of_a_layer() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "other": nn.Linear(2, 2)})
    assert [site.name for site in found(model, "conv").sites] == ["conv"]
    model["conv1"] = nn.Conv2d(2, 2, 1)  # which has the role
    assert [site.name for site in found(model, "conv").sites] == ["conv1"]


def convolutions() -> nn.Sequential:
    """A model without attention, of whose layers one has a role."""
    return nn.Sequential(
        OrderedDict(stem=nn.Conv2d(3, 8, 3), conv1=nn.Conv2d(8, 8, 3), squeeze=nn.Conv2d(8, 2, 1), fc=nn.Linear(8, 5))
    )


@pytest.mark.parametrize("word", ["all", "auto"])
def test_all_is_every_layer_but_the_head_where_there_is_no_attention(word: str) -> None:
    model = convolutions()
    resolution = resolve(model, AdapterConfig(rank=4, targets=word, train="fc"))
    assert [site.name for site in resolution.sites] == ["stem", "conv1"]
    assert resolution.skipped == (
        ("squeeze", "its smaller side, 2, is below the rank"),
        ("fc", "it trains in full"),
    )
    assert [s.name for s in resolve(model, AdapterConfig(method="ia3", targets=word)).sites] == [
        "stem", "conv1", "squeeze", "fc",
    ]  # fmt: skip
    handle = inject(model, AdapterConfig(rank=4, targets=word, train="fc"))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.stem(x), nn.functional.conv2d(x, model.stem.weight, model.stem.bias))
    assert handle.report.hits == (("stem", word), ("conv1", word))


def test_auto_is_queries_and_values_where_there_are_some() -> None:
    assert names("auto") == names("attn.qv") and suited_targets(block()) == "attn.qv"
    assert suited_targets(convolutions()) == "all"
    assert "squeeze" not in [site.name for site in found(convolutions(), "conv").sites]


def test_layers_are_named_where_a_model_has_no_roles() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2)))
    with pytest.raises(
        TargetError,
        match=r"no layer of role 'attn'\. Take `all`, each layer that can carry an adapter, or names of layers, such as first, "
        r"second\.",
    ):
        inject(model, AdapterConfig(targets="attn"))
    with pytest.raises(
        TargetError, match=r"no layer of role 'all'\. .*linear layers and convolutions, and it has neither"
    ):
        inject(nn.LayerNorm(2), AdapterConfig(targets="all"))
