"""Weights cast from their file: the same numbers, and the mapped ones stay unread."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visionlora.lora.mapped import Mappings, cast
from visionlora.models.fingerprint import content_fingerprint, weights_fingerprint

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
SIZE = 2**20


def resident(part: str = "RssFile") -> int:
    """KiB of files in this process's memory."""
    return int(Path("/proc/self/status").read_text().partition(part + ":")[2].split()[0])


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """Its weights are mapped from a file, but for the last."""
    names = [f"{i}.weight" for i in range(8)]
    save_file({n: torch.randn(SIZE // 256, 256) for n in names}, tmp_path / "m.safetensors")
    found = nn.Sequential(*(nn.Linear(256, SIZE // 256, bias=False, device="meta") for _ in names))
    found.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    found.append(nn.Linear(3, 3))
    return found.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_gives_what_torch_gives(model: nn.Module, dtype: torch.dtype) -> None:
    parameters = list(model.parameters())
    expected = [p.detach().clone().to(dtype) for p in parameters]
    cast(model, dtype)
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert all(torch.equal(p, e) and p.dtype == dtype for p, e in zip(parameters, expected, strict=True))


@linux
def test_mapped_weights_stay_unread(model: nn.Module) -> None:
    mappings = Mappings()
    assert [mappings.file_of(p) is None for p in model.parameters()] == [False] * 8 + [True] * 2
    before = resident()
    assert len(weights_fingerprint(model)) == 16 and len(content_fingerprint(model)) == 16
    assert resident() - before < 4 * SIZE // 1024
    cast(model, torch.bfloat16)
    assert resident() - before < 4 * SIZE // 1024  # all eight take 32 MiB


@linux
@pytest.mark.parametrize("change", ["nothing", "removed", "replaced", "written to"])
def test_what_is_no_longer_in_the_file_is_read_from_memory(change: str, model: nn.Module, tmp_path: Path) -> None:
    file, parameter = tmp_path / "m.safetensors", next(model.parameters())
    if change in ("removed", "replaced"):
        content = file.read_bytes()
        file.unlink()
        if change == "replaced":
            file.write_bytes(bytes(len(content)))
    if change == "written to":
        parameter.data[SIZE // 512, 7] += 1  # somewhere in its middle
    mappings = Mappings()
    assert (mappings.file_of(parameter) is None) == (change != "nothing")
    assert torch.equal(mappings.copied(parameter.data, torch.float64), parameter.double())
    index = [0, SIZE // 512 * 256 + 7, SIZE - 1]
    assert torch.equal(mappings.values(parameter, index), parameter.flatten()[index])


@linux
@pytest.mark.parametrize("place", ["in its file", "in memory", "cut off meanwhile"])
def test_pieces_are_the_bytes(place: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = next(model.parameters())
    if place == "in memory":
        parameter.data = parameter.data.t().clone().t()  # whose order in memory is another
    mappings, expected = Mappings(), parameter.detach().clone().contiguous().numpy().tobytes()
    if place == "cut off meanwhile":
        cut = tmp_path / "cut"
        cut.write_bytes(b"123")
        monkeypatch.setattr(mappings, "file_of", lambda tensor: (str(cut), 0))
    pieces = list(mappings.pieces(parameter))
    assert b"".join(pieces) == expected and (len(pieces) > 1) == (place == "in its file")
