"""Files that are whole or not there: a reader sees the old content or the new, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

from visionlora.errors import ConfigError


def replace_file(path: Path, content: bytes) -> None:
    """Writes under a temporary name, flushes to disk, then renames to `path`.

    Raises:
        OSError: when the file cannot be written; an older file of that name is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises ConfigError when something is there already and is not to be replaced."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; name another output, or replace it with --overwrite.")
