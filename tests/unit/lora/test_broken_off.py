"""Adapters that are put on, merged or taken off while something breaks off, or while others hold the layers."""

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora import inject, merge
from visionlora.lora.adapter import Adapter, AdapterModule


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)


@pytest.fixture
def lora() -> Adapter:
    torch.manual_seed(1)
    modules = {f"model.{k}": AdapterModule.lora(torch.randn(2, 4), torch.randn(4, 2), 2.0) for k in range(4)}
    return Adapter({**modules, "model.1.bias": AdapterModule("shift", {"shift": torch.ones(4)}, 1.0)})


def breaks_at(monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: int, error: type[BaseException]) -> None:
    """A function works until its `call`-th call, once."""
    real, count = getattr(where, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, counted)


def plain(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(type(m) is nn.Linear for m in model) and same(model, before)


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.named_parameters()}


PLACES = [(inject, "adapt", 3), (inject, "InFull", 1), (merge, "keep_original", 2), (merge, "stacked_update", 3)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("place", PLACES)
def test_a_mix_that_breaks_off_leaves_the_model(model, lora, monkeypatch, place, error) -> None:
    before = bits(model)
    with monkeypatch.context() as patch:
        breaks_at(patch, *place, error)
        with pytest.raises(error):
            vl.attach(model, {"a": lora})
    assert plain(model, before)
    mix = vl.attach(model, {"a": lora})
    there = bits(model)
    with monkeypatch.context() as patch:
        breaks_at(patch, *place, error)
        with pytest.raises(error):
            mix.add("b", lora, 0.5)
    assert mix.names == ["a"] and same(model, there)
    mix.detach()
    assert plain(model, before)


def test_training_that_breaks_off_before_it_begins(model, monkeypatch) -> None:
    model.requires_grad_(True)
    before = bits(model)
    with monkeypatch.context() as patch:
        breaks_at(patch, inject, "adapt", 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            vl.inject(model, vl.AdapterConfig(rank=1, targets="0,1,2", train="3"))
    assert plain(model, before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("place", PLACES[2:])
def test_a_handle_whose_merge_breaks_off_is_as_before(model, lora, monkeypatch, place) -> None:
    handle, x = vl.attach(model, lora), torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x)
        with monkeypatch.context() as patch:
            breaks_at(patch, *place, torch.OutOfMemoryError)
            with pytest.raises(torch.OutOfMemoryError):
                handle.merge()
        assert not handle.merged and torch.equal(model(x), wanted)
        handle.merge()
        merged = model(x)
        with monkeypatch.context() as patch:
            breaks_at(patch, *place, torch.OutOfMemoryError)
            with pytest.raises(torch.OutOfMemoryError):
                handle.set_scale(0.25)
        assert handle.merged and torch.equal(model(x), merged)


# ------------------------------------------------------------------------------------------------------ others' hands


@pytest.mark.parametrize("mode", ["merged", "stacked"])
def test_layers_that_are_offloaded_since_are_left_alone(model, lora, mode: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    before, x = bits(model), torch.randn(3, 4)
    mix = vl.attach(model, {"a": lora}, mode=mode)
    with torch.no_grad():
        wanted = model(x)
        accelerate.cpu_offload(model, torch.device("cpu"))
        if mode == "merged":
            torch.testing.assert_close(model(x), wanted)
        else:
            with pytest.raises(ConfigError, match="factors of adapter 'a' are not in memory"):
                model(x)
        for action in (lambda: mix.set_scales({"a": 0.5}), mix.detach, lambda: mix.add("b", lora)):
            with pytest.raises(ConfigError, match="has had a forward put on it since"):
                action()
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(x), wanted)
    mix.detach()
    assert plain(model, before)


class OneAttention(nn.Module):
    """A model of diffusers' attention that fuses its projections as diffusers' UNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(8, heads=2, dim_head=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn1(x)

    def fuse(self) -> None:
        self.attn1.fuse_projections(fuse=True)
        self.attn1.set_processor(FusedAttnProcessor2_0())

    def unfuse(self) -> None:
        """The flag stays, as with `unfuse_qkv_projections`."""
        self.attn1.set_processor(AttnProcessor2_0())


@pytest.fixture
def fusing() -> OneAttention:
    torch.manual_seed(0)
    return OneAttention().eval().requires_grad_(False)


@pytest.fixture
def on_q_and_v() -> Adapter:
    torch.manual_seed(1)
    return Adapter({f"model.attn1.to_{n}": AdapterModule.lora(torch.randn(2, 8), torch.randn(8, 2), 2.0) for n in "qv"})


def test_fused_projections_are_refused_until_they_are_apart(fusing: OneAttention, on_q_and_v: Adapter) -> None:
    before, x = bits(fusing), torch.randn(1, 3, 8)
    with torch.no_grad():
        plainly = fusing(x)
        fusing.fuse()
        for mode in ("merged", "stacked"):
            with pytest.raises(ConfigError, match=r"call unfuse_qkv_projections\(\) first"):
                vl.attach(fusing, {"a": on_q_and_v}, mode=mode)
        with pytest.raises(ConfigError, match=r"call unfuse_qkv_projections\(\) first"):
            vl.inject(fusing, vl.AdapterConfig(rank=1, targets="to_q"))
        fusing.unfuse()
        mix = vl.attach(fusing, {"a": on_q_and_v})
        wanted = fusing(x)
        assert not torch.allclose(wanted, plainly)
        fusing.fuse()
        torch.testing.assert_close(fusing(x), wanted)
        for action in (mix.detach, lambda: mix.set_scales({"a": 0.5})):
            with pytest.raises(ConfigError, match=r"call unfuse_qkv_projections\(\) first"):
                action()
        fusing.unfuse()
        assert torch.equal(fusing(x), wanted)
        mix.detach()
        assert torch.equal(fusing(x), plainly)
    assert all(torch.equal(p, before[n]) for n, p in fusing.named_parameters() if n in before)


def test_adapters_beside_the_weights_are_not_lost_in_fused_projections(
    fusing: OneAttention, on_q_and_v: Adapter
) -> None:
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        mix = vl.attach(fusing, {"a": on_q_and_v, "b": on_q_and_v}, mode="stacked")
        wanted = fusing(x)
        for model in (fusing, copy.deepcopy(fusing), pickle.loads(pickle.dumps(fusing))):
            with pytest.raises(ConfigError, match=r"'a' runs beside the weights of 'attn1.to_q'.*merge it first"):
                model.fuse()
            assert torch.equal(model(x), wanted)
        mix.remove("b")
        with pytest.raises(ConfigError, match="merge it first"):
            fusing.fuse()
        mix.detach()
        plainly = fusing(x)
        fusing.fuse()
        torch.testing.assert_close(fusing(x), plainly)
