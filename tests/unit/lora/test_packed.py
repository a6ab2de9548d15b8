"""A frozen base in few bits: what a layer gives, what backward keeps, what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora import packed
from visionlora.lora.packed import Packed, owner_of, pack, packed_layers

CODES = ("int8", "nf4")


class Network(nn.Module):
    """Convolutions and linear layers, some of which get adapters; the first is an edge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 64, 3, padding=1)
        self.mid = nn.Conv2d(64, 64, 3, padding=1)
        self.to_q, self.other, self.small = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(torch.relu(self.conv_in(x)))
        return self.small(self.other(self.to_q(x.flatten(2).mT)))


def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)


def unpacked(model: nn.Module) -> nn.Module:
    """A plain network with the weights that the packed one unpacks."""
    plain = network()
    for name, layer in model.named_modules():
        if isinstance(layer, Packed):
            plain.get_submodule(name).weight.data.copy_(layer.weight)
    return plain


def adapted(model: nn.Module, **options: object) -> vl.Handle:
    handle = vl.inject(model, vl.AdapterConfig(rank=4, targets="to_q,mid", **options))
    for i, m in enumerate(handle.methods.values()):
        for p in m.parameters():
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    return handle


@pytest.mark.parametrize(("code", "most"), [("int8", 0.01), ("nf4", 0.12)])
def test_weights_stay_close_and_take_little(code: str, most: float) -> None:
    model, plain = network(), network()
    size = pack(model, code)
    assert [n for n, m in model.named_modules() if isinstance(m, Packed)] == ["mid", "to_q", "other"]
    numbers = 0
    for layer, before in ((model.mid, plain.mid), (model.to_q, plain.to_q), (model.other, plain.other)):
        numbers += before.weight.numel()
        assert layer.weight.shape == before.weight.shape
        assert (layer.weight - before.weight).norm() < most * before.weight.norm()
    assert sum(layer.numbers for layer in packed_layers(model)) == numbers
    assert size <= numbers * (1 if code == "int8" else 0.5) + numbers // 16


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("code", CODES)
def test_outputs_and_gradients_are_those_of_the_unpacked_weights(code: str, method: str) -> None:
    model = network()
    pack(model, code)
    plain = unpacked(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), plain(x))
    ours, theirs = adapted(model, method=method), adapted(plain, method=method)
    assert ours.report.base_parameters == theirs.report.base_parameters
    for m in (model, plain):
        m.train()
    given = [x.clone().requires_grad_() for _ in range(2)]
    outs = [m(g) for m, g in zip((model, plain), given, strict=True)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert torch.equal(given[0].grad, given[1].grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    ours.eject()
    assert torch.equal(model(x), unpacked(model)(x))


def test_backward_keeps_notes_instead_of_unpacked_weights() -> None:
    model = network()
    pack(model, "nf4")
    adapted(model)
    others = set(packed._OWNERS)  # of other tests, until garbage is collected
    out = model(torch.randn(1, 3, 8, 8, requires_grad=True))
    assert set(packed._OWNERS) <= others
    out.sum().backward()
    assert set(packed._OWNERS) <= others
    weight = model.to_q.weight
    assert owner_of(weight) is owner_of(weight.t()) is model.to_q
    del weight
    assert set(packed._OWNERS) <= others


def test_autocast_and_checkpointing_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model = network()
    pack(model, "int8", dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    handle, x = adapted(model), torch.randn(1, 3, 8, 8, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16):
            run(x).float().square().sum().backward()
        found.append([p.grad.clone() for p in handle.parameters()])
        for p in handle.parameters():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_are_independent() -> None:
    model = network()
    pack(model, "nf4")
    handle, x = adapted(model), torch.randn(1, 3, 8, 8)
    twin = copy.deepcopy(model)
    expected = model(x)
    handle.eject()
    assert torch.equal(twin(x), expected)


def test_what_cannot_be_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="'int4' is no way to pack weights; there are int8 and nf4"):
        pack(model, "int4")
    model.to_q.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="weight of to_q trains, so it cannot be packed"):
        pack(model, "nf4")
    model = network()
    pack(model, "nf4")
    with pytest.raises(ConfigError, match="Method 'full' trains every weight"):
        vl.inject(model, vl.AdapterConfig(method="full"))
    handle = adapted(model)
    with pytest.raises(ConfigError, match="packed in 4 bits, into which nothing can be merged exactly"):
        handle.merge()
    assert not handle.merged


def test_every_number_takes_the_nearest_code() -> None:
    weight = torch.randn(3, 5, 7)
    for code, values in (("int8", torch.arange(-127, 128) / 127), ("nf4", torch.tensor(packed.NORMAL_FLOAT))):
        found, flat = packed.packing(weight, code), weight.flatten()
        scales = found.scales.repeat_interleave(packed.BLOCK)[: len(flat)]
        nearest = (flat[:, None] - values * scales[:, None]).abs().min(dim=1).values
        torch.testing.assert_close((found.unpacked().flatten() - flat).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert not packed.packing(torch.zeros(70), "nf4").unpacked().any()
