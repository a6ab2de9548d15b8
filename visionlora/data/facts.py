"""What a look at each picture of a folder has shown, kept on disk: unchanged files (same size and times) are not read again.

In: a file. Out: a `Fact`, from before or from decoding it now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import TracebackType
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from visionlora.atomic import replace_file
from visionlora.data.alike import looks_of
from visionlora.data.cache import key_of
from visionlora.data.files import sha256_of
from visionlora.data.images import Decoded, decode_noted, printable
from visionlora.data.masks import Box
from visionlora.data.pixels import Stamp, check_unchanged, stamp_of

_VERSION = "7"  # of what is kept; a new number makes old files unused


@dataclass(frozen=True)
class MaskFact:
    """What is known of the mask of a picture, which has been checked together with it."""

    place: str
    """Where its file really lies; empty where it is the alpha channel of the picture."""
    stamp: Stamp
    sha256: str
    """Of the file's bytes, in hex."""
    learned: Box
    """Where it is not black."""


@dataclass(frozen=True)
class Fact:
    """What is known of one file."""

    stamp: Stamp
    """By which the file is known to be unchanged."""
    sha256: str
    """Of its bytes, in hex."""
    hash: int
    """Perceptual."""
    thumbnail: npt.NDArray[np.uint8]
    size: tuple[int, int]
    """Height and width of the upright picture, px."""
    note: str
    """What was converted; empty where the file was plain."""
    rule: str
    """See `images.Decoded`."""
    mask: MaskFact | None = None
    """The last that it had."""


class FactsOfFolder:
    """The facts of the pictures of one folder. As a context it writes in the end, also when a person interrupts."""

    def __init__(self, cache: Path | None, root: Path, paths: Sequence[Path]) -> None:
        """Reads what is known.

        Args:
            cache: the folder to keep them in; without it nothing is known, or kept.
            root: the folder of the pictures, or their table.
            paths: the pictures.
        """
        self.file = cache / f"facts-{key_of(_VERSION, str(root.resolve()))}.npz" if cache else None
        self._place = dict(zip(paths, _places(paths), strict=True))
        self._known = _read(self.file) if self.file else {}
        self._new = False

    def of(self, path: Path) -> Fact | None:
        """What is known of a file that has not changed since."""
        fact = self._known.get(self._place[path])
        return fact if fact is not None and fact.stamp == stamp_of(path) else None

    def look(self, path: Path, shown: str) -> tuple[Fact, Decoded]:
        """Reads a file: what is to be known of it, and the picture.

        Raises:
            DataError: when it cannot be decoded, or was changed meanwhile.
        """
        stamp = stamp_of(path)
        decoded = decode_noted(path, shown=shown)
        sha256 = sha256_of(path)
        check_unchanged(path, printable(shown), stamp)
        height, width = decoded.image.size[::-1]
        fact = Fact(stamp, sha256, *looks_of(decoded.image), (height, width), decoded.note or "", decoded.rule)
        self._known[self._place[path]], self._new = fact, True
        return fact, decoded

    def mask_of(self, path: Path, mask: Path) -> MaskFact | None:
        """What is known of the mask of a picture, if neither file has changed since; its alpha channel has the same path."""
        fact = self.of(path)
        known = None if fact is None else fact.mask
        return known if known and (known.place, known.stamp) == (_place_of(path, mask), stamp_of(mask)) else None

    def add_mask(self, path: Path, mask: Path, stamp: Stamp, learned: Box) -> MaskFact:
        """Keeps what a mask has shown, with the picture that was looked at.

        Args:
            path: of the picture.
            mask: its file.
            stamp: of the file before it was read.
            learned: where it is not black.

        Raises:
            DataError: when it was changed meanwhile.
        """
        fact = self._known[self._place[path]]
        found = MaskFact(_place_of(path, mask), stamp, fact.sha256 if mask == path else sha256_of(mask), learned)
        check_unchanged(mask, printable(mask), stamp)
        self._known[self._place[path]] = replace(fact, mask=found)
        return found

    def __enter__(self) -> FactsOfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None and self._new:
            _write(self.file, {place: self._known[place] for place in self._place.values() if place in self._known})


def _place_of(path: Path, mask: Path) -> str:
    return "" if mask == path else os.path.realpath(mask)


def _places(paths: Sequence[Path]) -> list[str]:
    """Where each file really lies; of folders each is resolved once."""
    folders: dict[Path, str] = {}
    places = []
    for path in paths:
        parent = path.parent
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        place = os.path.join(folders[parent], path.name)  # noqa: PTH118 - a Path each is slow for 50,000 files
        places.append(os.path.realpath(place) if path.is_symlink() else place)
    return places


def _read(path: Path) -> dict[str, Fact]:
    """By place; nothing when the file is missing or broken."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            places, notes, rules, masks = (_lines(file[name]) for name in ("places", "notes", "rules", "masks"))
            stamps, sizes, hashes = (file[name].tolist() for name in ("stamps", "sizes", "hashes"))
            columns = (stamps, file["sha256"], hashes, file["thumbnails"], sizes, notes, rules, map(_mask, masks))
        return {
            place: Fact((bytes_, time, changed), sha.tobytes().hex(), value, small, (height, width), note, rule, mask)
            for place, (bytes_, time, changed), sha, value, small, (height, width), note, rule, mask in zip(
                places, *columns, strict=True
            )
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return {}


def _write(path: Path, facts: Mapping[str, Fact]) -> None:
    """A cache that cannot be written is no reason to stop."""
    if not facts:
        return
    values = list(facts.values())
    content = io.BytesIO()
    np.savez(
        content,
        places=_blob(facts),
        notes=_blob(fact.note for fact in values),
        rules=_blob(fact.rule for fact in values),
        masks=_blob(json.dumps(astuple(fact.mask)) if fact.mask else "" for fact in values),
        stamps=np.array([fact.stamp for fact in values], np.int64),
        sizes=np.array([fact.size for fact in values], np.int32),
        sha256=np.frombuffer(bytes.fromhex("".join(fact.sha256 for fact in values)), np.uint8).reshape(-1, 32),
        hashes=np.array([fact.hash for fact in values], np.uint64),
        thumbnails=np.stack([fact.thumbnail for fact in values]),
    )
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())


def _mask(line: str) -> MaskFact | None:
    if not line:
        return None
    place, stamp, sha256, learned = json.loads(line)
    return MaskFact(place, tuple(stamp), sha256, tuple(learned))


def _blob(texts: Iterable[str]) -> npt.NDArray[np.uint8]:
    # File names may hold any byte but zero, line breaks among them.
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _lines(blob: npt.NDArray[np.uint8]) -> list[str]:
    return blob.tobytes().decode("utf-8", "surrogateescape").split("\0")
