"""What is loaded, composed or attached under `torch.inference_mode`, as services do, acts and comes off as elsewhere."""

from pathlib import Path

import pytest
import torch

import visionlora as vl
from visionlora.models.base import open_base

from .test_mix import KINDS, adapter, bits, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipe(tiny_model: Path):
    return open_base(str(tiny_model)).pipe


@pytest.mark.parametrize("compose", ["sum", "balanced", "orthogonal", "knots", "iso-c"])
def test_adapters_made_there_are_adapters(pipe, compose: str, tmp_path: Path) -> None:
    """torch refused them, in its own words."""
    kinds = KINDS if compose == "sum" else ("lora",)
    for name, seed in (("a", 0), ("b", 1)):
        vl.save_adapter(adapter(pipe, seed, kinds), tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    plain, before = run(pipe), bits(pipe)
    with vl.attach(pipe, files, compose=compose):
        wanted = run(pipe)
    with torch.inference_mode():
        mix = vl.attach(pipe, files, compose=compose)
        mix.set_scales({"a": 0.5})
        loaded = vl.load_adapter(files["a"])
    mix.set_scales({"a": 1.0})
    assert torch.equal(run(pipe), wanted) and not torch.equal(wanted, plain)
    mix.replace("a", loaded)
    assert torch.equal(run(pipe), wanted)
    mix.detach()
    assert all(torch.equal(p, before[n]) for n, p in bits(pipe).items())


@pytest.mark.parametrize("mode", ["merged", "stacked", "batched"])
def test_a_base_opened_there_takes_adapters_elsewhere(tiny_model: Path, mode: str) -> None:
    """Half of a mix was left in its weights."""
    with torch.inference_mode():
        pipe = open_base(str(tiny_model)).pipe
    plain, before, made = run(pipe), bits(pipe), adapter(pipe, 0)
    mix = vl.attach(pipe, {"a": made}, scales=0.3, mode=mode)
    mix.set_scales(1.0)
    found = run(pipe)
    mix.detach()
    assert all(torch.equal(p, before[n]) for n, p in bits(pipe).items())
    assert torch.equal(run(pipe), plain)
    with vl.attach(open_base(str(tiny_model)).pipe, {"a": made}, mode=mode) as other:
        torch.testing.assert_close(run(other.target), found)


def test_training_goes_on_from_what_was_loaded_there(pipe, tmp_path: Path) -> None:
    made = adapter(pipe, 0, ("lora",), text=False)
    vl.save_adapter(made, tmp_path / "a.safetensors")
    with torch.inference_mode():
        loaded = vl.load_adapter(tmp_path / "a.safetensors").component("unet")
    name = next(n for n in loaded if n.endswith("attn1.to_q"))
    handle = vl.inject(pipe.unet, vl.AdapterConfig(rank=2, targets=(name,)), start_from={name: loaded[name]})
    assert all(p.requires_grad for p in handle.parameters())
    assert torch.equal(handle.methods[name].lora_B, loaded[name].tensors["lora_B"])
