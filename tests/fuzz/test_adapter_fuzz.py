"""Broken adapter files: our own error, never a crash, a hang or a full memory."""

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visionlora as vl
from visionlora.errors import AdapterFileError
from visionlora.formats import kohya, native
from visionlora.formats.inspection import inspect_file, summarise
from visionlora.lora.adapter import Adapter, AdapterModule

LOHA = {n: torch.ones(*s) for n, s in {
    "hada_w1_a": (4, 2), "hada_w1_b": (2, 3), "hada_w2_a": (4, 2), "hada_w2_b": (2, 3),
}.items()}  # fmt: skip
ADAPTER = Adapter({
    "unet.conv_in": AdapterModule.lora(torch.ones(2, 3), torch.ones(4, 2), 2.0),
    "unet.conv_out": AdapterModule("loha", LOHA, 1.0),
})  # fmt: skip
FILES = {"visionlora": native.to_bytes(ADAPTER, {}), "kohya": kohya.to_bytes(ADAPTER)}


def check_read_or_refuse(path: Path) -> None:
    """Both the loader and `inspect` give a result or our error."""
    try:
        adapter = vl.load_adapter(path)
    except AdapterFileError as e:
        assert str(path) in str(e)
    else:
        assert all(m.problem() is None for m in adapter.modules.values())
    with contextlib.suppress(AdapterFileError):
        inspect_file(path)
    summarise(path)


@pytest.mark.parametrize("format", FILES)
@settings(max_examples=300)
@given(data=st.data())
def test_flipped_and_cut_bytes_are_refused_or_read(tmp_path_factory, format: str, data: st.DataObject) -> None:
    original = bytearray(FILES[format])
    for _ in range(data.draw(st.integers(0, 3))):
        original[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(bytes(original[: data.draw(st.integers(0, len(original)))]))
    check_read_or_refuse(path)


def parts(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + body


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=5), st.just([]), st.just({}), st.just("F64"),
    st.lists(st.integers(-5, 2**62), max_size=4),
)  # fmt: skip


@pytest.mark.parametrize("format", FILES)
@settings(max_examples=200)
@given(data=st.data())
def test_a_header_that_lies(tmp_path_factory, format: str, data: st.DataObject) -> None:
    """Offsets, dtypes, shapes and our own entries replaced by anything."""
    header, body = parts(FILES[format])
    name = data.draw(st.sampled_from(sorted(header)))
    if name == "__metadata__":
        key = data.draw(st.sampled_from(sorted(header[name])))
        header[name][key] = data.draw(
            st.one_of(VALUES, st.sampled_from(["{}", "[]", "null", "{", '{"modules": {"a": 1}}']))
        )
        if key == "visionlora" and data.draw(st.booleans()):
            own = json.loads(parts(FILES[format])[0][name][key])
            module = data.draw(st.sampled_from(sorted(own["modules"])))
            own["modules"][module][data.draw(st.sampled_from(["kind", "alpha", "options", "tensors"]))] = data.draw(
                VALUES
            )
            header[name][key] = json.dumps(own)
    else:
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(VALUES)
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(whole(json.dumps(header), body))
    check_read_or_refuse(path)


def hostile() -> dict[str, bytes]:
    """Files made to hurt."""
    header, body = parts(FILES["kohya"])
    text = json.dumps(header)
    first = next(k for k in header if k != "__metadata__")
    twice = text[:-1] + f', "{first}": {json.dumps(header[first])}' + "}"
    huge = {**header, first: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    empty = {first: {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}
    long = {"a" * 200_000 + ".lora_A.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}
    return {
        "a header of 10 MB": whole(json.dumps({**header, "__metadata__": {"a": "x" * 10_000_000}}), body),
        "a header that claims 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a key twice": whole(twice, body),
        "a tensor of 2^60 values": whole(json.dumps(huge), body),
        "an empty tensor": whole(json.dumps(empty), b""),
        "a name of 200,000 letters": whole(json.dumps(long), b"\0" * 4),
        "deep nesting": whole('{"a":' * 5000 + "1" + "}" * 5000, b""),
        "no JSON": whole("not json", b""),
        "nothing": b"",
        "three bytes": b"PK\x03",
    }


@pytest.mark.parametrize("name", hostile())
def test_files_made_to_hurt(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(hostile()[name])
    check_read_or_refuse(tmp_path / "a.safetensors")
