"""The laws that every adapter method obeys, on every layer kind."""

import copy

import pytest
import torch
from torch import nn

from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import attach, inject

METHODS = ("lora", "rslora", "lora+", "lora-fa", "dora", "adalora", "vera", "ia3", "pissa", "orthogonal")
KINDS = ("linear", "conv2d", "reflect", "grouped", "fused", "attention")
ROUNDING = {torch.float32: 3e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""A few units in the last place of sums of a few dozen products of order one."""


class Fused(nn.Module):
    """Two fused projections and an MLP, in timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.qkv(x).chunk(3, dim=-1)
        x = x + self.attn.proj(torch.softmax(q @ k.mT, -1) @ v)
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(x)))


class Attention(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.self_attention(x, x, x, need_weights=False)
        return out


def built(kind: str) -> tuple[nn.Module, str, torch.Tensor]:
    """A model, what to target, and an input."""
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Linear(12, 8)), "0", torch.randn(2, 5, 12)
    if kind == "fused":
        return Fused(), "attn.qv,mlp", torch.randn(2, 5, 12)
    if kind == "attention":
        return Attention(), "attn", torch.randn(2, 5, 12)
    options = {"conv2d": {"padding": 1}, "reflect": {"padding": 1, "padding_mode": "reflect", "dilation": 1},
               "grouped": {"groups": 2, "stride": 2}}[kind]  # fmt: skip
    return nn.Sequential(nn.Conv2d(6, 8, 3, **options)), "0", torch.randn(2, 6, 9, 9)


def config(method: str, targets: str) -> AdapterConfig:
    if method in ("pissa", "orthogonal"):
        return AdapterConfig(rank=2, alpha=3.0, targets=targets, init=method)
    return AdapterConfig(method=method, rank=2, alpha=3.0, targets=targets)


def shaken(handle: Handle) -> Handle:
    """As after some training."""
    generator = torch.Generator().manual_seed(9)
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3
    return handle


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "adapters" not in n}


CASES = [(m, k) for m in METHODS for k in KINDS]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_injection_and_scale_zero_are_the_base_bit_for_bit(method: str, kind: str, dtype: torch.dtype) -> None:
    model, targets, x = built(kind)
    # Frozen first: torch itself rounds a product of strided inputs otherwise when the weight requires a gradient.
    model, x = model.to(dtype).requires_grad_(False), x.to(dtype)
    with torch.no_grad():
        expected = model(x)
    learning = model(x)
    handle = inject(model, config(method, targets))
    assert torch.equal(model(x), learning)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    shaken(handle)
    assert not torch.equal(model(x), learning)
    handle.set_scale(0.0)
    assert torch.equal(model(x), learning)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_training_stacked_and_merged_agree_and_eject_restores(method: str, kind: str, dtype: torch.dtype) -> None:
    model, targets, x = built(kind)
    model, x = model.to(dtype), x.to(dtype)
    before = base_of(model)
    handle = shaken(inject(model, config(method, targets)))
    handle.set_scale(0.7)
    learning = model(x)
    with torch.no_grad():
        stacked = model(x)
        for _ in range(3):
            handle.merge()
            merged = model(x)
            handle.unmerge()
        handle.merge()
    scale = ROUNDING[dtype] * learning.abs().max().clamp(min=1)
    assert (stacked - learning).abs().max() <= scale
    assert (merged - learning).abs().max() <= 2 * scale
    handle.eject()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not [m for m in model.modules() if "Adapted" in type(m).__name__ or "Lean" in type(m).__name__]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_gradients_are_those_of_the_explicit_weight(method: str, kind: str, tmp_path) -> None:
    """The kernels against autograd through the dense W + ΔW, in fp64."""
    model, targets, x = built(kind)
    model, x = model.double(), x.double().requires_grad_()
    handle = shaken(inject(model, config(method, targets)))
    for m in handle.methods.values():
        m.double()
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if hasattr(layer, "plain"):
            layer.wants_graph = lambda *_: False
            layer.stacked = layer.plain
    if kind == "attention":
        if method not in NOT_THE_DERIVATIVE:
            check_attention(model, handle, x)
        return
    ours = torch.autograd.grad(model(x).square().sum(), [x, *handle.parameters()])
    parameters = [p for n, p in plain.named_parameters() if p.requires_grad]
    theirs = torch.autograd.grad(plain(x).square().sum(), [x, *parameters])
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


NOT_THE_DERIVATIVE = ("lora-fa", "dora")
"""LoRA-FA corrects the gradient of B and DoRA takes its norms as constants: see tests/parity."""


def check_attention(model: nn.Module, handle: Handle, x: torch.Tensor) -> None:
    """Finite differences, as torch's attention reads its weights."""
    out = model(x)
    grads = torch.autograd.grad(out.square().sum(), handle.parameters())
    p, g = handle.parameters()[0], grads[0]
    with torch.no_grad():
        values = []
        for step in (1e-6, -2e-6):
            p.view(-1)[0] += step
            values.append(model(x).square().sum())
        p.view(-1)[0] += 1e-6
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, g.view(-1)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_saved_and_loaded_it_is_the_same_bits(method: str, kind: str, tmp_path) -> None:
    model, targets, x = built(kind)
    fresh = copy.deepcopy(model)
    handle = shaken(inject(model, config(method, targets)))
    handle.save(tmp_path / "a.safetensors")
    adapter = native.read(tmp_path / "a.safetensors")
    exported: Adapter = handle.adapter()
    assert all(torch.equal(t, exported.modules[n].tensors[k])
               for n, m in adapter.modules.items() for k, t in m.tensors.items())  # fmt: skip
    loaded = attach(fresh, adapter)
    assert loaded.methods.keys() == handle.methods.keys()
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-5)
        deltas = adapter.delta_weights(built(kind)[0])
        for name, m in handle.methods.items():
            torch.testing.assert_close(deltas[f"model.{name}"], m.delta_weight(m.site.weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_only_what_trains_moves(method: str, kind: str) -> None:
    model, targets, x = built(kind)
    before = base_of(model)
    handle = inject(model, config(method, targets))
    start = [p.detach().clone() for p in handle.parameters()]
    optimizer = torch.optim.AdamW(handle.parameter_groups(0.05))
    for step in range(1, 5):
        loss = (model(x) - 1).square().mean()
        if (extra := handle.regularisation()) is not None:
            loss = loss + extra
        loss.backward()
        optimizer.step()
        handle.after_step(step, 4)
        optimizer.zero_grad()
    assert all(torch.equal(base_of(model)[n], t) for n, t in before.items())
    assert all(not torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True))
