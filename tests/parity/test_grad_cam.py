"""The same Grad-CAM as the grad-cam package, on a base model and under an adapter, beside its weights and merged."""

import warnings

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.vision.explain import grad_cam

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

CLASSES = (3, 0, 4)


def patches(tokens: Tensor) -> Tensor:
    """(n, 1 + 16, c) -> (n, c, 4, 4)."""
    return tokens[:, 1:].mT.unflatten(2, (4, 4))


@pytest.mark.parametrize("state", ["base", "adapted", "merged"])
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "resnet18"])
def test_equal_to_the_package(architecture: str, state: str) -> None:
    torch.manual_seed(0)
    vit = architecture.startswith("vit")
    sizes = {"img_size": 64, "depth": 3} if vit else {}
    model = timm.create_model(architecture, num_classes=5, **sizes).eval()
    x = torch.randn(3, 3, 64, 64) if vit else torch.randn(3, 3, 128, 128)
    base = grad_cam(model, x, torch.tensor(CLASSES))
    if state != "base":
        handle = inject(model, AdapterConfig(rank=4, targets="all"))
        for m in handle.methods.values():
            m.lora_B.data.normal_(std=0.1)
        if state == "merged":
            handle.merge()
    ours = grad_cam(model, x, torch.tensor(CLASSES))
    layer = model.blocks[-1].norm1 if vit else model.layer4[-1]
    with theirs.GradCAM(model, [layer], reshape_transform=patches if vit else None) as cam:
        # Its hooks need gradients on the way, which nothing asks for in a frozen model but the picture.
        expected = cam(x.requires_grad_(), [targets.ClassifierOutputTarget(c) for c in CLASSES])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-4)
    assert ours.std() > 0.05
    assert (state == "base") == bool(torch.equal(ours, base))
