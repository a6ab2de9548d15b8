"""What is put on a model, what may stay on it, and what must be put on anew."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing.holder import mix_on
from visionlora.models.base import open_base

from .test_mix import adapter


def lora(layer: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    return Adapter({f"model.{layer}": AdapterModule.lora(a, b, 1.0)})


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_what_stays_is_not_put_on_again(model: nn.Module) -> None:
    adapters = {name: lora("0", k) for k, name in enumerate("abc")}
    attached = vl.attach(model, {n: adapters[n] for n in "ab"}).attached
    (kept,) = attached.handles["b"]
    wanted = {"b": adapters["b"], "c": adapters["c"]}
    assert attached.exchange(wanted, wanted) == ["c"]
    assert list(attached.handles) == ["b", "c"] and attached.handles["b"] == [kept]
    assert attached.layers("c") == [("model", "0")] and len(attached.all_handles) == 2
    assert attached.exchange({}, {}) is None, "nothing stays"


def test_in_another_order_all_is_put_on_anew(model: nn.Module) -> None:
    """The last bits of a sum depend on the order."""
    adapters = {name: lora("0", k) for k, name in enumerate("ab")}
    attached = vl.attach(model, adapters).attached
    before = attached.all_handles
    assert attached.exchange({n: adapters[n] for n in "ba"}, adapters) is None
    assert attached.all_handles == before, "and nothing was done"


def test_what_was_on_a_model_does_not_keep_it() -> None:
    gc.disable()  # a GPU's memory is not given back by it in time
    try:
        target = nn.Sequential(nn.Linear(4, 4))
        seen = weakref.ref(target)
        mix = vl.attach(target, {"a": lora("0", 0)})
        mix.detach()
        del target, mix
        assert seen() is None
    finally:
        gc.enable()


def test_cleared_the_model_knows_nothing_of_it(model: nn.Module) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    attached = vl.attach(model, {"a": lora("0", 0)}).attached
    assert mix_on(model) is attached.mix and not torch.equal(model[0].weight, before["0.weight"])
    attached.clear()
    assert mix_on(model) is None and not attached.handles
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_part_that_was_exchanged_is_noticed(tiny_model: Path) -> None:
    """Scales were set on the model that was there before, and the pictures were those of the base."""
    pipe, other = (open_base(str(tiny_model)).pipe for _ in range(2))
    mix = vl.attach(pipe, {"a": adapter(pipe, 0)})
    plain, pipe.unet = pipe.unet, other.unet
    for change in (lambda: mix.set_scales(0.5), lambda: mix.remove("a"), lambda: mix.set_composition("balanced")):
        with pytest.raises(ConfigError, match=r"The unet of this .*Pipeline is no longer the one .*mix.detach\(\)"):
            change()
    pipe.unet = torch.compile(plain)
    mix.set_scales(0.5)
    pipe.text_encoder = None
    mix.set_scales(0.25)
    pipe.unet = other.unet
    mix.detach()
    assert mix_on(plain) is None
