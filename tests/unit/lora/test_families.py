"""Roles on every model family: what they reach, that nothing reached is dead, and that merging says the same."""

import importlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from visionlora.errors import TargetError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
    import torchvision
    import transformers


def hf_vit() -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=16))


def hf_dino() -> nn.Module:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=16
        )
    )


def hf_gated() -> nn.Module:
    config = hf_dino().config
    config.use_swiglu_ffn = True
    return transformers.Dinov2Model(config)


GATED = 2 * sum(isinstance(m, nn.Linear) for m in hf_gated().encoder.layer[0].mlp.children())
"""Layers of its MLPs: transformers has made two of the first, which was one."""


def hf_clip() -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16))


def tv_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48)


def tv_swin(version: str = "") -> nn.Module:
    block = {"": torchvision.models.swin_transformer.SwinTransformerBlock,
             "v2": torchvision.models.swin_transformer.SwinTransformerBlockV2}[version]  # fmt: skip
    merge = {"": torchvision.models.swin_transformer.PatchMerging,
             "v2": torchvision.models.swin_transformer.PatchMergingV2}[version]  # fmt: skip
    return torchvision.models.SwinTransformer(
        [4, 4], 24, [2], [2], [4, 4], stochastic_depth_prob=0.0, block=block, downsample_layer=merge
    )


def caformer() -> nn.Module:
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    return MetaFormer(
        num_classes=3, depths=(1, 1), dims=(16, 32), token_mixers=[SepConv, Attention],
        norm_layers=[LayerNorm2dNoBias, LayerNormNoBias],
    )  # fmt: skip


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=3, **options)


VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (2,), "window_size": 4}
COAT = {"img_size": 32, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1)}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "timm ViT": (
        timm_model("vit_tiny_patch16_224", **VIT),
        {"attn.q": 2, "attn": 8, "mlp": 4, "all": 12, "attn,patch_embed.proj": 9},
    ),
    "timm DeiT": (timm_model("deit_tiny_distilled_patch16_224", **VIT), {"attn.v": 2, "attn": 8, "mlp": 4}),
    "timm BEiT": (timm_model("beit_base_patch16_224", **VIT), {"attn.qv": 4, "attn": 8, "mlp": 4}),
    "timm EVA": (timm_model("eva02_tiny_patch14_224", **{**VIT, "num_heads": 1, "embed_dim": 24}), {"attn": 8}),
    "timm Swin": (timm_model("swin_tiny_patch4_window7_224", **SWIN), {"attn.qv": 4, "attn": 8, "mlp": 4}),
    "timm Swin v2": (timm_model("swinv2_tiny_window8_256", **SWIN), {"attn.qv": 4, "attn": 8}),
    "timm CaFormer": (caformer, {"attn": 4, "mlp": 4, "conv": 4}),
    "timm CoaT": (timm_model("coat_lite_tiny", **COAT), {"auto": 8, "attn": 16, "mlp": 8}),
    "timm EfficientNet": (timm_model("test_efficientnet"), {"auto": 18, "all": 18}),
    "torchvision ViT": (tv_vit, {"attn.q": 2, "attn": 8, "mlp": 4, "attn,conv_proj": 9}),
    "torchvision Swin": (tv_swin, {"attn.qv": 4, "attn": 8, "mlp": 4}),
    "torchvision Swin v2": (lambda: tv_swin("v2"), {"attn.qv": 4, "attn": 8, "mlp": 4}),
    "transformers ViT": (
        hf_vit,
        {"attn.q": 2, "attn": 8, "mlp": 4, "attn,vit.embeddings.patch_embeddings.projection": 9},
    ),
    "transformers DINOv2": (hf_dino, {"attn.q": 2, "attn": 8, "mlp": 4}),
    "transformers DINOv2, gated": (hf_gated, {"attn.q": 2, "attn": 8, "mlp": GATED}),
    "transformers CLIP": (hf_clip, {"attn.q": 2, "attn": 8, "mlp": 4}),
}


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name][0]().eval().requires_grad_(False)
    for p in model.parameters():  # some start at zero, which would hide what lies behind them
        p.data += 0.2 * torch.randn(p.shape)
    return model, torch.randn(2, 3, 32, 32)


CASES = [(name, targets, count) for name, (_, counts) in MODELS.items() for targets, count in counts.items()]


