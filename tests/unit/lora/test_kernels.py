"""Heavy convolutions as products of matrices: the same outputs and gradients as torch's, but for rounding."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.lora import kernels, layers
from visionlora.lora.kernels import FEW, MORE, Geometry, by_matmul
from visionlora.lora.layers import HeavyByMatmul, heavy_by_matmul

CASES = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"padding": (2, 1), "dilation": (2, 1)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "without bias": {"padding": 0, "bias": False},
}


@pytest.fixture
def light_is_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HEAVY", 1)
    monkeypatch.setattr(layers, "HEAVY", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_torch(light_is_heavy, case: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, **CASES[case]), nn.Conv2d(6, 5, 3, padding=1))
    plain = plain.to(dtype).requires_grad_(False)
    heavy = copy.deepcopy(plain)
    assert heavy_by_matmul(heavy) == 2 and all(isinstance(layer, HeavyByMatmul) for layer in heavy)
    x = torch.randn(rows, 4, 6, 5, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(heavy(x), plain(x), rtol=tolerance, atol=tolerance)
    found = []
    for model in (plain, heavy):
        before = model(x)
        handle = vl.inject(model, vl.AdapterConfig(rank=2, targets="1"))
        assert torch.equal(model(x), before)
        for p in handle.parameters():
            p.data.normal_(generator=torch.Generator().manual_seed(1))
        given = x.clone().requires_grad_()
        model(given).float().square().sum().backward()
        found.append([given.grad, *(p.grad for p in handle.parameters())])
        handle.eject()
        assert torch.equal(model(x), before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_autocast_decides_the_dtype(light_is_heavy) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).requires_grad_(False)
    heavy, x = copy.deepcopy(plain), torch.randn(1, 4, 5, 5)
    heavy_by_matmul(heavy)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = heavy(x), plain(x)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        handle = vl.inject(heavy, vl.AdapterConfig(rank=2, targets="0"))
        assert heavy(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
    handle.eject()


def test_only_heavy_weights_over_few_positions_are_worth_it() -> None:
    heavy, light = torch.empty(1280, 500, 3, 3), torch.empty(320, 320, 3, 3)
    heavier = torch.empty(1280, 1280, 3, 3)
    one, grouped = (Geometry((1, 1), (1, 1), (1, 1), g) for g in (1, 2))
    assert by_matmul(heavy, FEW, one)
    assert not by_matmul(heavy, FEW + 1, one)
    assert not by_matmul(light, 1, one)
    assert by_matmul(heavier, MORE, one) and not by_matmul(heavier, MORE + 1, one)
    assert not by_matmul(heavier.bfloat16(), MORE, one) and by_matmul(heavier.bfloat16(), FEW, one)
    assert not by_matmul(heavy, 1, grouped)
    assert not by_matmul(torch.empty(4096, 4096, 1, 1), 1, one)
    assert heavy_by_matmul(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))) == 0
