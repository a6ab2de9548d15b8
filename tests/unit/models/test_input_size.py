"""Backbones that read pictures of another size than their own."""

from pathlib import Path

import pytest
import timm
import torch

from visionlora.errors import ModelError
from visionlora.models.heads import as_logits
from visionlora.models.input_size import patch_of, set_input_size
from visionlora.models.vision import open_backbone


def test_a_timm_model_is_the_one_that_timm_makes_for_that_size(tiny_vit: Path) -> None:
    opened = open_backbone(str(tiny_vit), image_size=48)
    there = timm.create_model(f"local-dir:{tiny_vit}", pretrained=True, num_classes=0, img_size=48).eval()
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(as_logits(opened.model(x)), there(x), rtol=1e-5, atol=1e-5)
    assert (opened.image_size, opened.preprocessing.size, opened.preprocessing.crop_pct) == (48, 48, 0.9)
    assert opened.why.endswith("It reads 48 px instead of its own 32.")
    assert not any(p.requires_grad for p in opened.model.parameters())


def test_it_is_the_same_model_by_its_fingerprints(tiny_vit: Path) -> None:
    own = open_backbone(str(tiny_vit)).fingerprints()
    assert open_backbone(str(tiny_vit), image_size=48).fingerprints() == own
    assert open_backbone(str(tiny_vit), image_size=32).image_size is None, "its own size is no change"


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "torchvision/vit_b_16"])
def test_convolutions_and_torchvisions_vit_read_other_sizes(name: str) -> None:
    opened = open_backbone(name, "random", image_size=64)
    with torch.no_grad():
        assert as_logits(opened.model(torch.zeros(1, 3, 64, 64))).shape == (1, opened.features)
    assert opened.preprocessing.size == 64


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224"])
def test_swins_windows_stay_as_timm_makes_them(name: str) -> None:
    """Their position biases are not resampled, and an exported folder opens to the same model."""
    small = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model(name, **small).eval()
    for n, p in model.named_parameters():
        if "relative_position" in n:
            torch.nn.init.normal_(p)
    set_input_size(name, model, 256, 224)
    there = timm.create_model(name, img_size=256, **small).eval()
    there.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), there(x))


def test_each_patch_embedding_of_coat_reads_what_the_one_before_gives() -> None:
    small = {"embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1), "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("coat_lite_tiny", **small).eval()
    set_input_size("coat_lite_tiny", model, 64, 224)
    there = timm.create_model("coat_lite_tiny", img_size=64, **small).eval()
    there.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), there(x))
    with pytest.raises(ModelError, match="does not take pictures of 50 px"):
        set_input_size("coat_lite_tiny", model, 50, 64)


def test_patches_that_overlap_lose_no_pixels() -> None:
    assert patch_of(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))) is None


def test_what_loses_pixels_or_cannot_be_read_is_refused(tiny_vit: Path) -> None:
    with pytest.raises(ModelError, match=r"patches of 8 px, so image_size 50 would lose some: try 48 or 56\."):
        open_backbone(str(tiny_vit), image_size=50)
    with pytest.raises(ModelError, match=r"image_size 5 would lose some: try 8\."):
        open_backbone(str(tiny_vit), image_size=5)
    with pytest.raises(ModelError, match=r"cait_xxs24_224 does not take pictures of 192 px .*Its own size is 224 px"):
        open_backbone("cait_xxs24_224", "random", image_size=192)


@pytest.mark.parametrize("size", [64, 128])
def test_a_model_that_resizes_pictures_itself_is_refused(size: int) -> None:
    """The second branch of CrossViT reads 64 px of pictures of 96: a size that some module reads is not enough."""
    small = {"img_size": 96, "img_scale": (1.0, 2 / 3), "embed_dim": (12, 24), "num_heads": (1, 1), "num_classes": 0}
    model = timm.create_model("crossvit_9_240", **small).eval()
    with pytest.raises(
        ModelError, match=rf"crossvit does not take .* {size} px \(it makes pictures of every size 96 px"
    ):
        set_input_size("crossvit", model, size, 96)
    assert not any(m._forward_pre_hooks for m in model.modules())
