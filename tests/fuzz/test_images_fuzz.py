"""Whatever happens to a file's bytes: an RGB picture or a DataError, nothing else, and no warning."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visionlora.data.images import decode
from visionlora.errors import DataError


def encoded(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB" if kind == "JPEG" else "RGBA").save(file, kind, exif=exif)
    return file.getvalue()


FILES = {kind: encoded(kind) for kind in ("PNG", "JPEG")}


@pytest.mark.parametrize("kind", FILES)
@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_broken_bytes(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(FILES[kind])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] ^= data.draw(st.integers(1, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    try:
        image = decode(path)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.mode == "RGB" and min(image.size) >= 1


def test_the_whole_files_are_good(tmp_path: Path) -> None:
    for kind, content in FILES.items():
        (tmp_path / kind).write_bytes(content)
        assert decode(tmp_path / kind).size == (8, 8)
