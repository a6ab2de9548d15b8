"""What the frozen parts of a model say about the data, computed once and kept on disk.

A cache keeps distributions, not draws: the VAE's mean and standard deviation, raw, so that each epoch draws fresh
latents. The key is the content (hash of the file or caption), the transform and the model's fingerprint: an entry is
never stale and never shared by two different models. Writes are atomic.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from visionlora.atomic import replace_file


def default_cache_folder() -> Path:
    """`$VISIONLORA_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("VISIONLORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "visionlora"


def key_of(*parts: str) -> str:
    """One file name for all that an entry depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class TensorCache:
    """Named tensors per key, one small safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None when there is none or it is broken (a broken entry is computed again)."""
        try:
            entry: dict[str, Tensor] = load_file(self.folder / f"{key}.safetensors")
            return entry
        except (FileNotFoundError, SafetensorError, OSError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry atomically; a cache that cannot be written is no reason to stop."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            content = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
            replace_file(self.folder / f"{key}.safetensors", content)

    def fill(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], list[dict[str, Tensor]]],
        batch: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[dict[str, Tensor]], int]:
        """Entries for all keys in order, and how many had to be computed.

        Args:
            keys: one per item.
            compute: from positions in `keys` to their entries; called with at most `batch` positions.
            batch: bounds the memory of computing.
            progress: called with (done, total).
        """
        found = {i: entry for i, key in enumerate(keys) if (entry := self.get(key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            for i, entry in zip(part, compute(part), strict=True):
                found[i] = entry
                self.put(keys[i], entry)
            if progress is not None:
                progress(start + len(part), len(missing))
        return [found[i] for i in range(len(keys))], len(missing)
