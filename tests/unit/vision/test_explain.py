"""Heat maps of the models of three libraries: against their definitions, under adapters, and what they leave behind."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer, resnet18
from transformers import ViTConfig, ViTForImageClassification

from visionlora.errors import ConfigError, ModelError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import inject
from visionlora.vision.explain import (
    attention_rollout,
    grad_cam,
    in_unit_range,
    supports,
)

SIDE, PATCH, GRID = 64, 16, 4


def timm_vit(**changes) -> nn.Module:
    settings = {"img_size": SIDE, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5, **changes}
    return timm.create_model("vit_tiny_patch16_224", **settings)


def torchvision_vit() -> nn.Module:
    model = VisionTransformer(SIDE, PATCH, 3, 3, 48, 96, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # torchvision's own is zero
    return model


def transformers_vit(attention: str = "sdpa") -> nn.Module:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH, num_labels=5, attn_implementation=attention)
    )


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, embed_dim=12, depths=(1, 1), num_heads=(1, 2), num_classes=5
    )


def torchvision_swin() -> nn.Module:
    return SwinTransformer([4, 4], 12, depths=[1, 1], num_heads=[1, 2], window_size=[7, 7], num_classes=5)


VITS = {"timm": timm_vit, "torchvision": torchvision_vit, "transformers": transformers_vit}
METHODS = {"grad-cam": lambda m, x: grad_cam(m, x, torch.tensor([1, 4])), "rollout": attention_rollout}


def seeded(make, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = make(*args, **kwargs).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" not in name and "ln" not in name and p.dim() == 2:
            p.normal_(std=0.2)  # as drawn by the libraries the attention would be all but even
    return model


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (SIDE, SIDE)), generator=torch.Generator().manual_seed(1))


def adapted(model: nn.Module, **changes) -> Handle:
    handle = inject(model, AdapterConfig(**{"rank": 4, "targets": "attn", **changes}))
    for m in handle.methods.values():
        m.lora_B.data.normal_(std=0.2)
    return handle


# ------------------------------------------------------------------------------------------- against the definitions


def maps_by_hooks(library: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Attention of each block, (n, heads, t, t), by another way than the one under test."""
    found: list[Tensor] = []
    if library == "transformers":
        return list(model(x, output_attentions=True).attentions)
    if library == "timm":
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _, __, out: found.append(out))
        model(x)
    else:
        for block in model.encoder.layers:
            block.ln_1.register_forward_hook(
                lambda _, __, out, mha=block.self_attention: found.append(
                    mha(out, out, out, average_attn_weights=False)[1]
                )
            )
        model(x)
    return found


@pytest.mark.parametrize("library", VITS)
@torch.no_grad()
def test_rollout_equals_its_definition(library: str) -> None:
    model = seeded(VITS[library], *(["eager"] if library == "transformers" else []))
    ours = attention_rollout(model, pictures())
    maps = maps_by_hooks(library, model, pictures())
    assert len(maps) == 3
    for k in range(2):
        total = np.eye(17)
        for a in maps:
            total = (0.5 * a[k].mean(0).double().numpy() + 0.5 * np.eye(17)) @ total
        coarse = torch.from_numpy(total[0, 1:]).view(1, 1, GRID, GRID)
        sized = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0, 0]
        expected = (sized - sized.min()) / (sized.max() - sized.min())
        torch.testing.assert_close(ours[k].double(), expected, rtol=0, atol=1e-5)


def test_rollout_of_a_model_that_pools_is_the_mean_of_the_patches_rows() -> None:
    model = seeded(timm_vit, depth=1, global_pool="avg")
    (a,) = maps_by_hooks("timm", model, pictures())
    rows = (0.5 * a.mean(1) + 0.5 * torch.eye(17))[:, 1:, 1:].mean(1).view(2, GRID, GRID)
    torch.testing.assert_close(attention_rollout(model, pictures()), in_unit_range(rows, SIDE, SIDE))


def test_rollout_ends_in_the_pooling_attention_where_there_is_one() -> None:
    model = seeded(timm_vit, depth=1, global_pool="map", class_token=False)
    model.attn_pool.fused_attn = False
    pooled: list[Tensor] = []
    model.attn_pool.k_norm.register_forward_hook(lambda _, __, k: pooled.append(k))
    (a,) = maps_by_hooks("timm", model, pictures())
    q = model.attn_pool.q(model.attn_pool.latent).view(1, 1, 3, 16).transpose(1, 2)
    pool = (q * 16**-0.5 @ pooled[0].mT).softmax(-1).mean(1)
    rows = (pool @ (0.5 * a.mean(1) + 0.5 * torch.eye(16))).view(2, GRID, GRID)
    torch.testing.assert_close(attention_rollout(model, pictures()), in_unit_range(rows, SIDE, SIDE))


