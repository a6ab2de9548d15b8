"""The decoded pixels of a data set in one file on disk, written as they come and read by mapping it.

Letters in shapes: n pictures, s side of a stored picture.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from visionlora.data.images import decode_again, printable
from visionlora.data.preprocess import Preprocessing
from visionlora.errors import DataError

if sys.platform != "win32":
    import fcntl

Stamp = tuple[int, int]
"""Size and time of the last change, ns: a file that has both unchanged is taken to be the same."""


def stamp_of(path: Path) -> Stamp:
    """Size and time of change; of a file that is not there, what no file has."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def check_unchanged(path: Path, shown: str, stamp: Stamp) -> None:
    """Pixels must never be kept under the hash of other content."""
    if stamp_of(path) != stamp:
        raise DataError(f"{shown} was changed while it was read; start again when it is complete")


def keeper_for(n: int, preprocessing: Preprocessing, cache: Path | None, limit: int) -> tuple[Keeper, str]:
    """Where pixels go, and if they go nowhere, why."""
    need = n * preprocessing.stored_size**2 * 3
    reason = ""
    if cache is None:
        reason = "no cache folder is used"
    elif need > limit:
        reason = f"kept on disk they would take {need / 1e9:.1f} GB, more than the limit of {limit / 1e9:.1f} GB"
    return Keeper(None if reason else cache, preprocessing), reason


class Keeper:
    """Writes pixels to a temporary file as they come, which becomes the kept file when all are there in order."""

    def __init__(self, folder: Path | None, preprocessing: Preprocessing) -> None:
        self.folder = folder
        self.preprocessing = preprocessing
        self.rows: list[int] = []
        """The picture of each row that was written."""
        self.failed = ""
        self._writer: Writer | None = None

    def add(self, i: int, square: npt.NDArray[np.uint8]) -> None:
        """Keeps the square of picture `i`."""
        if self.folder is None or self.failed:
            return
        try:
            if self._writer is None:
                self._writer = Writer(self.folder, "new", self.preprocessing.stored_size)
            self._writer.add(square)
            self.rows.append(i)
        except OSError as error:
            self._fail(error)

    def finish(
        self, key: str, files: Mapping[int, tuple[Path, Stamp]], progress: Callable[[int, int], None] | None
    ) -> npt.NDArray[np.uint8] | None:
        """The pixels of all pictures in order, or None where they are not kept.

        Args:
            key: of these pictures.
            files: position -> file and its stamp, in order; what was not added is decoded.
            progress: see `check_pictures`.
        """
        if self.folder is None or self.failed:
            return None
        final = self.folder / f"pictures-{key}.npy"
        if (kept := self._open(final, len(files))) is not None:
            return kept
        try:
            if self._writer is not None and self.rows == list(files):
                self._writer.finish(final)
            else:
                self._gather(final, files, progress)
        except OSError as error:
            self._fail(error)
            return None
        if (kept := self._open(final, len(files))) is None:
            self.failed = f"{final} cannot be read"
        return kept

    def close(self) -> None:
        """Removes what is temporary."""
        if self._writer is not None:
            self._writer.remove()

    def _gather(
        self,
        final: Path,
        files: Mapping[int, tuple[Path, Stamp]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Writes the file anew from what was added and, for all others, from the pictures."""
        added = self._writer.rows() if self._writer is not None else None
        row_of = {i: row for row, i in enumerate(self.rows)}
        total, done = sum(i not in row_of for i in files), 0
        writer = Writer(final.parent, "all", self.preprocessing.stored_size)
        try:
            for i, (path, stamp) in files.items():
                if added is not None and i in row_of:
                    writer.add(added[row_of[i]])
                    continue
                writer.add(self.preprocessing.stored(decode_again(path)))
                check_unchanged(path, printable(path), stamp)
                done += 1
                if progress is not None:
                    progress(done, total)
            writer.finish(final)
        finally:
            writer.remove()

    def _open(self, path: Path, n: int) -> npt.NDArray[np.uint8] | None:
        side = self.preprocessing.stored_size
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return np.asarray(array) if array.shape == (n, side, side, 3) and array.dtype == np.uint8 else None

    def _fail(self, error: OSError) -> None:
        self.failed = f"{self.folder} cannot be written ({error.strerror or error})"
        self.close()


def remove_leftovers(folder: Path) -> None:
    """Removes the files of writers that were killed, which may be large; a living one holds a lock on its file."""
    for path in folder.glob(".pictures.*.tmp"):
        with contextlib.suppress(OSError):
            with path.open("r+b") as file:
                locked(file)
            path.unlink()


def locked(file: IO[bytes]) -> None:
    """Locks a file until it is closed or the process ends.

    Raises:
        OSError: when another has locked it, or the disk knows no locks.
    """
    if sys.platform != "win32":  # there a file that is open cannot be removed anyway
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Writer:
    """A .npy file that grows picture by picture; its length is filled in at the end."""

    def __init__(self, folder: Path, name: str, side: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f".pictures.{name}.{os.getpid()}.{id(self):x}.tmp"
        self.side, self.n = side, 0
        self.file = self.path.open("w+b", buffering=1 << 20)
        with contextlib.suppress(OSError):
            locked(self.file)  # see remove_leftovers
        self._head()

    def add(self, square: npt.NDArray[np.uint8]) -> None:
        """Appends one picture, (s, s, 3)."""
        self.file.write(np.ascontiguousarray(square).tobytes())
        self.n += 1

    def rows(self) -> npt.NDArray[np.uint8]:
        """What was written so far."""
        self._complete()
        array: npt.NDArray[np.uint8] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array

    def finish(self, final: Path) -> None:
        """Puts the complete file in its place."""
        self._complete()
        os.fsync(self.file.fileno())
        self.file.close()
        self.path.replace(final)

    def remove(self) -> None:
        """Removes the file, if it was not finished."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _complete(self) -> None:
        self.file.seek(0)
        self._head()  # as long as at first: NumPy leaves room for the first axis to grow
        self.file.flush()

    def _head(self) -> None:
        shape = (self.n, self.side, self.side, 3)
        np.lib.format.write_array_header_1_0(self.file, {"descr": "|u1", "fortran_order": False, "shape": shape})
