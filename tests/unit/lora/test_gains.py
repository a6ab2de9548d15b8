"""Factors on the output and on the input of a layer, of one adapter and of several: every way to run gives the same."""

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.inject import attach

PAIRS = [
    ("dora-out", "dora-in"),
    ("ia3-out", "ia3-in"),
    ("dora-out", "ia3-in"),
    ("ia3-in", "lora"),
    ("dora-in", "dora-in"),
]


def layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Sequential(nn.Linear(6, 8)).requires_grad_(False), torch.randn(2, 3, 6)
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1)).requires_grad_(False), torch.randn(2, 6, 5, 5)


def module(kind: str, weight: torch.Tensor, seed: int) -> AdapterModule:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    o, i, *k = weight.shape
    lora = {"lora_A": random(2, i, *k), "lora_B": random(o, 2, *(1 for _ in k))}
    if kind == "lora":
        return AdapterModule("lora", lora, 2.0)
    if kind.startswith("dora"):
        rows = weight.flatten(1) if kind == "dora-out" else weight.transpose(0, 1).flatten(1)
        norms = rows.norm(dim=1)
        options = {} if kind == "dora-out" else {"axis": "in"}
        return AdapterModule("dora", {**lora, "magnitude": norms * (1 + random(len(norms)))}, 2.0, options)
    on_input = kind == "ia3-in"
    return AdapterModule("ia3", {"vector": 1 + random(i if on_input else o)}, 1.0, {"on_input": on_input})


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_adapters_add_up_in_every_mode(pair: tuple[str, str], shape: str) -> None:
    model, x = layer(shape)
    made = {
        n: Adapter({"model.0": module(kind, model[0].weight, k)})
        for k, (n, kind) in enumerate(zip("ab", pair, strict=True))
    }
    with torch.no_grad():
        mix = vl.attach(model, made)
        assert mix.running == "merged"
        wanted = model(x)
        mix.detach()
        for mode in ("stacked", "batched"):
            mix = vl.attach(model, made, mode=mode)
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
            mix.detach()
    for name, adapter in made.items():
        attach(model, adapter, name=name)
    torch.testing.assert_close(model(x.requires_grad_()), wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x.detach()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("merged", ["a", "b"])
def test_one_that_is_merged_is_not_multiplied_by_another(pair: tuple[str, str], shape: str, merged: str) -> None:
    model, x = layer(shape)
    handles = {
        n: attach(model, Adapter({"model.0": module(kind, model[0].weight, k)}), name=n)
        for k, (n, kind) in enumerate(zip("ab", pair, strict=True))
    }
    with torch.no_grad():
        wanted = model(x)
        handles[merged].merge()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.clone().requires_grad_()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora-in", "ia3-in", "dora-out"])
@pytest.mark.parametrize("own", [False, True])
def test_in_torchs_attention_with_gradients_as_without(kind: str, own: bool) -> None:
    """With one packed weight, and with one for each of q, k and v."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=6 if own else None)})
    model.eval().requires_grad_(False)
    attention = model["attn"]
    weight = attention.q_proj_weight if own else attention.in_proj_weight[:8]
    attach(model, Adapter({"model.attn.q": module(kind, weight, 3)}))
    x = torch.randn(2, 3, 8)
    value = torch.randn(2, 3, 6) if own else x
    with torch.no_grad():
        without, _ = attention(x, x, value, need_weights=False)
    other = x.clone().requires_grad_()
    found, _ = attention(other, x if own else other, value if own else other, need_weights=False)
    torch.testing.assert_close(found, without, rtol=1e-4, atol=1e-5)
    merged = attach(model, Adapter({"model.attn.q": module("lora", weight, 4)}), name="merged")
    with torch.no_grad():
        without, _ = attention(x, x, value, need_weights=False)
        merged.merge()
    found, _ = attention(other, x if own else other, value if own else other, need_weights=False)
    torch.testing.assert_close(found, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora-in", "ia3-in"])
def test_a_part_of_a_fused_layer_is_as_the_layer_by_itself(kind: str) -> None:
    """What scales the input of q is nothing to k and v, though these read the same."""
    torch.manual_seed(0)
    fused = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(6, 12)})}).requires_grad_(False)
    whole = fused["attn"]["qkv"]
    apart = nn.ModuleDict({part: nn.Linear(6, 4) for part in "qkv"}).requires_grad_(False)
    for part, rows, bias in zip(apart.values(), whole.weight.chunk(3), whole.bias.chunk(3), strict=True):
        part.weight.copy_(rows)
        part.bias.copy_(bias)
    own = {"q": module(kind, apart["q"].weight, 3), "v": module(kind, apart["v"].weight, 4)}
    names = {"fused": "model.attn.qkv.", "apart": "model."}
    on = {where: Adapter({start + part: m for part, m in own.items()}) for where, start in names.items()}
    x = torch.randn(2, 3, 6)
    with torch.no_grad(), vl.attach(apart, {"a": on["apart"]}):
        wanted = torch.cat([part(x) for part in apart.values()], dim=-1)
    with torch.no_grad():
        for mode in ("merged", "stacked", "batched"):
            with vl.attach(fused, {"a": on["fused"]}, mode=mode):
                torch.testing.assert_close(whole(x), wanted, rtol=1e-4, atol=1e-5, msg=mode)
    attach(fused, on["fused"])
    torch.testing.assert_close(whole(x.clone().requires_grad_()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(whole, backend="eager")(x), wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_lie_anywhere_in_memory_are_merged_to_the_same_bits_each_time() -> None:
    """Weights mapped from a file lie where products round otherwise than from their copies: 0.5, 1 and 0.5 again differed."""
    torch.manual_seed(0)
    base = nn.Linear(96, 64).requires_grad_(False)
    buffer = torch.empty(64 * 96 + 16)
    start = next(k for k in range(16) if (buffer.data_ptr() + 4 * k) % 64 == 56)
    base.weight.data = buffer[start : start + 64 * 96].view(64, 96).copy_(base.weight.data)
    model = nn.Sequential(base)
    for seed in range(20):
        with vl.attach(model, {"a": Adapter({"model.0": module("dora-out", base.weight, seed)})}, scales=0.5) as mix:
            first = base.weight.clone()
            mix.set_scales(1.0)
            mix.set_scales(0.5)
            assert torch.equal(base.weight, first)


def test_originals_are_not_kept_when_a_merge_is_refused() -> None:
    model, x = layer("linear")
    before, wrong = model(x), module("dora-out", model[0].weight, 0)
    wrong.tensors["magnitude"][0] = float("inf")
    handle = attach(model, Adapter({"model.0": wrong}))
    with pytest.raises(vl.VisionLoRAError, match="gives NaN or infinite weights in '0'"):
        handle.merge()
    assert not model[0].originals
    handle.eject()
    assert torch.equal(model(x), before)
