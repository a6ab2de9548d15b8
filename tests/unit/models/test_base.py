"""Choosing and opening base models, and every refusal."""

from pathlib import Path

import pytest
import torch

from visionlora.errors import ModelError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.base import DEFAULT_ON_GPU, choose, fetch_default, open_base
from visionlora.models.fingerprint import architecture_fingerprint, weights_fingerprint


def test_a_folder_opens_frozen(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    assert (base.resolution, base.scale_factor, base.multiple) == (32, 4, 8)
    assert base.prediction_type == "epsilon"
    assert not any(p.requires_grad for part in base.components().values() for p in part.parameters())
    assert all(p.dtype == torch.float32 for p in base.pipe.unet.parameters())


def test_auto_takes_the_embedded_model_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, why = choose("Base model", "auto", "emoji-64", DEFAULT_ON_GPU, fetch_default)
    assert model == "emoji-64"
    assert why == "Base model: emoji-64, the embedded one, as there is no GPU. Choose with --model."


def test_auto_with_a_gpu_but_no_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, why = choose("Base model", "auto", "emoji-64", DEFAULT_ON_GPU, fetch_default)
    assert model == "emoji-64"
    assert "is neither cached nor reachable" in why


def test_resolution_must_fit_the_grid(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    base.check_resolution(40)
    with pytest.raises(ModelError, match=r"A resolution of 36 px does not fit .* Use 32 or 40 \(native: 32\)"):
        base.check_resolution(36)


def test_refusals(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for given, words in (
        (tmp_path / "emty", "There is no model at"),
        (tmp_path / "emty", "Did you mean 'empty'?"),
        (tmp_path / "empty", "is not a diffusers model: it has no model_index.json"),
        (tmp_path / "notes.txt", "is not a model: a single file ends in .safetensors or .ckpt"),
    ):
        with pytest.raises(ModelError) as caught:
            open_base(str(given))
        assert words in str(caught.value)


def test_a_hub_id_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="The model nobody/nothing cannot be opened") as caught:
        open_base("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_fingerprints_tell_weights_and_architectures_apart(tiny_model: Path) -> None:
    a, b = open_base(str(tiny_model)).pipe.unet, open_base(str(tiny_model)).pipe.unet
    assert weights_fingerprint(a) == weights_fingerprint(b)
    inject(b, AdapterConfig(rank=2))
    assert weights_fingerprint(a) == weights_fingerprint(b), "an adapter does not count"
    assert architecture_fingerprint(a) == architecture_fingerprint(b)
    b.conv_in.weight.data += 0.1
    assert weights_fingerprint(a) != weights_fingerprint(b)
    assert architecture_fingerprint(a) == architecture_fingerprint(b)


def test_the_fp16_file_of_a_model_has_the_same_fingerprint(tiny_model: Path) -> None:
    unet = open_base(str(tiny_model)).pipe.unet
    full = weights_fingerprint(unet)
    assert weights_fingerprint(unet.half()) == full
