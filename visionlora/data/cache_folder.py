"""What lies in the cache folder, and taking it away: latents and text, pixels, what is known of pictures, unpacked tables.

Everything in it can be computed again, also in a run that goes on meanwhile. Other files that lie there are left alone.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY = "[0-9a-f]{32}"
KINDS = {
    "latents and text": re.compile(rf"{KEY}\.safetensors"),
    "pixels for classify": re.compile(rf"pictures-{KEY}\.npy"),
    "what is known of pictures": re.compile(rf"facts-{KEY}\.npz"),
    "pictures of parquet tables": re.compile(rf"\d+-{KEY}(-[0-9a-f]{{8}})?"),
}
"""What is kept -> the names of its files, or folders."""
TABLES = "parquet"
"""The folder of the last."""


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
                if kind is None or path.is_symlink():
                    continue
                with contextlib.suppress(OSError):  # taken away meanwhile
                    files = [p.stat() for p in (path.rglob("*") if path.is_dir() else (path,))]
                    times = [max(s.st_mtime, s.st_atime) for s in files] or [path.stat().st_mtime]
                    yield CacheEntry(kind, path, sum(s.st_size for s in files), max(times))


def remove(entry: CacheEntry) -> bool:
    """Takes an entry away; whether it is gone."""
    with contextlib.suppress(OSError):
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    return not entry.path.exists()
