"""The decoded pixels of a data set in one file on disk, written as they come and read by mapping it.

The file is NumPy's .npy, and after the array it says of which pictures its rows are: where some are added to a data set, or
taken away, the others are copied from the file before.
Letters in shapes: n pictures, s side of a stored picture.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from visionlora.data.images import decode_again, printable
from visionlora.data.preprocess import Preprocessing
from visionlora.errors import DataError

if sys.platform != "win32":
    import fcntl

END = b"vl-rows1"
"""The last bytes of a file that says what its rows are: before them 32 bytes of SHA-256 per row, and 16 of how they were
made."""

Stamp = tuple[int, int, int]
"""Size, and times of the last change of content and of inode, ns: a file that has all unchanged is taken to be the same.

The second time cannot be set back: another file of the same size and date (`cp -p`, `rsync -t`) is seen to be another. On
Windows it is that of creation.
"""


def stamp_of(path: Path) -> Stamp:
    """Size and times of change; of a file that is not there, what no file has."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_unchanged(path: Path, shown: str, stamp: Stamp) -> None:
    """Pixels must never be kept under the hash of other content."""
    if stamp_of(path) != stamp:
        raise DataError(f"{shown} was changed while it was read; start again when it is complete")


def keeper_for(
    n: int, preprocessing: Preprocessing, made_as: str, cache: Path | None, limit: int
) -> tuple[Keeper, str]:
    """Where pixels go, and if they go nowhere, why; see `Keeper`."""
    need = n * preprocessing.stored_size**2 * 3
    reason = ""
    if cache is None:
        reason = "no cache folder is used"
    elif need > limit:
        reason = f"kept on disk they would take {need / 1e9:.1f} GB, more than the limit of {limit / 1e9:.1f} GB"
    return Keeper(None if reason else cache, preprocessing, made_as), reason


class Keeper:
    """Writes pixels to a temporary file as they come, which becomes the kept file when all are there in order."""

    def __init__(self, folder: Path | None, preprocessing: Preprocessing, made_as: str) -> None:
        """Nothing is kept yet.

        Args:
            folder: of the kept files; None to keep nothing.
            preprocessing: to what the pictures are made.
            made_as: a key of everything but the pictures that pixels depend on, 32 hex digits.
        """
        self.folder = folder
        self.preprocessing = preprocessing
        self.made_as = bytes.fromhex(made_as)
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
        self,
        key: str,
        files: Mapping[int, tuple[Path, Stamp]],
        sha256: Mapping[int, str],
        progress: Callable[[int, int], None] | None,
    ) -> npt.NDArray[np.uint8] | None:
        """The pixels of all pictures in order, or None where they are not kept.

        Args:
            key: of these pictures.
            files: position -> file and its stamp, in order; what was not added, and is in no other file, is decoded.
            sha256: of each of them, in hex.
            progress: see `check_pictures`.
        """
        if self.folder is None or self.failed:
            return None
        final = self.folder / f"pictures-{key}.npy"
        if (kept := self._open(final, len(files))) is not None:
            return kept
        try:
            if self._writer is not None and self.rows == list(files):
                self._writer.finish(final, self._rows_of(sha256[i] for i in files))
            else:
                self._gather(final, files, sha256, progress)
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
        sha256: Mapping[int, str],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Writes the file anew from what was added, from other files and, for all others, from the pictures."""
        added = self._writer.rows() if self._writer is not None else None
        row_of = {i: row for row, i in enumerate(self.rows)}
        before = self._rows_before({sha256[i] for i in files if i not in row_of}, final.parent)
        total, done = sum(i not in row_of and sha256[i] not in before for i in files), 0
        writer = Writer(final.parent, "all", self.preprocessing.stored_size)
        try:
            for i, (path, stamp) in files.items():
                if added is not None and i in row_of:
                    writer.add(added[row_of[i]])
                    continue
                if sha256[i] in before:
                    array, row = before[sha256[i]]
                    writer.add(array[row])
                    continue
                writer.add(self.preprocessing.stored(decode_again(path)))
                check_unchanged(path, printable(path), stamp)
                done += 1
                if progress is not None:
                    progress(done, total)
            writer.finish(final, self._rows_of(sha256[i] for i in files))
        finally:
            writer.remove()

    def _rows_of(self, sha256: Iterable[str]) -> bytes:
        """What stands after the array."""
        return b"".join(bytes.fromhex(digest) for digest in sha256) + self.made_as + END

    def _rows_before(self, wanted: set[str], folder: Path) -> dict[str, tuple[npt.NDArray[np.uint8], int]]:
        """Of the pictures that other kept files have: the file's array and the row, by SHA-256."""
        found: dict[str, tuple[npt.NDArray[np.uint8], int]] = {}
        for path in folder.glob("pictures-*.npy"):
            if len(found) == len(wanted):
                break
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(-min(len(self.made_as) + len(END), path.stat().st_size), os.SEEK_END)
                if file.read() != self.made_as + END:
                    continue
                array = self._open(path)
                if array is None or (n := len(array)) == 0:
                    continue
                file.seek(-(32 * n + len(self.made_as) + len(END)), os.SEEK_END)
                digests = file.read(32 * n)
                for row in range(n):
                    if (digest := digests[32 * row : 32 * row + 32].hex()) in wanted:
                        found.setdefault(digest, (array, row))
        return found

    def _open(self, path: Path, n: int | None = None) -> npt.NDArray[np.uint8] | None:
        side = self.preprocessing.stored_size
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        right = array.shape[1:] == (side, side, 3) and array.dtype == np.uint8 and n in (None, len(array))
        return np.asarray(array) if right else None

    def _fail(self, error: OSError) -> None:
        self.failed = f"{self.folder} cannot be written ({error.strerror or error})"
        self.close()


def remove_leftovers(folder: Path) -> None:
    """Removes the files of writers that were killed, which may be large; a living one holds a lock on its file."""
    for path in folder.glob(".pictures.*.tmp"):
        if not is_locked(path):
            with contextlib.suppress(OSError):
                path.unlink()


def is_locked(path: Path) -> bool:
    """Whether a writer has locked a file, or that cannot be told."""
    try:
        with path.open("r+b") as file:
            locked(file)
    except OSError:
        return True
    return False


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

    def finish(self, final: Path, more: bytes) -> None:
        """Puts the complete file, with `more` after the array, in its place."""
        self._complete()
        self.file.seek(0, os.SEEK_END)
        self.file.write(more)
        self.file.flush()
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
