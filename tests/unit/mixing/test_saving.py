"""What is saved while adapters are on: the base bit for bit, in every mode, with a warning."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import open_base

from .test_mix import adapter

SAID = "the base without them"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[n], t) for n, t in wanted.items())


@pytest.mark.parametrize("mode", ["merged", "stacked", "batched"])
def test_a_pipeline_saves_its_base(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    pipe = open_base(str(tiny_model)).pipe
    before = state(pipe.unet)
    mix = vl.attach(pipe, {"a": adapter(pipe, 0), "b": adapter(pipe, 1)}, mode=mode)
    with pytest.warns(UserWarning, match=SAID):
        pipe.unet.save_pretrained(tmp_path)
    assert {n: t.shape for n, t in load_file(next(tmp_path.glob("*.safetensors"))).items()} == {
        n: t.shape for n, t in before.items()
    }
    with pytest.warns(UserWarning, match=SAID):
        assert same(state(pipe.unet), before)
    mix.detach()
    assert same(state(pipe.unet), before)


@pytest.mark.parametrize("mode", ["merged", "stacked"])
def test_what_is_changed_in_full_too_and_models_around_it(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    around = nn.ModuleDict({"inner": model})
    before = state(around)
    lora = AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    norm = AdapterModule("shift", {"shift": torch.ones(4)}, 1.0)
    bias = AdapterModule("shift", {"shift": torch.ones(4)}, 1.0)
    with vl.attach(model, {"a": Adapter({"model.0": lora, "model.1.weight": norm, "model.0.bias": bias})}, mode=mode):
        with pytest.warns(UserWarning, match=SAID):
            assert same(state(around), before)
        again = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=SAID):
        assert same(state(again), state(model))


@pytest.mark.filterwarnings("error")
def test_what_trains_is_saved_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    vl.attach(model, {"a": Adapter({"model.0": AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)})}).detach()
    handle = vl.inject(model, vl.AdapterConfig(targets="0", rank=2))
    assert any("adapters" in name for name in model.state_dict())
    handle.eject()
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
