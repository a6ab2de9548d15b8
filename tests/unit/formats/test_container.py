"""The bytes of a file: safetensors and pickles."""

import hashlib
import struct
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import visionlora as vl
from visionlora.formats.container import file_hashes, is_pickle, read_header
from visionlora.formats.inspection import weights_file
from visionlora.loaders import WRITERS
from visionlora.lora.adapter import Adapter, AdapterModule


def kohya() -> dict[str, torch.Tensor]:
    return {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
    }


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_of_tensors_is_read_whatever_its_name(suffix: str, nested: bool, tmp_path: Path) -> None:
    torch.save({"state_dict": kohya()} if nested else kohya(), tmp_path / f"a{suffix}")
    assert is_pickle(tmp_path / f"a{suffix}")
    adapter = vl.load_adapter(tmp_path / f"a{suffix}")
    torch.testing.assert_close(adapter.delta_weights()["unet.conv_in"], torch.full((4, 3), 2.0))


def test_what_trainings_save_beside_weights_is_passed_by(tmp_path: Path) -> None:
    """Arguments, numpy's numbers, paths: none of it is made, and arrays, which may be weights, are refused by name."""
    beside = {"args": Namespace(lr=1e-3, out=Path("x")), "metric": np.float64(0.5), "out": tmp_path, "epoch": 3}
    torch.save({"state_dict": kohya(), **beside}, tmp_path / "a.pt")
    adapter = vl.load_adapter(tmp_path / "a.pt")
    torch.testing.assert_close(adapter.delta_weights()["unet.conv_in"], torch.full((4, 3), 2.0))
    torch.save({"state_dict": kohya(), "rng": np.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(
        vl.VisionLoRAError, match=r"holds more than tensors \(numpy[a-z._]*\._reconstruct\)\. visionlora"
    ):
        vl.load_adapter(tmp_path / "b.pt")


class Harmful:
    def __reduce__(self):
        return eval, ("open('harm', 'w')",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**kohya(), "x": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(
        vl.VisionLoRAError, match=r"cannot be opened safely: it holds more than tensors .*weights_only=True"
    ):
        vl.load_adapter(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_a_cut_pickle_is_damaged(tmp_path: Path) -> None:
    torch.save(kohya(), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(vl.VisionLoRAError, match="cannot be opened safely: it is damaged"):
        vl.load_adapter(tmp_path / "a.pt")


def test_the_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    adapter = vl.Adapter({"unet.conv_in": vl.load_adapter(written(tmp_path)).modules["unet.conv_in"]})
    for format in ("visionlora", "kohya", "diffusers"):
        path = tmp_path / f"{format}.safetensors"
        vl.save_adapter(adapter, path, format)
        data = path.read_bytes()
        body = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
        assert file_hashes(path) == {
            "sha256": hashlib.sha256(data).hexdigest(), "AutoV2": hashlib.sha256(data).hexdigest()[:10], "AutoV3": body,
        }  # fmt: skip
        metadata = read_header(path).metadata
        assert metadata["sshs_model_hash"] == body and metadata["modelspec.hash_sha256"] == "0x" + body


def written(folder: Path) -> Path:
    save_file(kohya(), folder / "first.safetensors", {"ss_steps": "7", "sshs_model_hash": "stale"})
    return folder / "first.safetensors"


def test_what_other_tools_wrote_is_carried_over_and_stale_hashes_are_not(tmp_path: Path) -> None:
    adapter = vl.load_adapter(written(tmp_path))
    assert adapter.info["training"] == {"steps": 7}
    save_file(kohya(), tmp_path / "b.safetensors", {"ss_clip_skip": "2", "ss_zero_terminal_snr": "True"})
    assert vl.load_adapter(tmp_path / "b.safetensors").info["training"] == {"clip_skip": 2, "zero_terminal_snr": True}
    vl.save_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert metadata["ss_steps"] == "7" and metadata["sshs_model_hash"] != "stale"
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "2"


@pytest.mark.parametrize("to", WRITERS)
def test_how_an_adapter_was_trained_is_in_every_file(to: str, tmp_path: Path) -> None:
    adapter = replace(vl.load_adapter(written(tmp_path)), metadata={})
    training = {"clip_skip": 2, "zero_terminal_snr": True, "max_token_length": 150}
    path = tmp_path / ("a" if to == "peft" else "a.safetensors")
    vl.save_adapter(replace(adapter, info={"training": training, "trigger": "rex"}), path, to)
    metadata = read_header(weights_file(path)).metadata
    assert metadata["ss_clip_skip"] == "2" and metadata["ss_zero_terminal_snr"] == "True"
    found = vl.load_adapter(path).info
    assert found["training"] == training and found["trigger"] == "rex"


def test_a_resized_adapter_does_not_claim_its_old_rank(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.randn(4, 6),
        "lora_unet_conv_in.lora_up.weight": torch.randn(8, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_steps": "7"})
    small = vl.resize_adapter(vl.load_adapter(tmp_path / "a.safetensors"), vl.Size(rank=2)).adapter
    vl.save_adapter(small, tmp_path / "b.safetensors", "kohya")
    metadata = read_header(tmp_path / "b.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_steps"]) == ("2", "2", "7")


def test_a_cut_file_is_seen_from_its_header(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read_header(path).tensors["lora_unet_conv_in.lora_up.weight"].shape == (4, 2)
    path.write_bytes(path.read_bytes()[:-4])
    for read in (read_header, vl.load_adapter):
        with pytest.raises(vl.VisionLoRAError, match="is not a whole safetensors file"):
            read(path)


@pytest.mark.parametrize("to", ["visionlora", "kohya", "peft"])
def test_what_was_read_does_not_follow_its_file(to: str, tmp_path: Path) -> None:
    """Written over in place or cut: a mapped tensor would change, or end the process."""
    adapter = Adapter({"unet.conv_in": AdapterModule.lora(torch.ones(2, 3000), torch.ones(4000, 2), 2.0)})
    path = tmp_path / ("a" if to == "peft" else "a.safetensors")
    vl.save_adapter(adapter, path, to)
    file = weights_file(path)
    (module,) = vl.load_adapter(path).modules.values()
    kept, size = module.tensors, file.stat().st_size
    with file.open("r+b") as writing:
        writing.write(bytes(size))
    assert all(bool((t == 1).all()) for t in kept.values())
    with file.open("r+b") as writing:
        writing.truncate(10)
    assert all(bool((t == 1).all()) for t in kept.values())


MEASURED = """
import re, sys
from pathlib import Path
import visionlora as vl
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
vl.load_adapter(sys.argv[1])
before = peak()
vl.load_adapter(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
def test_a_large_file_is_read_without_further_copies_of_it(tmp_path: Path) -> None:
    """Its values were checked as one, in fp64: at the peak there was four times the file, beside the file."""
    for name, layers in (("small.safetensors", 1), ("large.safetensors", 16)):
        modules = {
            f"unet.m{k}.to_q": AdapterModule.lora(torch.ones(512, 1024), torch.ones(1024, 512), 8.0)
            for k in range(layers)
        }
        vl.save_adapter(Adapter(modules), tmp_path / name)
    words = [sys.executable, "-c", MEASURED, str(tmp_path / "small.safetensors"), str(tmp_path / "large.safetensors")]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert grown < 2.5 * (tmp_path / "large.safetensors").stat().st_size, (
        "the tensors, and the file that they are read from"
    )


def test_a_folder_of_several_adapters_of_pefts_names_them(tmp_path: Path) -> None:
    """PEFT saves every adapter that is not `default` in a folder of its name."""
    import peft

    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]), "red"
    )
    model.add_adapter("blue", peft.LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path / "multi")
    (tmp_path / "multi" / "notes").mkdir()
    with pytest.raises(vl.VisionLoRAError) as caught:
        vl.load_adapter(tmp_path / "multi")
    folder = tmp_path / "multi"
    said = f"It is a folder with adapters of PEFT's in blue, red: name one, such as {folder}/blue."
    assert str(caught.value) == f"There is no adapter file at {folder}. {said}"
    assert vl.load_adapter(folder / "blue").format == "peft"
