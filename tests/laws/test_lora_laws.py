"""Laws of adapters, on every layer kind and dtype, with random geometry."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import inject

KINDS = ("linear", "conv1d", "conv2d", "dilated", "reflect", "strided", "grouped", "conv3d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3, torch.float64: 1e-12}
"""Some units in the last place of each dtype, for sums of a few dozen products of order one."""


def layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer and an input for it."""
    if kind == "linear":
        return nn.Linear(12, 8), torch.randn(2, 5, 12)
    if kind == "conv1d":
        return nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 9)
    if kind == "conv3d":
        return nn.Conv3d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5, 5)
    options = {
        "conv2d": {},
        "dilated": {"dilation": 2, "padding": 2},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "strided": {"stride": 2},
        "grouped": {"groups": 2},
    }[kind]
    return nn.Conv2d(6, 8, 3, **options), torch.randn(2, 6, 9, 9)


def adapted(
    kind: str, dtype: torch.dtype = torch.float32, trained: bool = True
) -> tuple[nn.Module, Handle, torch.Tensor]:
    """A model of one layer with an adapter on it, and an input."""
    torch.manual_seed(1)
    base, x = layer(kind)
    model = nn.Sequential(base).to(dtype)
    handle = inject(model, AdapterConfig(rank=3, alpha=2.0, targets="0"))
    if trained:
        for lora in handle.methods.values():
            lora.lora_B.data.normal_(std=0.5)
    return model, handle, x.to(dtype)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "adapters" not in name}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_injection_is_the_identity_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    base, x = layer(kind)
    base, x = base.to(dtype), x.to(dtype)
    expected = base(x)
    model, _, _ = adapted(kind, dtype, trained=False)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model, handle, x = adapted(kind, dtype)
    plain = copy.deepcopy(model)
    for m in (handle,):
        m.set_scale(0.0)
    inner = nn.Sequential(layer(kind)[0]).to(dtype)
    inner.load_state_dict(bits(plain))
    assert torch.equal(model(x), inner(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_eject_restores_every_bit_fifty_times(kind: str, dtype: torch.dtype) -> None:
    model, handle, _ = adapted(kind, dtype)
    before = bits(model)
    for _ in range(50):
        handle.merge()
        assert not torch.equal(bits(model)["0.weight"], before["0.weight"])
        handle.unmerge()
    handle.merge()
    handle.eject()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind: str, dtype: torch.dtype) -> None:
    model, handle, x = adapted(kind, dtype)
    apart = model(x)
    handle.merge()
    handle.merge()  # twice is once
    merged = model(x)
    tolerance = 2e-5 if dtype == torch.float64 else TOLERANCE[dtype]  # ΔW is computed in fp32
    torch.testing.assert_close(merged, apart, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_equals_base_plus_delta_in_fp64(kind: str) -> None:
    model, handle, x = adapted(kind, torch.float64)
    handle.methods["0"].double()
    lora = handle.methods["0"]
    product = lora.lora_B.detach().flatten(1) @ lora.lora_A.detach().flatten(1) * lora.scaling
    explicit = nn.Sequential(layer(kind)[0]).double()
    explicit.load_state_dict(bits(model))
    explicit[0].weight.data += product.reshape(explicit[0].weight.shape)
    torch.testing.assert_close(model(x), explicit(x), rtol=1e-12, atol=1e-12)


@given(st.permutations(["0", "1", "2"]))
def test_the_order_of_targets_does_not_matter(order: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    handle = inject(model, AdapterConfig(rank=2, targets=tuple(order)), seed=3)
    torch.manual_seed(0)
    reference = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    expected = inject(reference, AdapterConfig(rank=2, targets=("0", "1", "2")), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), expected.parameters(), strict=True))


@given(st.floats(-4, 4, allow_nan=False), st.floats(-4, 4, allow_nan=False))
def test_the_change_is_linear_in_the_scale(a: float, b: float) -> None:
    model, handle, x = adapted("linear", torch.float64)
    handle.set_scale(0.0)
    base = model(x)
    changes = []
    for scale in (a, b, a + b):
        handle.set_scale(scale)
        changes.append(model(x) - base)
    torch.testing.assert_close(changes[0] + changes[1], changes[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_never_move(kind: str) -> None:
    model, handle, x = adapted(kind)
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = handle.methods["0"].lora_B.detach().clone()
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(bits(model)[name], value) for name, value in before.items())
    assert not torch.equal(handle.methods["0"].lora_B, start)
