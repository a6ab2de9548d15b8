"""What lies in the cache folder, and taking it away: latents and text, pixels, what is known of pictures, unpacked tables.

Everything in it can be computed again, also in a run that goes on meanwhile, as long as its pictures are there: those of a
table go with the rest, and then it has to begin again. Other files that lie there are left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visionlora.data.pixels import is_locked

KEY = "[0-9a-f]{32}"
KINDS = {
    "latents and text": re.compile(rf"{KEY}\.safetensors"),
    "pixels for classify": re.compile(rf"pictures-{KEY}\.npy"),
    "what is known of pictures": re.compile(rf"facts-{KEY}\.npz"),
    "pictures of parquet tables": re.compile(rf"\d+-{KEY}(-[0-9a-f]{{8}})?"),
    "left by runs that were killed": re.compile(
        rf"\.(({KEY}\.safetensors|facts-{KEY}\.npz)\.\d+|pictures\..+|rows-.+)\.tmp"
    ),
}
"""What is kept -> the names of its files, or folders; the last are files that were being written."""
TABLES = "parquet"
"""The folder of the pictures of tables."""
AN_HOUR = 60 * 60
"""In which a process that lives writes something, s."""


@dataclass(frozen=True)
class CacheEntry:
    """A file, or a folder of them."""

    kind: str
    path: Path
    nbytes: int
    used: float
    """When it was last written or read, seconds since 1970, as far as the file system says."""


def entries_of(folder: Path) -> Iterator[CacheEntry]:
    """Everything that visionlora keeps there."""
    for place in (folder, folder / TABLES):
        with contextlib.suppress(OSError):
            for path in place.iterdir():
                kind = next((kind for kind, name in KINDS.items() if name.fullmatch(path.name)), None)
                if kind is None or path.is_symlink() or (path.suffix == ".tmp" and is_written(path)):
                    continue
                with contextlib.suppress(OSError):  # taken away meanwhile
                    files = [p.stat() for p in (path.rglob("*") if path.is_dir() else (path,))]
                    times = [max(s.st_mtime, s.st_atime) for s in files] or [path.stat().st_mtime]
                    yield CacheEntry(kind, path, sum(s.st_size for s in files), max(times))


def is_written(path: Path) -> bool:
    """Whether a living process may be writing a file, or folder, that has its name for the time being."""
    if path.name.startswith(".pictures."):
        return is_locked(path)
    number = re.search(r"\.(\d+)\.tmp$", path.name)
    try:
        if number is None or sys.platform == "win32":  # there asking for a process would end it
            return time.time() - path.stat().st_mtime < AN_HOUR
        os.kill(int(number[1]), 0)
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return False
    except OSError:
        return True
    return True


def remove(entry: CacheEntry) -> bool:
    """Takes an entry away; whether it is gone."""
    with contextlib.suppress(OSError):
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    return not entry.path.exists()
