"""The base model as a run needs it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from visionlora.config import TrainSDConfig
from visionlora.data.cache import TensorCache
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.encode import encode_dataset
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.diffusion.settings import (
    attention_kernel,
    check_attention,
    prepare_encoders,
    prepare_unet,
    release,
    whole_captions,
)
from visionlora.errors import ConfigError
from visionlora.lora.packed import packed_layers
from visionlora.models.base import open_base
from visionlora.training.settings import adapter_config, suited

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers
CPU = torch.device("cpu")
CONFIG = TrainSDConfig(images="here")


@pytest.mark.parametrize(
    ("settings", "precision", "dtype"),
    [
        ({}, "no", torch.float32),
        ({}, "bf16", torch.bfloat16),
        ({"base_precision": "fp32"}, "bf16", torch.float32),
        ({"method": "full"}, "bf16", torch.float32),
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


def test_samples_are_drawn_with_any_kernel(tiny_model: Path) -> None:
    """Also while the training may use flash attention alone: the VAE is in fp32, with one wide head."""
    base, seen = open_base(str(tiny_model)), []
    base.pipe.vae.decoder.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.math_sdp_enabled()))
    with attention_kernel("flash"):
        assert not torch.backends.cuda.math_sdp_enabled()
        draw(base, ["a"], 32, SamplingConfig(steps=1))
        assert not torch.backends.cuda.math_sdp_enabled()
    assert seen == [True]


def test_flash_attention_computes_in_half_precision_alone() -> None:
    with pytest.raises(ConfigError, match="attention is 'flash', which computes in half precision alone"):
        check_attention("flash", torch.device("cuda"), "no")
    check_attention("flash", torch.device("cuda"), "bf16")


def test_what_is_released_has_no_weights(tiny_model: Path, dogs: Path) -> None:
    base = open_base(str(tiny_model))
    data = encode_dataset(base, read_image_folder(dogs).items, 32)
    release(base, [data], text_is_cached=False)
    assert base.pipe.vae.device.type == "meta" and base.pipe.text_encoder.device.type == "cpu"
    release(base, [data], text_is_cached=True)
    assert base.pipe.text_encoder.device.type == "meta"


def test_what_is_on_disk_alone_can_be_encoded_again(tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("visionlora.data.cache.IN_MEMORY", 0)
    base, cache = open_base(str(tiny_model)), TensorCache(tmp_path / "cache")
    data = encode_dataset(base, read_image_folder(dogs).items, 32, cache)
    before = [data.latent(0, 0), data.texts[0]["text"]]
    release(base, [data], text_is_cached=True)
    for file in cache.folder.iterdir():
        file.unlink()
    for one, two in zip(before, [data.latent(0, 0), data.texts[0]["text"]], strict=True):
        torch.testing.assert_close(one, two)


def test_a_small_model_saves_no_memory_unless_told_to(tiny_model: Path) -> None:
    suggested = open_base(str(tiny_model)).suggested
    assert not adapter_config(suited(CONFIG, suggested)[0]).save_memory
    wanted = dataclasses.replace(CONFIG, save_memory=True)
    assert adapter_config(suited(wanted, suggested)[0]).save_memory


def test_pictures_are_judged_under_their_whole_captions(dogs: Path) -> None:
    """Under one of training's shortened ones, another for each seed, losses of two runs could not be compared."""
    items = read_image_folder(dogs, "dog, red, sitting, grass, sky").items
    for seed in (0, 1):
        config = TrainSDConfig(images=str(dogs), shuffle_tags=True, tag_dropout=0.5, seed=seed)
        assert whole_captions(config, items) == [("dog, red, sitting, grass, sky",)] * 3
        chosen = [dataclasses.replace(items[0], caption="a {red|blue} dog")]
        (found,) = whole_captions(config, chosen)
        assert found in (("a red dog",), ("a blue dog",))
        assert [found] == whole_captions(dataclasses.replace(config, seed=7), chosen)