def test_grad_cam_equals_its_equations() -> None:
    model = seeded(timm_vit, reg_tokens=2)
    tokens: list[Tensor] = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _, __, out: tokens.append(out.requires_grad_()))
    logits = model(pictures())
    handle.remove()
    for k, c in enumerate((1, 4)):
        (gradient,) = torch.autograd.grad(logits[k, c], tokens[0], retain_graph=True)
        alpha = gradient[k, 3:].mean(0)
        cam = (tokens[0][k, 3:] @ alpha).relu().detach().view(1, GRID, GRID)
        ours = METHODS["grad-cam"](model, pictures())[k]
        torch.testing.assert_close(ours, in_unit_range(cam, SIDE, SIDE)[0], rtol=0, atol=1e-5)


def test_both_attention_codes_of_transformers_give_one_rollout() -> None:
    fused, eager = (attention_rollout(seeded(transformers_vit, kind), pictures()) for kind in ("sdpa", "eager"))
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- under adapters


@pytest.mark.parametrize("save_memory", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", VITS)
def test_adapters_are_in_the_map_merged_or_not(library: str, method: str, save_memory: bool) -> None:
    model, explain = seeded(VITS[library]), METHODS[method]
    base = explain(model, pictures())
    handle = adapted(model, save_memory=save_memory)
    beside = explain(model, pictures())
    handle.merge()
    torch.testing.assert_close(beside, explain(model, pictures()), rtol=0, atol=1e-5)
    assert (beside - base).abs().max() > 0.01
    handle.eject()
    assert torch.equal(explain(model, pictures()), base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["attn.q", "attn.v"])
def test_a_part_of_a_fused_layer_is_enough(method: str, part: str) -> None:
    model, explain = seeded(timm_vit, qk_norm=True), METHODS[method]
    handle = adapted(model, targets=part, method="dora")
    beside = explain(model, pictures())
    handle.merge()
    torch.testing.assert_close(beside, explain(model, pictures()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [swin, torchvision_swin])
def test_grad_cam_of_an_adapted_swin(make) -> None:
    model, x = seeded(make).double(), pictures(112, 112).double()
    handle = adapted(model)
    model.double()
    beside = METHODS["grad-cam"](model, x)
    handle.merge()
    torch.testing.assert_close(beside, METHODS["grad-cam"](model, x), rtol=0, atol=1e-5)
    assert beside.std() > 0


# ------------------------------------------------------------------------------------------------------- what is left


def state_of(model: nn.Module) -> list[object]:
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    flags = [(n, p.requires_grad, None if p.grad is None else p.grad.sum().item()) for n, p in model.named_parameters()]
    return [hooks, flags, {n: v.sum().item() for n, v in model.state_dict().items()}]


@pytest.mark.parametrize("library", VITS)
def test_the_model_is_left_as_it_was(library: str) -> None:
    model = seeded(VITS[library])
    handle = adapted(model, dropout=0.5)
    evaluated = [explain(model, pictures()) for explain in METHODS.values()]
    model.train()
    next(model.children()).eval()
    for p in handle.parameters()[::2]:
        p.grad = torch.ones_like(p)
    before, random = state_of(model), torch.get_rng_state()
    for explain, expected in zip(METHODS.values(), evaluated, strict=True):
        assert torch.equal(explain(model, pictures()), expected)  # without dropout
    with pytest.raises(ConfigError):
        grad_cam(model, pictures(), torch.tensor([0, 9]))
    with pytest.raises(ModelError):
        grad_cam(model, pictures(), torch.tensor([0, 1]), layer="nowhere")
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_maps_under_inference_mode_checkpointing_and_compile_are_the_same() -> None:
    model = seeded(timm_vit)
    adapted(model)
    plain = [explain(model, pictures()) for explain in METHODS.values()]
    with torch.inference_mode():
        for explain, expected in zip(METHODS.values(), plain, strict=True):
            torch.testing.assert_close(explain(model, pictures()), expected, rtol=0, atol=1e-6)
    model.set_grad_checkpointing(True)
    for explain, expected in zip(METHODS.values(), plain, strict=True):
        torch.testing.assert_close(explain(model, pictures()), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(explain(torch.compile(model), pictures()), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- what works


@pytest.mark.parametrize(
    "make, expected",
    [*((m, ("grad-cam", "rollout")) for m in VITS.values()), (swin, ("grad-cam",)), (resnet18, ("grad-cam",))],
    ids=[*VITS, "swin", "resnet"],
)
def test_supports(make, expected: tuple[str, ...]) -> None:
    assert supports(seeded(make)) == expected
