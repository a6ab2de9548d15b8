"""What the frozen parts of a model say about the data, computed once and kept on disk.

A cache keeps distributions, not draws: the VAE's mean and standard deviation, raw, so that each epoch draws fresh
latents. The key is the content (hash of the file or caption), the transform and the model's fingerprint: an entry is
never stale and never shared by two different models. Writes are atomic.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from visionlora.atomic import replace_file


def default_cache_folder() -> Path:
    """`$VISIONLORA_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("VISIONLORA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionlora"


def key_of(*parts: str) -> str:
    """One file name for all that an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


CHECKSUM = "crc32"
"""In the metadata of an entry; disks lose bits, and what is read wrong would be learned wrong."""


def checksum(entry: Mapping[str, Tensor]) -> str:
    """CRC-32 over the bytes of an entry's tensors, by name; tensors are contiguous and on the CPU."""
    found = 0
    for name, tensor in sorted(entry.items()):
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _metadata(content: bytes) -> Mapping[str, str]:
    """What a whole safetensors file says of itself: its first 8 bytes are the length of the JSON that follows."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: Mapping[str, str] = header.get("__metadata__", {})
    return metadata


class TensorCache:
    """Named tensors per key, one small safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem = ""
        """Why an entry could not be written; empty where each could."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None when there is none or it is broken (a broken entry is computed again)."""
        try:
            # Not mapped: a process may have 65,530 mappings, and a cache holds more entries.
            content = (self.folder / f"{key}.safetensors").read_bytes()
            entry: dict[str, Tensor] = load(content)
            return entry if _metadata(content).get(CHECKSUM) == checksum(entry) else None
        except (FileNotFoundError, SafetensorError, OSError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry atomically; a cache that cannot be written is no reason to stop."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            entry = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            replace_file(self.folder / f"{key}.safetensors", save(entry, {CHECKSUM: checksum(entry)}))
        except OSError as e:
            self.problem = e.strerror or str(e)

    def fill(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], list[dict[str, Tensor]]],
        batches: int | Callable[[list[int]], Iterable[list[int]]],
        progress: Callable[[int, int], None] | None = None,
        share: Share | None = None,
    ) -> tuple[Entries, int]:
        """Entries for all keys in order, and how many this process had to compute.

        Args:
            keys: one per item.
            compute: from positions in `keys` to their entries.
            batches: how many are computed at once, which bounds the memory; or a function that cuts positions.
            progress: called with (done, total).
            share: of the work, where several processes do it.
        """
        entries = Entries(self, keys, compute)
        missing = [i for i, key in enumerate(keys) if not entries.take(i, self.get(key) if entries.room else None)]
        if share is not None:
            missing = [i for i in missing if i % share.count == share.index]
        parts = batches(missing) if callable(batches) else cut(missing, batches)
        done = 0
        for part in parts:
            for i, entry in zip(part, compute(part), strict=True):
                self.put(keys[i], entry)
                entries.take(i, entry, new=True)
            done += len(part)
            if progress is not None:
                progress(done, len(missing))
        if share is not None:
            share.wait()
        return entries, len(missing)

    @property
    def free(self) -> float:
        """Bytes that its disk has left; infinitely many where the disk does not say."""
        folder = self.folder.absolute()
        try:
            return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
        except OSError:
            return math.inf

    def has_room(self, needed: int) -> bool:
        """Whether so many more bytes fit onto its disk, or into memory, which keeps what cannot be written."""
        return needed <= max(IN_MEMORY, self.free)

    def holds(self, key: str) -> bool:
        """Whether there is an entry."""
        return (self.folder / f"{key}.safetensors").is_file()


def cut(positions: Sequence[int], most: int) -> list[list[int]]:
    """Parts of at most so many."""
    return [list(positions[i : i + most]) for i in range(0, len(positions), most)]


@dataclass(frozen=True)
class Share:
    """The part of some work that one of several processes does."""

    index: int
    count: int
    wait: Callable[[], object]
    """Returns when all have done theirs."""


IN_MEMORY = 2**31
"""Bytes of entries that are kept in memory; the others are read when they are asked for."""


class Entries:
    """Entries of a cache in the order of their keys, however many: what memory has no room for stays on disk."""

    def __init__(
        self, cache: TensorCache, keys: Sequence[str], compute: Callable[[list[int]], list[dict[str, Tensor]]]
    ) -> None:
        """Nothing is read yet.

        Args:
            cache: where they are.
            keys: of the entries.
            compute: what is called for one that is gone or cannot be written.
        """
        self.cache, self.keys, self.compute = cache, tuple(keys), compute
        self.left = IN_MEMORY
        self.kept: dict[int, dict[str, Tensor]] = {}

    @property
    def room(self) -> bool:
        """Whether memory can take more."""
        return self.left > 0

    @property
    def in_memory(self) -> bool:
        """Whether all are in memory: none will be read or computed any more."""
        return len(self.kept) == len(self)

    def take(self, i: int, entry: dict[str, Tensor] | None, new: bool = False) -> bool:
        """Keeps an entry while there is room; whether there is such an entry at all.

        Args:
            i: its position.
            entry: None when it has not been read.
            new: it was computed now, so it must be kept if it could not be written.
        """
        if entry is None:
            return not self.room and self.cache.holds(self.keys[i])
        if self.room or (new and not self.cache.holds(self.keys[i])):
            self.kept[i] = entry
            self.left -= sum(t.numel() * t.element_size() for t in entry.values())
        return True

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if (entry := self.kept.get(i)) is not None:
            return entry
        entry = self.cache.get(self.keys[i])
        if entry is None:
            (entry,) = self.compute([i])
            self.cache.put(self.keys[i], entry)
        self.take(i, entry, new=True)
        return entry

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))
