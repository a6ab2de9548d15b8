"""The base model as a run needs it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from visionlora.config import TrainSDConfig
from visionlora.diffusion.settings import prepare_encoders, prepare_unet, release
from visionlora.lora.packed import packed_layers
from visionlora.models.base import open_base
from visionlora.training.settings import adapter_config, suited

CPU = torch.device("cpu")
CONFIG = TrainSDConfig(images="here")


@pytest.mark.parametrize(
    ("settings", "precision", "dtype"),
    [
        ({}, "no", torch.float32),
        ({}, "bf16", torch.bfloat16),
        ({"base_precision": "fp32"}, "bf16", torch.float32),
        ({"base_precision": "int8", "gradient_checkpointing": True}, "no", torch.float32),
    ],
)
def test_the_unet_waits_until_it_is_needed_and_twice_is_as_once(
    settings: dict[str, object], precision: str, dtype: torch.dtype, tiny_model: Path
) -> None:
    base, config = open_base(str(tiny_model)), dataclasses.replace(CONFIG, **settings)
    unet = base.pipe.unet
    prepare_encoders(base, config, CPU, precision)
    assert base.pipe.text_encoder.dtype == dtype and base.pipe.vae.dtype == torch.float32
    assert {p.dtype for p in unet.parameters()} == {torch.float32} and not packed_layers(unet)
    inputs = torch.randn(1, 4, 8, 8, dtype=dtype), 10, torch.randn(1, 16, 16, dtype=dtype)
    outputs = []
    for _ in range(2):
        prepare_unet(base, config, CPU, precision)
        assert {p.dtype for p in unet.parameters()} == {dtype}
        assert bool(packed_layers(unet)) == (config.base_precision == "int8")
        with torch.no_grad():
            outputs.append(unet(*inputs).sample)
    assert torch.equal(*outputs)


def test_what_is_released_has_no_weights(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    release(base, text_is_cached=False)
    assert base.pipe.vae.device.type == "meta" and base.pipe.text_encoder.device.type == "cpu"
    release(base, text_is_cached=True)
    assert base.pipe.text_encoder.device.type == "meta"


def test_a_small_model_saves_no_memory_unless_told_to(tiny_model: Path) -> None:
    suggested = open_base(str(tiny_model)).suggested
    assert not adapter_config(suited(CONFIG, suggested)[0]).save_memory
    wanted = dataclasses.replace(CONFIG, save_memory=True)
    assert adapter_config(suited(wanted, suggested)[0]).save_memory
