"""What is kept from run to run, and taking it away."""

import os
import time
from pathlib import Path

import torch

from visionlora.data.cache import TensorCache, key_of
from visionlora.data.cache_folder import AN_HOUR, KINDS, entries_of, remove
from visionlora.data.pixels import Writer

NEVER = 2**22 + 1
"""A number that no process has."""


def filled(folder: Path) -> Path:
    TensorCache(folder).put(key_of("a"), {"x": torch.zeros(4)})
    for name in (f"pictures-{key_of('b')}.npy", f"facts-{key_of('c')}.npz", "notes.txt"):
        (folder / name).write_bytes(b"1234")
    table = folder / "parquet" / f"3-{key_of('d')}"
    table.mkdir(parents=True)
    (table / "0.png").write_bytes(b"12345678")
    (folder / f".{key_of('e')}.safetensors.{NEVER}.tmp").write_bytes(b"123")
    return folder


def test_everything_is_found_and_nothing_else(tmp_path: Path) -> None:
    entries = {entry.kind: entry for entry in entries_of(filled(tmp_path))}
    assert list(KINDS) == sorted(entries, key=list(KINDS).index)
    assert entries["pictures of parquet tables"].nbytes == 8 and entries["pixels for classify"].nbytes == 4
    assert all(remove(entry) for entry in entries.values())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes.txt", "parquet"]
    assert list(entries_of(tmp_path / "nowhere")) == []


def test_when_an_entry_was_used(tmp_path: Path) -> None:
    file = filled(tmp_path) / f"facts-{key_of('c')}.npz"
    before = time.time() - 1000
    os.utime(file, (before, before - 50))
    (used,) = (entry.used for entry in entries_of(tmp_path) if entry.path == file)
    assert abs(used - before) < 1


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    living, old = tmp_path / f".facts-{key_of('a')}.npz.{os.getpid()}.tmp", time.time() - 2 * AN_HOUR
    dead = tmp_path / f".facts-{key_of('a')}.npz.{NEVER}.tmp"
    for path in (living, dead):
        path.write_bytes(b"1")
    for name in ("now", "then"):
        (tmp_path / "parquet" / f".rows-{name}.tmp").mkdir(parents=True)
    os.utime(tmp_path / "parquet" / ".rows-then.tmp", (old, old))
    writer = Writer(tmp_path, "x", 8)
    (tmp_path / ".pictures.killed.7.ab.tmp").write_bytes(b"1")
    found = {entry.path.name for entry in entries_of(tmp_path)}
    writer.remove()
    assert found == {dead.name, ".rows-then.tmp", ".pictures.killed.7.ab.tmp"}
