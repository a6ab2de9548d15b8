"""Nothing that is no base is saved under a mix, and what hangs on a model is off again with it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.models.base import open_base

from .test_mix import adapter

SAID = r"Adapters are on this .* \(dog\): .*mix.detach\(\).* vl.bake"


@pytest.mark.parametrize("mode", ["merged", "stacked"])
def test_nothing_is_saved_under_a_mix(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    pipe = open_base(str(tiny_model)).pipe
    before = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    with vl.attach(pipe, {"dog": adapter(pipe, 0)}, mode=mode) as mix:
        mix.set_scales(0.5)
        for saved in (pipe, pipe.unet, pipe.text_encoder):
            with pytest.raises(ConfigError, match=SAID):
                saved.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        with pytest.raises(ConfigError, match=SAID):
            copy.deepcopy(pipe.unet).save_pretrained(tmp_path / "copy")
        pipe.vae.save_pretrained(tmp_path / "vae")
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    pipe.save_pretrained(tmp_path / "model")
    saved = load_file(next((tmp_path / "model/unet").glob("*.safetensors")))
    assert saved.keys() == before.keys() and all(torch.equal(saved[n], t) for n, t in before.items())
    assert not any("save_pretrained" in vars(part) for part in (pipe, pipe.unet, pipe.text_encoder))


def test_a_compiled_model_is_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    pipe = open_base(str(tiny_model)).pipe
    plain, pipe.unet = pipe.unet, torch.compile(pipe.unet)
    vl.attach(pipe, {"dog": adapter(pipe, 0, ("lora",), text=False)})
    with pytest.raises(ConfigError, match=SAID):
        plain.save_pretrained(tmp_path)
    vl.detach(plain)
    assert not {"save_pretrained", "_mix"} & {*vars(plain), *vars(pipe)}


def test_a_copy_cannot_be_rid_of_its_adapters(tiny_model: Path) -> None:
    """vl.detach left them on it without a word."""
    pipe = open_base(str(tiny_model)).pipe
    with vl.attach(pipe, {"dog": adapter(pipe, 0, ("lora",), text=False)}):
        twin = copy.deepcopy(pipe.unet)
        with pytest.raises(
            ConfigError, match=r"on this UNet2DConditionModel \(dog\) are of no mix on it: .* copy it after"
        ):
            vl.detach(twin)
        with pytest.raises(ConfigError, match=r"is a copy .*\(dog\); they are on it for good, .* copy it after"):
            vl.attach(twin, {"ink": adapter(pipe, 1, ("lora",), text=False)})
    vl.detach(pipe)
    handle = vl.attach(pipe.unet, adapter(pipe, 0, ("lora",), text=False), component="unet")
    with pytest.raises(ConfigError, match=r"a handle takes its own off \(handle.eject\(\)\)"):
        vl.detach(pipe)
    handle.eject()
    vl.detach(pipe)
    assert "_guard" not in vars(pipe.unet)
