"""Decodes each picture of a data set once: checks it, hashes it and keeps its pixels on disk.

In: labelled pictures. Out: `Checked`, the same without what cannot be used, with a hash of each file, a perceptual hash
and a thumbnail of each picture, and its pixels as the backbone wants them; or one error that lists all there is to fix.

On disk there is one file of pixels per data set and preprocessing, named by the content of all pictures, so that it is
never stale; what is known of each file is kept too (`visionlora.data.facts`).

Letters in shapes: n pictures, s side of a stored picture.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from visionlora.data.cache import key_of
from visionlora.data.facts import Fact, FactsOfFolder
from visionlora.data.images import decode_again
from visionlora.data.labelled import LabelledData
from visionlora.data.pixels import Keeper, keeper_for, remove_leftovers
from visionlora.data.preprocess import Preprocessing
from visionlora.data.wording import count_of, first_names, left_out, problem_report, remedy
from visionlora.errors import DataError

_VERSION = "2"  # of the pixels; a new number makes old files unused
_THREADS = 4


@dataclass(frozen=True)
class Checked:
    """A data set every picture of which has been decoded."""

    data: LabelledData
    """Without what was left out."""
    sha256: tuple[str, ...]
    """Of each file's bytes, in hex."""
    hashes: npt.NDArray[np.uint64]
    """Perceptual, (n,)."""
    thumbnails: npt.NDArray[np.uint8]
    """(n, 16, 16, 3)."""
    pictures: Pictures
    notes: tuple[str, ...]
    """What a person should know, one line each; without those of the data."""


class Pictures:
    """The pictures of a data set as squares before the centre crop, from disk or decoded when asked for."""

    def __init__(
        self, paths: Sequence[Path], preprocessing: Preprocessing, kept: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """Takes the files, and their pixels (n, s, s, 3) where these are kept."""
        self.paths = tuple(paths)
        self.preprocessing = preprocessing
        self._kept = kept
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def on_disk(self) -> bool:
        """Whether the pixels come from one file on disk."""
        return self._kept is not None

    def stored(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The pictures at these positions, uint8 (n, s, s, 3); an array of its own.

        Raises:
            DataError: when a file that is decoded anew can no longer be read.
        """
        at = np.asarray(indices, dtype=np.int64)
        if self._kept is not None:
            return np.take(self._kept, at, axis=0)
        side = self.preprocessing.stored_size
        out = np.empty((len(at), side, side, 3), np.uint8)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "pictures")
        for i, square in enumerate(self._pool.map(self._decoded, at.tolist())):
            out[i] = square
        return out

    def _decoded(self, index: int) -> npt.NDArray[np.uint8]:
        return self.preprocessing.stored(decode_again(self.paths[index]))


def check_pictures(
    data: LabelledData,
    preprocessing: Preprocessing,
    cache: Path | None,
    *,
    cache_limit: int = 4 << 30,
    skip_broken: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Decodes every picture that is not known yet, and keeps the pixels on disk.

    Args:
        data: the pictures.
        preprocessing: to what they are made.
        cache: a folder; without it pictures are decoded whenever they are asked for.
        cache_limit: the most bytes of pixels to keep; above it, likewise.
        skip_broken: leave out what cannot be decoded (and say so in the notes) instead of raising.
        progress: called with (pictures decoded, pictures to decode); not at all when all is known.

    Raises:
        DataError: pictures that cannot be decoded, a class that has none left, or pictures that are in two classes.
    """
    if cache is not None:
        remove_leftovers(cache)
    # pixels may differ in the last bit between versions of Pillow
    made_as = key_of(_VERSION, PIL.__version__, json.dumps(preprocessing.to_dict(), sort_keys=True))
    keeper, why_not = keeper_for(len(data.items), preprocessing, made_as, cache, cache_limit)
    known = FactsOfFolder(cache, data.root, [item.path for item in data.items])
    facts = {i: fact for i, item in enumerate(data.items) if (fact := known.of(item.path)) is not None}
    try:
        problems = _look_at_all(data, known, facts, keeper, progress)
        good = sorted(facts)
        notes = _judged(data, facts, problems, skip_broken)
        checked = replace(data, items=tuple(data.items[i] for i in good))
        sha256 = {i: facts[i].sha256 for i in good}
        files = {i: (data.items[i].path, facts[i].stamp) for i in good}
        kept = keeper.finish(key_of(made_as, *sha256.values()), files, sha256, progress)
    finally:
        keeper.close()
    why_not = why_not or keeper.failed
    if kept is None and why_not:
        notes.append(f"pictures are decoded anew each time they are used: {why_not}")
    return Checked(
        checked,
        tuple(facts[i].sha256 for i in good),
        np.array([facts[i].hash for i in good], dtype=np.uint64),
        np.stack([facts[i].thumbnail for i in good]),
        Pictures([item.path for item in checked.items], preprocessing, kept),
        tuple(notes),
    )


def _look_at_all(
    data: LabelledData,
    known: FactsOfFolder,
    facts: dict[int, Fact],
    keeper: Keeper,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Adds what is missing to `facts` and its pixels to the keeper; returns the problems of the other pictures."""
    unknown = [i for i in range(len(data.items)) if i not in facts]
    problems: list[str] = []
    with known:
        for done, i in enumerate(unknown, 1):
            try:
                facts[i], decoded = known.look(data.items[i].path, data.name_of(i))
            except DataError as error:
                problems.append(str(error))
            else:
                keeper.add(i, keeper.preprocessing.stored(decoded.image))
            if progress is not None:
                progress(done, len(unknown))
    return problems


# What is wrong, and what to say.


def _judged(data: LabelledData, facts: Mapping[int, Fact], broken: Sequence[str], skip_broken: bool) -> list[str]:
    """Notes on the pictures; raises when they cannot be used."""
    classes = Counter(c for i in facts for c in data.items[i].labels)
    fatal = [
        f'class "{name}" has no picture left; add some, or remove the class'
        for c, name in enumerate(data.classes)
        if facts and not classes[c]
    ]
    same: dict[str, list[int]] = {}
    for i in sorted(facts):
        same.setdefault(facts[i].sha256, []).append(i)
    notes = []
    copies = 0
    for positions in same.values():
        copies += len(positions) - 1
        first = positions[0]
        for other in positions[1:]:
            if data.items[other].labels == data.items[first].labels:
                continue
            pair = [f"{data.name_of(i)} ({_classes(data, i)})" for i in (first, other)]
            if data.multi_label:
                notes.append(f"the same picture with different labels: {first_names(pair)}")
            else:
                fatal.append(f"{first_names([pair[0]])} and {first_names([pair[1]])} are the same picture; remove one")
    if fatal or (broken and not skip_broken) or not facts:
        ending = remedy(len(facts), fatal=bool(fatal), skippable=bool(broken))
        raise DataError(problem_report(data.root, [*broken, *fatal], ending))
    converted: dict[str, list[str]] = {}
    for i in sorted(facts):
        if facts[i].note:
            converted.setdefault(facts[i].note, []).append(data.name_of(i))
    notes = [f"{note}: {first_names(names)}" for note, names in converted.items()] + notes
    if copies:
        notes.append(
            f"{count_of(copies, 'picture is', 'pictures are')} an exact copy of another of the same class"
            + ("" if any(item.split for item in data.items) else "; copies stay on one side of a split")
        )
    return notes + left_out(broken)


def _classes(data: LabelledData, i: int) -> str:
    return ", ".join(data.classes[c] for c in data.items[i].labels) or "no label"
