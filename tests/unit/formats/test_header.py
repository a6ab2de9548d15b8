"""What every file of ours has in common."""

import json
import struct

import torch
from safetensors.torch import load, save

from visionlora.formats.header import hashed, in_order


def metadata_of(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def test_equal_adapters_are_equal_files_whatever_the_order_of_their_metadata() -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.float16)}
    words = {f"key {i}": "ä" * i for i in range(20)}
    files = {hashed(tensors, dict(sorted(words.items(), reverse=flag))) for flag in (False, True) for _ in range(4)}
    assert len(files) == 1
    (data,) = files
    assert list(metadata_of(data)) == sorted(metadata_of(data))
    read = load(data)
    assert all(torch.equal(read[n], t) for n, t in tensors.items())


def test_tensors_begin_where_the_library_puts_them() -> None:
    data = in_order(save({"a": torch.ones(3)}, {"odd": "x" * 13}))
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0 and torch.equal(load(data)["a"], torch.ones(3))
