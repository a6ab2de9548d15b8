"""Models that are looked at while they learn."""

import timm
import torch

from visionlora.models.evaluation import evaluating


@torch.no_grad()
def test_an_evaluation_sees_the_biases_of_attention_as_they_are_now() -> None:
    """timm keeps them between evaluations."""
    model, x = timm.create_model("tiny_vit_5m_224", num_classes=2).eval(), torch.randn(1, 3, 224, 224)
    x_before = model(x)
    for name, p in model.named_parameters():
        if "attention_biases" in name:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with evaluating(model):
        found = model(x)
    assert not torch.allclose(found, x_before) and torch.equal(found, model.train().eval()(x))
