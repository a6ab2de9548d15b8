"""Named adapters kept in memory up to a limit, for whoever serves pictures: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from visionlora.errors import ConfigError, nearest
from visionlora.loaders import load_adapter
from visionlora.lora.adapter import Adapter


def bytes_of(adapter: Adapter) -> int:
    """Memory of an adapter's tensors."""
    tensors = [t for m in adapter.modules.values() for t in m.tensors.values()]
    tensors += [v for parts in adapter.embeddings.values() for v in parts.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


class AdapterPool:
    """Adapters by name, read when they are first asked for.

    What is kept does not follow its file: `add` under the same name reads it anew. Safe for several threads.

    Args:
        files: {name: file or folder}, or a folder whose files are named by their stems.
        limit: bytes that may be kept; one larger adapter is given out and not kept.

    Raises:
        ConfigError: when the limit is not positive or the folder is none.
    """

    def __init__(self, files: dict[str, str | Path] | str | Path, limit: int = 2 << 30) -> None:
        if not isinstance(limit, (int, float)) or not limit >= 1:
            raise ConfigError(f"limit is {limit!r}; it must be a positive number of bytes, such as 2 << 30.")
        if isinstance(files, dict):
            self.files = {name: Path(path) for name, path in files.items()}
        else:
            folder = Path(files).expanduser()
            if not folder.is_dir():
                raise ConfigError(f"{folder} is not a folder of adapters.")
            self.files = {p.stem: p for p in sorted(folder.glob("*.safetensors"))}
        self.limit = limit
        self.used = 0
        """Bytes kept at present."""
        self._kept: OrderedDict[str, tuple[Adapter, int]] = OrderedDict()
        self._changes: dict[str, int] = {}
        """How often `add` has named a file, by name; the same path may be added again once its bytes are others."""
        self._lock = Lock()

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    @property
    def kept(self) -> list[str]:
        """What is in memory, the least recently used first."""
        return list(self._kept)

    def add(self, name: str, path: str | Path) -> None:
        """Makes a file known, or another one under a name that is known."""
        with self._lock:
            self.files[name] = Path(path)
            self._changes[name] = self._changes.get(name, 0) + 1
            self._drop(name)

    def get(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            ConfigError: when there is none of this name.
            AdapterFileError: when its file cannot be read.
        """
        while True:
            with self._lock:
                if name in self._kept:
                    self._kept.move_to_end(name)
                    return self._kept[name][0]
                path, changes = self.files.get(name), self._changes.get(name, 0)
            if path is None:
                raise ConfigError(
                    f"There is no adapter {name!r}. {nearest(name, self.files) if self.files else 'There are none.'}"
                )
            adapter = load_adapter(path)
            size = bytes_of(adapter)
            with self._lock:
                if self._changes.get(name, 0) != changes:  # `add` came in between: this is the old file
                    continue
                self._drop(name)
                if size <= self.limit:
                    self._kept[name] = (adapter, size)
                    self.used += size
                    while self.used > self.limit:
                        self._drop(next(iter(self._kept)))
            return adapter

    def _drop(self, name: str) -> None:
        if name in self._kept:
            self.used -= self._kept.pop(name)[1]
