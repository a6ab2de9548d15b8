"""The same parameters in PEFT and here: the same output and the same gradients in fp64, for every method PEFT has."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import inject
from visionlora.lora.methods.adalora import allocate, budget_at

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import loralib
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (3, 6, 9, 9)),
}
Case = tuple[AdapterConfig, Any, Callable[[Any, Handle], list[tuple[Any, Any]]]]


def pair(layer: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    ours, theirs = nn.Sequential(make()).double(), nn.Sequential(make()).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(shape, dtype=torch.float64)


def lora_pairs(layer: Any, m: Any) -> list[tuple[Any, Any]]:
    return [(m.lora_A, layer.lora_A["default"].weight), (m.lora_B, layer.lora_B["default"].weight)]


def dora_pairs(layer: Any, m: Any) -> list[tuple[Any, Any]]:
    return [*lora_pairs(layer, m), (m.magnitude, layer.lora_magnitude_vector["default"].weight)]


def adalora_pairs(layer: Any, m: Any) -> list[tuple[Any, Any]]:
    return [(m.lora_A, layer.lora_A["default"]), (m.lora_B, layer.lora_B["default"]),
            (m.lora_E, layer.lora_E["default"])]  # fmt: skip


def ia3_pairs(layer: Any, m: Any) -> list[tuple[Any, Any]]:
    return [(m.factor_vector, layer.ia3_l["default"])]


CASES: dict[str, tuple[str, AdapterConfig, Any, Any]] = {
    "rslora": ("linear", AdapterConfig(method="rslora", rank=4, alpha=6.0, targets="0"),
               lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["0"]), lora_pairs),
    "rslora conv": ("conv2d", AdapterConfig(method="rslora", rank=4, alpha=6.0, targets="0"),
                    lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["0"]), lora_pairs),
    "dora": ("linear", AdapterConfig(method="dora", rank=4, alpha=6.0, targets="0"),
             lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"]), dora_pairs),
    "dora conv": ("conv2d", AdapterConfig(method="dora", rank=4, alpha=6.0, targets="0"),
                  lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"]), dora_pairs),
    "adalora": ("linear", AdapterConfig(method="adalora", rank=4, initial_rank_factor=1.0, alpha=6.0, targets="0"),
                lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["0"]),
                adalora_pairs),
    "ia3": ("linear", AdapterConfig(method="ia3", targets="0"),
            lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]), ia3_pairs),
    "ia3 conv": ("conv2d", AdapterConfig(method="ia3", targets="0"),
                 lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]), ia3_pairs),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str) -> None:
    layer, config, their_config, pairs = CASES[name]
    ours, theirs, x = pair(layer)
    handle = inject(ours, config)
    wrapped = peft.get_peft_model(theirs, their_config()).double()
    inner, m = wrapped.base_model.model[0], handle.methods["0"].double()
    generator = torch.Generator().manual_seed(1)
    matched = pairs(inner, m)
    for p, q in matched:
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        q.data.copy_(p.data.view(q.shape) if p.dim() != 4 or q.dim() == 4 else p.data.flatten(1).view(q.shape))
    results = []
    for model in (ours, wrapped):
        given = x.clone().requires_grad_()
        out = model(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad))
    # PEFT divides AdaLoRA by rank + 1e-5 and keeps (IA)³ in the dtype it was made in.
    tolerance = 1e-4 if name == "adalora" else 1e-9
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for p, q in matched:
        torch.testing.assert_close(p.grad, q.grad.view(p.shape), rtol=tolerance, atol=tolerance * p.grad.abs().max())


def test_ia3_on_the_input_of_an_mlp() -> None:
    torch.manual_seed(0)

    def mlp() -> nn.Module:
        model = nn.Module()
        model.mlp = nn.Module()
        model.mlp.fc2 = nn.Linear(6, 8)
        model.forward = lambda x: model.mlp.fc2(x)
        return model.double()

    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    handle = inject(ours, AdapterConfig(method="ia3", targets="mlp.out"))
    layer = peft.inject_adapter_in_model(
        peft.IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"]), theirs
    ).double().mlp.fc2  # fmt: skip
    vector = handle.methods["mlp.fc2"].double().factor_vector
    vector.data += torch.randn(6, dtype=torch.float64)
    layer.ia3_l["default"].data.copy_(vector.data.view(1, 6))
    torch.testing.assert_close(ours.mlp.fc2(x), layer(x), rtol=1e-12, atol=1e-12)


def test_vera_with_the_same_projections() -> None:
    ours, theirs, x = pair("linear")
    handle = inject(ours, AdapterConfig(method="vera", rank=4, targets="0"))
    wrapped = peft.get_peft_model(theirs, peft.VeraConfig(r=4, target_modules=["0"])).double()
    inner, m = wrapped.base_model.model[0], handle.methods["0"].double()
    m.lambda_b.data.normal_()
    inner.vera_A["default"].data.copy_(m.shared_A)
    inner.vera_B["default"].data.copy_(m.shared_B)
    inner.vera_lambda_b["default"].data.copy_(m.lambda_b)
    inner.vera_lambda_d["default"].data.copy_(m.lambda_d)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for model, g in zip((ours, wrapped), given, strict=True):
        model(g).square().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-10, atol=1e-10)
    for p, q in ((m.lambda_b, inner.vera_lambda_b["default"]), (m.lambda_d, inner.vera_lambda_d["default"])):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_lora_fa_corrects_the_gradient_of_b() -> None:
    """(A·Aᵀ)⁻¹/s² times the gradient that plain LoRA has (arXiv 2308.03303)."""
    ours, theirs, x = pair("conv2d")
    a = inject(ours, AdapterConfig(method="lora-fa", rank=3, alpha=6.0, targets="0")).methods["0"]
    b = inject(theirs, AdapterConfig(rank=3, alpha=6.0, targets="0")).methods["0"]
    for model in (ours, theirs):
        model(x).square().sum().backward()
    down = b.lora_A.detach().flatten(1).double()
    expected = b.lora_B.grad.flatten(1).double() @ torch.linalg.inv(down @ down.T) / b.scaling**2
    assert a.lora_A.grad is None
    torch.testing.assert_close(a.lora_B.grad.flatten(1).double(), expected, rtol=1e-4, atol=1e-4)


def test_q_and_v_of_a_fused_layer_equal_loralib() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Module()
            self.attn.qkv = nn.Linear(6, 24)

    block = Block().double()
    theirs = loralib.MergedLinear(
        6, 24, r=2, lora_alpha=6, enable_lora=[True, False, True], merge_weights=False
    ).double()
    theirs.weight.data.copy_(block.attn.qkv.weight)
    theirs.bias.data.copy_(block.attn.qkv.bias)
    handle = inject(block, AdapterConfig(rank=2, alpha=6.0, targets="attn.qv"))
    for k, part in enumerate("qv"):
        m = handle.methods[f"attn.qkv.{part}"].double()
        m.lora_B.data.normal_()
        theirs.lora_A.data[2 * k : 2 * k + 2] = m.lora_A.data
        theirs.lora_B.data[8 * k : 8 * k + 8] = m.lora_B.data
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(block.attn.qkv(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_adalora_prunes_as_peft_does() -> None:
    """Budget and pruned triplets over a whole training, with the same gradients."""
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).double()  # noqa: E731
    ours, theirs = net(), net()
    theirs.load_state_dict(ours.state_dict())
    steps, start, target = 30, 4, 2
    handle = inject(ours, AdapterConfig(method="adalora", rank=start, initial_rank_factor=1.0, targets=("0", "1")))
    config = peft.AdaLoraConfig(init_r=start, target_r=target, tinit=3, tfinal=10, deltaT=10, lora_alpha=4,
                                total_step=steps, target_modules=["0", "1"], orth_reg_weight=0.5)  # fmt: skip
    wrapped = peft.get_peft_model(theirs, config).double()
    methods = [m.double() for m in handle.methods.values()]
    inner = [wrapped.base_model.model[k] for k in range(2)]
    for m, layer in zip(methods, inner, strict=True):
        for p, q in adalora_pairs(layer, m):
            q.data.copy_(p.data.view(q.shape))
    ours_opt = torch.optim.SGD(handle.parameters(), lr=0.5)
    their_opt = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64)
    for step in range(1, steps + 1):
        for model, opt in ((ours, ours_opt), (wrapped.base_model.model, their_opt)):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
        ours_opt.step()
        their_opt.step()
        budget = allocate(methods, step, steps, target * 2)
        wrapped.base_model.rankallocator.update_ipt(wrapped.base_model.model) if step <= steps - 10 else None
        wanted, prune = wrapped.base_model.rankallocator.budget_schedule(step)
        if prune and wanted < 2 * start:
            wrapped.base_model.rankallocator.mask_to_budget(wrapped.base_model.model, wanted)
        assert budget == wanted == budget_at(step, steps, 2 * start, 2 * target, 3, 10)
        for m, layer in zip(methods, inner, strict=True):
            assert torch.equal(m.lora_E == 0, layer.lora_E["default"].flatten() == 0), step
    assert sum(int((m.lora_E != 0).sum()) for m in methods) == 2 * target
    assert sum(m.export().rank for m in methods) == 2 * target


def test_our_conv_is_right_where_pefts_is_not() -> None:
    """The oracle is the explicit W + ΔW: PEFT drops the padding mode and the dilation of the down path."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect").double()
    model, x = nn.Sequential(conv), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    handle = inject(model, AdapterConfig(rank=2, targets="0"))
    m = handle.methods["0"].double()
    m.lora_B.data.normal_()
    explicit = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect").double()
    explicit.load_state_dict({"weight": conv.weight + (m.lora_B.flatten(1) @ m.lora_A.flatten(1)).view(6, 4, 3, 3),
                              "bias": conv.bias})  # fmt: skip
    torch.testing.assert_close(model(x), explicit(x), rtol=1e-12, atol=1e-12)
