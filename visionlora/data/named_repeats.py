"""Folders whose names say how often their pictures count: `10_sks dog`, as kohya's trainer has them.

In: the names of pictures. Out: repeats and captions by folder; or nothing, where the folders are called otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from visionlora.data.images import legible, printable
from visionlora.data.labelled import top_of
from visionlora.data.wording import first_names

_NAME = re.compile(r"([1-9]\d*)_(.*\w.*)")  # not numbers that only keep an order (01_front)
_YEARS = range(1900, 2100)  # 2023_holiday
_MOST = 9999  # longer ones are dates and ids
_MAX_NAMED = 5


@dataclass(frozen=True)
class NamedRepeats:
    """What the names of folders say."""

    repeats: Mapping[str, int]
    """Top folder -> how often each of its pictures counts; empty where the folders are called otherwise."""
    words: Mapping[str, str]
    """Top folder -> the caption of its pictures that have none of their own."""
    left_aside: tuple[str, ...] = ()
    """Top folders from which kohya's trainer would read it, and here nothing is."""
    why: str = ""
    """Why not, and when to do what."""

    def of(self, picture: str) -> int | None:
        """How often a picture counts, if its folder says it."""
        return self.repeats.get(top_of(picture))

    def captions(self, pictures: Iterable[str]) -> dict[str, str]:
        """The captions of these pictures by their folders; none where the folders are called otherwise."""
        return {name: words for name in pictures if (words := self.words.get(top_of(name)))}

    def notes(self) -> list[str]:
        """What was made of the names, where they say anything."""
        if self.left_aside:
            return [
                f"kohya reads a number of repeats from {first_names(self.left_aside)}; here the pictures count alike, as "
                f"{self.why} give folders, each with its repeats"
            ]
        if not self.repeats:
            return []
        shown = [f"{printable(top)} ({count} x)" for top, count in list(self.repeats.items())[:_MAX_NAMED]]
        more = f" and {len(self.repeats) - _MAX_NAMED:,} more" if len(self.repeats) > _MAX_NAMED else ""
        return [
            f"as kohya reads them, folders say how often their pictures count: {', '.join(shown)}{more}; rename them where "
            "that is not meant"
        ]


def named(folder: str) -> tuple[int, str] | None:
    """How often the pictures of a folder count by its name, and what is on them; None where it is called otherwise.

    >>> named("10_sks dog"), named("2023_holiday")
    ((10, 'sks dog'), None)
    """
    match = _NAME.fullmatch(folder)
    if match is None or len(match[1]) > len(str(_MOST)) or int(match[1]) in _YEARS:
        return None
    return int(match[1]), legible(match[2]).strip()


def named_repeats(pictures: Iterable[str]) -> NamedRepeats:
    """Reads the names of the top folders; all must say it, and no picture may lie outside them."""
    names = list(pictures)
    tops = sorted({top_of(name) for name in names if "/" in name})
    read = {top: said for top in tops if (said := named(top)) is not None}
    inside = all("/" in name for name in names)
    if tops and not read and inside and all(map(_NAME.fullmatch, tops)):
        return NamedRepeats(
            {}, {}, tuple(tops), f"years and numbers above {_MOST:,} are not taken so. Where they are meant,"
        )
    if len(read) < len(tops) or not inside:
        return NamedRepeats({}, {}, tuple(read), "others are in folders that are called otherwise. Name all so, or")
    return NamedRepeats(
        {top: count for top, (count, _) in read.items()}, {top: words for top, (_, words) in read.items()}
    )
