"""A ViT's last block computes the class token alone: same logits, same gradients, and nobody who looks misses a token."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from torch import Tensor, nn

from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models import class_token
from visionlora.models.class_token import LastBlock, ReadsClassToken, shorten, whole
from visionlora.vision.explain import attention_rollout, grad_cam

PICTURES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
TOKENS = 17


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5, **more}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval().requires_grad_(False)


def shortened(**more: object) -> nn.Module:
    model = vit(**more)
    assert shorten(model, PICTURES[:1])
    return model


def tokens_of_the_mlp(model: nn.Module, run: object) -> int:
    """How many tokens the last MLP computed, seen without a hook."""
    seen = []
    act = model.blocks[-1].mlp.act
    act.__class__ = type("Seen", (nn.GELU,), {"forward": lambda _, x: seen.append(x.shape[1]) or nn.functional.gelu(x)})
    try:
        run()
    finally:
        act.__class__ = nn.GELU
    return seen[-1]


KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "scaled": {"init_values": 0.5, "qk_norm": True},
    "pre-norm": {"pre_norm": True, "final_norm": True},
    "attention norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no class embedding of place": {"no_embed_class": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_whole_block(kind: str) -> None:
    model = shortened(**KINDS[kind])
    handle = inject(model, AdapterConfig(rank=3, targets="attn,mlp"))
    for m in handle.methods.values():
        m.lora_B.data.normal_(std=0.1)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        logits = model(PICTURES)
        return logits.detach(), list(torch.autograd.grad(logits.square().sum(), list(handle.parameters())))

    logits, found = gradients()
    with whole():
        expected_logits, expected = gradients()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(g.abs().max() > 0 for g in found)
    assert tokens_of_the_mlp(model, lambda: model(PICTURES)) == 1


def test_whoever_asks_for_all_tokens_gets_them() -> None:
    model, plain = shortened(), vit()
    assert torch.equal(model.forward_features(PICTURES), plain.forward_features(PICTURES))
    assert tokens_of_the_mlp(model, lambda: model.forward_features(PICTURES)) == TOKENS
    seen: list[Tensor] = []
    for module in (model.blocks[-1], model.blocks[-1].attn, model.norm, model.blocks):
        hook = module.register_forward_hook(lambda _, __, out: seen.append(out))
        assert torch.equal(model(PICTURES), plain(PICTURES)) and seen.pop().shape[1] == TOKENS
        hook.remove()
    assert tokens_of_the_mlp(model, lambda: model(PICTURES, is_causal=True)) == TOKENS
    model.set_grad_checkpointing()
    x = PICTURES.clone().requires_grad_()
    assert tokens_of_the_mlp(model, lambda: model(x).sum().backward()) == TOKENS
    model.set_grad_checkpointing(False)
    assert tokens_of_the_mlp(model, lambda: torch.export.export(model, (PICTURES,))) == TOKENS
    model.blocks[-1].attn.fused_attn = False
    assert tokens_of_the_mlp(model, lambda: model(PICTURES)) == TOKENS


def test_a_patched_layer_is_run_as_it_was_patched() -> None:
    model = shortened()
    attn = model.blocks[-1].attn
    attn.forward = lambda x, **_: torch.zeros_like(x)
    expected = vit()
    expected.blocks[-1].attn.forward = lambda x, **_: torch.zeros_like(x)
    assert torch.equal(model(PICTURES), expected(PICTURES))


def test_a_failed_pass_and_another_thread_leave_nothing_behind() -> None:
    model = shortened()
    with pytest.raises(AssertionError, match="height"):
        model(torch.zeros(1, 3, 16, 16))
    assert class_token.ASKED.block is None
    shapes: list[int] = []

    def meanwhile(_: nn.Module, __: object) -> None:  # runs inside of the pass, on the first block
        other = threading.Thread(target=lambda: shapes.append(model.blocks[-1](torch.zeros(1, TOKENS, 24)).shape[1]))
        other.start()
        other.join()

    model.blocks[0].register_forward_pre_hook(meanwhile)
    model(PICTURES)
    assert shapes == [TOKENS]


@pytest.mark.parametrize(
    "more",
    [{"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "map"}],
    ids=["average", "no class token", "attention"],
)
def test_models_that_read_other_tokens_are_left_alone(more: dict[str, object]) -> None:
    model = vit(**more)
    kinds = [type(m) for m in model.modules()]
    assert not shorten(model, PICTURES[:1])
    assert [type(m) for m in model.modules()] == kinds


def test_a_model_that_would_give_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    kinds = [type(m) for m in model.modules()]
    right = class_token.attended
    monkeypatch.setattr(class_token, "attended", lambda attn, x: right(attn, x) * 1.01)
    assert not shorten(model, PICTURES[:1])
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_copies_are_shortened_too(again: object) -> None:
    model = again(shortened())
    assert isinstance(model, ReadsClassToken) and isinstance(model.blocks[-1], LastBlock)
    assert isinstance(model, timm.models.VisionTransformer)
    assert tokens_of_the_mlp(model, lambda: model(PICTURES)) == 1
    assert list(model.state_dict()) == list(vit().state_dict())


def test_maps_of_what_it_looks_at_are_those_of_the_whole_model() -> None:
    model, plain = shortened(), vit()
    assert torch.equal(attention_rollout(model, PICTURES), attention_rollout(plain, PICTURES))
    classes = torch.tensor([0, 1, 2])
    assert torch.equal(grad_cam(model, PICTURES, classes), grad_cam(plain, PICTURES, classes))
    at = "blocks.0"
    torch.testing.assert_close(
        grad_cam(model, PICTURES, classes, at), grad_cam(plain, PICTURES, classes, at), rtol=1e-3, atol=1e-4
    )


def test_a_model_whose_head_is_changed_later_reads_all_tokens() -> None:
    model, plain = shortened(), vit()
    for m in (model, plain):
        m.reset_classifier(0, "avg")
    torch.testing.assert_close(model(PICTURES), plain(PICTURES), rtol=0, atol=0)


def test_torchvision_traces_it() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    found = create_feature_extractor(shortened(), {"blocks.2": "last"})(PICTURES)["last"]
    assert found.shape == (3, TOKENS, 24)
