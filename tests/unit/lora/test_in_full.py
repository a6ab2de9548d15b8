"""Several adapters that change one parameter in place: the sum of what each does at its scale, in any order."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.inject import attach
from visionlora.lora.merge import bake

ORIGINAL = torch.tensor([1.0, -2.0, 0.3])
SCALES = st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])


def norm(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(3))
    model[0].bias.data = ORIGINAL.to(dtype, copy=True)
    return model


def shift(by: float) -> Adapter:
    return Adapter({"model.0.bias": AdapterModule("shift", {"shift": torch.full((3,), by)}, 1.0)})


def value(to: float) -> Adapter:
    return Adapter({"model.0.bias": AdapterModule("full", {"value": torch.full((3,), to)}, 1.0)})


@given(
    kinds=st.lists(st.tuples(st.booleans(), st.sampled_from([0.25, 10.0, -3.0])), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(0, 3), SCALES), max_size=8),
    order=st.permutations(range(4)),
)
def test_each_adds_its_own_difference(kinds, steps, order) -> None:
    model = norm()
    handles = [attach(model, shift(x) if by_shift else value(x), name=f"a{i}") for i, (by_shift, x) in enumerate(kinds)]
    differences = [torch.full((3,), x) - (0 if by_shift else ORIGINAL) for by_shift, x in kinds]
    scales = [1.0] * len(handles)
    for which, scale in steps:
        if which < len(handles):
            handles[which].set_scale(scale)
            scales[which] = scale
        wanted = ORIGINAL + sum(s * d for s, d in zip(scales, differences, strict=True))
        torch.testing.assert_close(model[0].bias.data, wanted)
    left = dict(enumerate(handles))
    for which in (i for i in order if i in left):
        left.pop(which).eject()
        wanted = ORIGINAL + sum(scales[i] * differences[i] for i in left)
        torch.testing.assert_close(model[0].bias.data, wanted)
    assert torch.equal(model[0].bias, ORIGINAL) and "_changed" not in vars(model[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_alone_is_exact(dtype: torch.dtype) -> None:
    model = norm(dtype)
    handle = attach(model, value(0.3))
    wanted = torch.full((3,), 0.3).to(dtype)
    for scale in (0.7, 0.0, 1.0):
        handle.set_scale(scale)
    assert torch.equal(model[0].bias, wanted)
    handle.set_scale(0.0)
    assert torch.equal(model[0].bias, ORIGINAL.to(dtype))


def test_one_that_trains_goes_on_beside_others() -> None:
    model = norm()
    trained = vl.inject(model, vl.AdapterConfig(method="linear-probe", train="0"))
    other = attach(model, shift(10.0), name="other")
    model[0].bias.data += 1.0  # a step of the optimizer
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 11)
    other.set_scale(0.5)
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 6)
    model[0].bias.data += 1.0
    other.eject()
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 2)
    (found,) = (m for n, m in trained.modules("model").items() if n.endswith("bias"))
    torch.testing.assert_close(found.tensors["value"], ORIGINAL + 2)
    trained.eject()
    assert torch.equal(model[0].bias, ORIGINAL)


def test_one_that_is_baked_stays_when_the_others_go() -> None:
    model = norm()
    kept, other = attach(model, shift(1.0), name="kept"), attach(model, shift(10.0), name="other")
    bake([kept], [0.5])
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 10.5)
    other.set_scale(0.1)
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 1.5)
    other.eject()
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 0.5)


def test_a_mix_of_two() -> None:
    model = norm()
    mix = vl.attach(model, {"a": shift(1.0), "b": shift(10.0)}, scales={"a": 0.5, "b": 1.0})
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 10.5)
    mix.set_scales({"a": 0.0, "b": 1.0})
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 10)
    mix.detach()
    assert torch.equal(model[0].bias, ORIGINAL)


# ------------------------------------------------------------------------------------ beside others that are merged


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)


def beside(kind: str) -> tuple[Adapter, Adapter]:
    """One that changes a parameter in place, and one that is merged into it."""
    torch.manual_seed(2)
    if kind == "weight":
        lora = AdapterModule.lora(torch.randn(2, 4), torch.randn(3, 2), 2.0)
        full = AdapterModule("full", {"value": torch.randn(3, 4)}, 1.0)
        return Adapter({"model.0.weight": full}), Adapter({"model.0": lora})
    factors = AdapterModule("ia3", {"vector": torch.tensor([0.5, 2.0, -1.0])}, 1.0, {"on_input": False})
    return shift(3.0), Adapter({"model.0": factors})


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_beside_one_that_is_merged(kind: str, order: str) -> None:
    model, made, x = linear(), dict(zip("ab", beside(kind), strict=True)), torch.randn(2, 4)
    before = {n: p.clone() for n, p in model.named_parameters()}

    def found(a: float, b: float, mode: str) -> torch.Tensor:
        other = linear()
        vl.attach(other, {n: made[n] for n in order}, scales={"a": a, "b": b}, mode=mode)
        return other(x)

    with torch.no_grad():
        mix = vl.attach(model, {n: made[n] for n in order})
        for a, b in ((1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, -2.0), (1.0, 0.0), (1.0, 1.0)):
            mix.set_scales({"a": a, "b": b})
            assert mix.running == "merged"
            torch.testing.assert_close(model(x), found(a, b, "stacked"))
        mix.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_on_a_parameter_into_which_another_is_merged_already(kind: str) -> None:
    model, (changing, merged), x = linear(), beside(kind), torch.randn(2, 4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    first = attach(model, merged, name="merged")
    first.merge()
    alone = model(x)
    second = attach(model, changing, name="changing")
    both = model(x)
    first.unmerge()
    torch.testing.assert_close(model(x), both)
    first.merge()
    second.eject()
    assert torch.equal(model(x), alone)
    first.eject()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_baked_with_one_that_is_merged(kind: str) -> None:
    model, made, x = linear(), beside(kind), torch.randn(2, 4)
    handles = [attach(model, a, name=n) for n, a in zip("ab", made, strict=True)]
    with torch.no_grad():
        wanted = model(x)
        bake(handles)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_copies_come_off_by_themselves(again) -> None:
    model = norm()
    handle = attach(model, shift(1.0))
    twin, its = again((model, handle))
    its.set_scale(0.5)
    torch.testing.assert_close(twin[0].bias.data, ORIGINAL + 0.5)
    torch.testing.assert_close(model[0].bias.data, ORIGINAL + 1)
    its.eject()
    handle.eject()
    assert torch.equal(twin[0].bias, ORIGINAL) and torch.equal(model[0].bias, ORIGINAL)
    mix = vl.attach(model, {"a": shift(1.0)})
    twin = again(mix)
    twin.detach()
    assert torch.equal(twin.target[0].bias, ORIGINAL) and not torch.equal(model[0].bias, ORIGINAL)


def test_what_trains_is_not_lost_with_one_that_is_merged() -> None:
    """Both are in the parameter then, of which only the untouched original stays."""
    model, trains = linear(), vl.AdapterConfig(method="linear-probe", train="0")
    merged = attach(model, beside("weight")[1], name="merged")
    merged.merge()
    with pytest.raises(
        ConfigError, match=r"0.weight is to train in full, but adapters are merged into it, .*'stacked'"
    ):
        vl.inject(model, trains)
    merged.unmerge()
    trained = vl.inject(model, trains)
    with pytest.raises(
        ConfigError, match="The weight of '0' trains in full, and what it learns while adapter 'merged' is merged"
    ):
        merged.merge()
    model[0].weight.data += 1.0  # a step of the optimizer
    (found,) = (m for n, m in trained.modules("model").items() if n.endswith("weight"))
    assert not merged.merged and torch.equal(found.tensors["value"], model[0].weight)
    trained.eject()
    merged.merge()
