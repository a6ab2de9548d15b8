"""Heat maps with a known answer, the shapes that they come in, what is refused in words, and how they are drawn."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from visionlora.errors import ConfigError, DataError, ModelError
from visionlora.vision.explain import attention_rollout, attention_weights, grad_cam, in_unit_range, overlay
from visionlora.vision.places import default_layer, patch_grid, places

SIDE, PATCH, GRID = 64, 16, 4
METHODS = {"grad-cam": lambda m, x: grad_cam(m, x, torch.tensor([1, 4])), "rollout": attention_rollout}


def vit(**changes) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": SIDE, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5, **changes}
    return timm.create_model("vit_tiny_patch16_224", **settings).eval()


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, embed_dim=12, depths=(1, 1), num_heads=(1, 2), num_classes=5
    ).eval()


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (SIDE, SIDE)), generator=torch.Generator().manual_seed(1))


@given(st.booleans(), st.none() | st.floats(0.1, 2), st.integers(1, 5), st.integers(1, 5))
def test_attention_weights_are_those_of_the_fused_kernel(boolean: bool, scale: float | None, q: int, k: int) -> None:
    torch.manual_seed(q * 10 + k)
    query, key = torch.randn(2, 3, q, 4), torch.randn(2, 3, k, 4)
    mask = torch.randn(q, k)
    mask = (mask > 0).index_fill(1, torch.tensor(0), True) if boolean else mask
    seen = F.scaled_dot_product_attention(query, key, torch.eye(k).expand(2, 3, k, k), mask, scale=scale)
    torch.testing.assert_close(attention_weights(query, key, key, mask, scale=scale), seen)


# ------------------------------------------------------------------------------------------------------ known answers


def reader_of_the_white_patch() -> nn.Module:
    """A ViT whose class token attends to white patches alone and whose class 0 is how much white it got."""
    model = vit(depth=1, embed_dim=8, num_heads=1, num_classes=2).requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    model.patch_embed.proj.weight[0] = 1 / (3 * PATCH**2)  # channel 0 is brightness
    block = model.blocks[0]
    for norm in (block.norm1, block.norm2, model.norm):
        norm.weight.fill_(1)
    q, k, v = (block.attn.qkv.weight[8 * i : 8 * i + 8] for i in range(3))
    block.attn.qkv.bias[0] = 5  # of q
    k[0, 0] = v[0, 0] = block.attn.proj.weight[0, 0] = model.head.weight[0, 0] = 1
    assert not q.any()
    return model


@pytest.mark.parametrize("place", range(0, GRID**2, 5))
def test_maps_peak_at_the_only_patch_that_counts(place: int) -> None:
    x = torch.zeros(1, 3, SIDE, SIDE)
    row, column = PATCH * (place // GRID), PATCH * (place % GRID)
    x[..., row : row + PATCH, column : column + PATCH] = 1
    model = reader_of_the_white_patch()
    for heat in (grad_cam(model, x, torch.tensor([0])), attention_rollout(model, x)):
        coarse = F.avg_pool2d(heat, PATCH)[0].flatten()
        assert coarse.argmax() == place
        assert coarse[place] > 4 * coarse.median()
    assert not grad_cam(model, x, torch.tensor([1])).any()  # nothing speaks for a class that reads nothing


def test_maps_of_pictures_that_are_not_square() -> None:
    model = vit(img_size=(32, 96))
    for explain in METHODS.values():
        maps = explain(model, pictures(32, 96))
        assert maps.shape == (2, 32, 96)
        assert maps.amin((1, 2)).tolist() == [0, 0] and maps.amax((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_alone_has_the_map_that_it_has_in_a_batch(method: str) -> None:
    model, x = vit(), pictures()
    alone = grad_cam(model, x[1:], torch.tensor([4])) if method == "grad-cam" else attention_rollout(model, x[1:])
    torch.testing.assert_close(alone[0], METHODS[method](model, x)[1], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    "make, size, layer",
    [
        (vit, 64, "blocks.2.norm1"),
        (lambda: vit(global_pool="map", class_token=False), 64, "blocks.2.norm1"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1), 64, "blocks.0.norm1"),
        (swin, 112, "layers"),
        (lambda: resnet18().eval(), 64, "layer4"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), 8, "1"),
    ],
)
def test_the_layer_that_is_read(make, size: int, layer: str) -> None:
    assert default_layer(make().eval(), pictures(size, size)) == layer


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), st.sampled_from([8, 14, 16]))
def test_tokens_are_laid_out_as_they_were_cut(rows: int, columns: int, prefix: int, patch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, patch, patch))
    model.num_prefix_tokens = prefix
    grid = patch_grid(model, prefix + rows * columns, rows * patch, columns * patch)
    assert grid == (prefix, rows, columns)
    del model.num_prefix_tokens
    assert patch_grid(model, prefix + rows * columns, rows * patch, columns * patch) == grid


@given(st.integers(3, 12), st.integers(3, 12), st.integers(100, 200))
def test_both_orders_of_a_map_are_told_apart(rows: int, columns: int, channels: int) -> None:
    assert places((1, channels, rows, columns), rows * 32, columns * 32) == (2, 3)
    assert places((1, rows, columns, channels), rows * 32, columns * 32) == (1, 2)


# -------------------------------------------------------------------------------------------------------- refused


def test_what_has_no_map_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"windows or stages.*Use Grad-CAM"):
        attention_rollout(swin(), pictures(112, 112))
    with pytest.raises(ModelError, match="No attention was seen in ResNet"):
        attention_rollout(resnet18(num_classes=5).eval(), pictures())
    model, classes = vit(), torch.tensor([0, 1])
    with pytest.raises(ModelError, match=r"Did you mean 'blocks\.2\.norm1'"):
        grad_cam(model, pictures(), classes, layer="block.2.norm1")
    with pytest.raises(ModelError, match="class token alone"):
        grad_cam(model, pictures(), classes, layer="norm")
    with pytest.raises(ModelError, match="cannot be laid over a picture of 64x64 px"):
        grad_cam(model, pictures(), classes, layer="head")
    with pytest.raises(ModelError, match="no layer with a map"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 2)), pictures(), classes)
    split = timm.create_model(
        "pit_ti_224", num_classes=5
    ).eval()  # patches and class token go apart, the head reads one
    with pytest.raises(ModelError, match="logits do not depend on the map"):
        grad_cam(split, pictures(224, 224)[:1], torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"2 numbers from 0 to 4, and got \[0\]"):
        grad_cam(model, pictures(), torch.tensor([0]))


def test_overlay_colours_a_grey_picture() -> None:
    picture = np.zeros((8, 12, 3), np.uint8)
    picture[:, 6:] = (255, 0, 0)
    heat = torch.zeros(8, 12)
    heat[:4] = 1
    shown = overlay(picture, heat)
    pixels = np.asarray(shown).astype(int)
    assert shown.size == (12, 8) and shown.mode == "RGB"
    assert pixels[0, 0].sum() > pixels[7, 0].sum() + 200  # heat is lighter
    added = pixels[0, 11] - pixels[0, 0]
    assert added.min() > 0 and np.ptp(added) <= 1  # the red of the picture has become grey
    assert np.array_equal(np.asarray(overlay(Image.fromarray(picture), heat)), pixels)
    assert overlay(Image.new("L", (24, 16)), heat).size == (24, 16)
    with pytest.raises(DataError, match=r"maps\[k\]"):
        overlay(picture, heat[None])


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.integers(2, 9))
def test_maps_fill_the_unit_range(values: list[float], side: int) -> None:
    heat = in_unit_range(torch.tensor(values).view(1, 2, 2), side, side)
    assert heat.min() == 0
    assert heat.max() == 1 or math.isclose(max(values), min(values), abs_tol=1e-5)