@pytest.mark.parametrize(("name", "targets", "count"), CASES)
def test_roles_reach_live_layers_and_merge_says_the_same(name: str, targets: str, count: int) -> None:
    model, x = made(name)
    with torch.no_grad():
        base = output(model, x)
    handle = inject(model, AdapterConfig(rank=2, targets=targets))
    assert len(handle.methods) == count
    with torch.no_grad():
        assert torch.equal(output(model, x), base)
    for m in handle.methods.values():
        m.lora_B.data.normal_(std=0.2)
    learning = output(model, x)
    learning.square().sum().backward()
    handle.check_gradients()
    assert all(p.grad.abs().sum() > 0 for m in handle.methods.values() for p in [m.lora_B]), "every layer counts"
    with torch.no_grad():
        stacked = output(model, x)
        handle.merge()
        merged = output(model, x)
    assert (learning - base).abs().max() > 1e-3
    torch.testing.assert_close(stacked, learning, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(merged, learning, rtol=2e-4, atol=2e-4)
    handle.eject()
    with torch.no_grad():
        assert torch.equal(output(model, x), base)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_torch_attention_in_all_its_forms(batch_first: bool, need_weights: bool, same: bool) -> None:
    """The oracle is torch's own attention on the explicit W + ΔW."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=None if same else 6, vdim=None if same else 10)
    mha = mha.double().requires_grad_(False)
    model = nn.ModuleDict({"attn": mha})
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    key, value = (x, x) if same else (torch.randn(3, 4, w, dtype=torch.float64) for w in (6, 10))
    batch, length = (3, 4) if batch_first else (4, 3)
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    options = {"need_weights": need_weights, "attn_mask": causal, "key_padding_mask": padding}
    handle = inject(model, AdapterConfig(rank=2, alpha=3.0, targets="attn"))
    for m in handle.methods.values():
        m.double().lora_B.data.normal_()
    ours = model["attn"](x, key, value, **options)
    with torch.no_grad():
        for m in handle.methods.values():
            ((a, b, s),) = m.factors()
            m.site.weight.add_(b @ a * s)
    handle.set_scale(0.0)
    theirs = model["attn"](x, key, value, **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
    if need_weights:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-10, atol=1e-10)


def test_the_fast_path_of_a_transformer_layer_sees_the_adapter() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = layer(x)
        handle = inject(nn.ModuleDict({"block": layer}), AdapterConfig(rank=2, targets="attn.v"))
        assert torch.allclose(layer(x), base, atol=1e-6)
        for m in handle.methods.values():
            m.lora_B.data.normal_()
        apart = layer(x)
        assert (apart - base).abs().max() > 1e-3
        handle.merge()
        torch.testing.assert_close(layer(x), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (lambda: made("timm BEiT")[0], ("attn.q", "attn.out")),
        (lambda: nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2, 16)}), ("linear1", "attn.q")),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), ("a.q", "a.out_proj")),
    ],
)
def test_what_reads_weights_is_itself_again_in_any_order(
    model, targets: tuple[str, str], order: tuple[int, int]
) -> None:
    model = model()
    before = [type(m) for m in model.modules()]
    handles = [inject(model, AdapterConfig(rank=2, targets=t), name=f"h{k}") for k, t in enumerate(targets)]
    for k in order:
        handles[k].eject()
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("re:.*proj", "reaches the patch embedding 'conv_proj', which adapters leave alone"),
        ("encoder.layers.encoder_layer_0.mlp.0.q", "which is a Linear without parts: name the layer itself"),
        ("sel_attention", "Did you mean 'self_attention'?"),
        ("mlp.7", "Target 'mlp.7' reaches no layer of VisionTransformer."),
    ],
)
def test_refusals(targets: str, words: str) -> None:
    model, _ = made("torchvision ViT")
    with pytest.raises(TargetError) as caught:
        inject(model, AdapterConfig(rank=2, targets=targets))
    assert words in str(caught.value)


def test_a_layer_that_is_never_called_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "dead": nn.Linear(4, 4)})
    handle = inject(model, AdapterConfig(rank=2, targets=("used", "dead")))
    model["used"](torch.randn(2, 4)).sum().backward()
    with pytest.raises(TargetError, match="1 adapted layers got no gradient, the first 'dead'"):
        handle.after_step(1, 10)


@pytest.mark.parametrize("first", [0, 1])
def test_adapters_on_parts_of_one_attention_leave_in_any_order(first: int) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}).requires_grad_(False), torch.randn(3, 2, 8)
    base = model["attn"](x, x, x)[0]
    handles = [inject(model, AdapterConfig(rank=2, targets=t), name=t[-1]) for t in ("attn.q", "attn.out")]
    for h in handles:
        for m in h.methods.values():
            m.lora_B.data.normal_()
    handles[first].eject()
    assert not torch.equal(model["attn"](x, x, x)[0], base)
    handles[1 - first].eject()
    assert type(model["attn"]) is nn.MultiheadAttention
    assert torch.equal(model["attn"](x, x, x)[0], base)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("tiny_vit.Attention", {"dim": 16, "key_dim": 4, "num_heads": 2, "attn_ratio": 2, "resolution": (4, 4)}),
        ("efficientformer.Attention", {"dim": 16, "key_dim": 4, "num_heads": 2, "attn_ratio": 2, "resolution": 4}),
        ("maxxvit.AttentionCl", {"dim": 16, "dim_head": 4}),
        ("gcvit.WindowAttentionGlobal", {"dim": 24, "num_heads": 2, "window_size": (4, 4), "use_global": True}),
    ],
)
def test_projections_that_lie_in_each_other_are_taken_whole(attention: str, options: dict[str, object]) -> None:
    module, _, cls = attention.partition(".")
    model = nn.ModuleDict({"attn": getattr(importlib.import_module(f"timm.models.{module}"), cls)(**options)})
    handle = inject(model, AdapterConfig(rank=1, targets="attn.qv"))
    assert list(handle.methods) == ["attn.qkv"]
    handle.eject()
    with pytest.raises(TargetError, match=r"no layer of role 'attn.k'. It has .*attn.mingled"):
        inject(model, AdapterConfig(rank=1, targets="attn.k"))


def test_a_network_without_attention_says_what_it_has() -> None:
    model = timm.create_model("convnext_atto")
    with pytest.raises(TargetError, match=r"ConvNeXt has no layer of role 'attn.qv'. It has mlp.in, mlp.out"):
        inject(model, AdapterConfig(rank=1, targets="attn.qv"))
