"""Our file: exact round trip, hashes that are right, and every refusal."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visionlora.errors import AdapterFileError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter, AdapterModule


def adapter() -> Adapter:
    torch.manual_seed(0)
    modules = {
        "unet.a.to_q": AdapterModule.lora(torch.randn(4, 6), torch.randn(8, 4), 4.0),
        "unet.b.conv": AdapterModule.lora(torch.randn(2, 6, 3, 3), torch.randn(8, 2, 1, 1), 7.5),
    }
    return Adapter(modules, {"trigger": "sks dog"})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    native.write(adapter(), path)
    back = native.read(path)
    assert back.info["trigger"] == "sks dog"
    assert list(back.modules) == list(adapter().modules)
    for name, module in adapter().modules.items():
        assert module.tensors.keys() == back.modules[name].tensors.keys()
        assert all(torch.equal(back.modules[name].tensors[k], t) for k, t in module.tensors.items())
        assert back.modules[name].alpha == module.alpha
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"], "no partial file stays"


def test_the_hash_in_the_header_is_that_of_the_bytes_after_it(tmp_path: Path) -> None:
    native.write(adapter(), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert all(isinstance(v, str) for v in metadata.values())


def test_diffusers_metadata_names_what_differs() -> None:
    flat = native.diffusers_metadata(adapter())
    assert flat["unet.r"] in (2, 4)
    other = "b.conv" if flat["unet.r"] == 4 else "a.to_q"
    assert set(flat["unet.rank_pattern"]) == {other}
    assert set(flat["unet.alpha_pattern"]) == {other}


def write_with(path: Path, change) -> None:
    """Our file after a change to its tensors or header."""
    native.write(adapter(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def drop(tensors, metadata) -> None:
    del tensors["unet.a.to_q.lora_B.weight"]


def add(tensors, metadata) -> None:
    tensors["unet.c.lora_A.weight"] = torch.zeros(1)


def poison(tensors, metadata) -> None:
    tensors["unet.a.to_q.lora_A.weight"][0, 0] = float("inf")


def newer(tensors, metadata) -> None:
    metadata["visionlora"] = json.dumps({**json.loads(metadata["visionlora"]), "format_version": 99})


def foreign(tensors, metadata) -> None:
    del metadata["visionlora"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "lacks the tensor 'unet.a.to_q.lora_B.weight' that its header lists"),
        (add, "has 1 tensors that its header does not list, the first 'unet.c.lora_A.weight'"),
        (poison, "has NaN or infinite values in 'unet.a.to_q'"),
        (newer, "has format version 99, newer than this visionlora reads (1): update visionlora"),
        (foreign, "was not written by visionlora"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_refusals(tmp_path: Path, change, words: str) -> None:
    write_with(tmp_path / "a.safetensors", change)
    with pytest.raises(AdapterFileError) as caught:
        native.read(tmp_path / "a.safetensors")
    assert words in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    native.write(adapter(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"It is a folder with a\.safetensors: name the file"):
        native.read(tmp_path)
    for near in (
        "dog-20260101.safetensors",
        "dog-20260102.safetensors",
        "notes.txt",
        "v1.0.safetensors",
        "v1.0b.safetensors",
    ):
        (tmp_path / near).touch()
    for given, meant in (
        ("dog", "dog-20260102.safetensors"),
        ("v1.0", "v1.0.safetensors"),
        ("dgo-20260101.safetensors", "dog-20260101.safetensors"),
    ):
        with pytest.raises(AdapterFileError, match=rf"no adapter file at .*{given}\. Did you mean .*{meant}\?"):
            native.read(tmp_path / given)
    with pytest.raises(AdapterFileError, match=r"There is no adapter file at \S*\.$"):
        native.read(tmp_path / "b.safetensors")
