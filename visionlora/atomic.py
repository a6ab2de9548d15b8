"""Files that are whole or not there: a reader sees the old content or the new, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from visionlora.errors import ConfigError


def replace_file(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Writes bytes in the way of `replacing`."""
    with replacing(path, previous) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, under a temporary name; in the end it is flushed to disk and renamed to `path`.

    Args:
        path: of the file.
        previous: where the content before is kept, when there was some; at every moment one of the two files is whole.

    Raises:
        OSError: with the name of the file, when it cannot be written; an older file of that name is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_full(error: OSError) -> bool:
    """Whether a disk failed and not a person: it is full, a limit is reached, or it is broken."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _keep(path: Path, previous: Path) -> None:
    """Gives a file a second name in place of what had it; where the disk knows no links, the name alone moves."""
    second = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        second.unlink(missing_ok=True)
        second.hardlink_to(path)
    except (OSError, NotImplementedError):
        path.replace(previous)
    else:
        second.replace(previous)


def sweep(*folders: Path) -> None:
    """Removes what `replace_file` leaves in folders when its process is killed in the middle; it may be large."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():
                    path.unlink(missing_ok=True)


_held: dict[Path, int] = {}
"""Folders that this process holds, with the descriptor that does."""


def hold(folder: Path) -> bool:
    """Takes a folder for this process alone, until `let_go` or the end of the process, however sudden.

    Returns:
        False when another living process has it. Where the system or disk knows no such locks, everyone gets it.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    place = folder.resolve()
    if place in _held:
        return True
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)
        return True
    _held[place] = descriptor
    return True


def let_go() -> None:
    """Gives back every folder that this process holds."""
    while _held:
        os.close(_held.popitem()[1])


def check_picture(path: Path, overwrite: bool = False) -> None:
    """Raises ConfigError when a PNG cannot be written there, before the work: by its name, or as something is there already."""
    if path.suffix.lower() != ".png":
        raise ConfigError(
            f"{path} does not end in .png, which is what is drawn: write {path.with_suffix('.png').name}."
        )
    check_new(path, overwrite)


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises ConfigError when something is there already and is not to be replaced."""
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; name another output, or replace it with --overwrite.")
