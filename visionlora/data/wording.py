"""What messages on data sets are made of: counts, lists of names, reports of many problems.

In: what was found. Out: words for a person, in which every name is safe to print. `--skip-broken` is the option of this
name on the command line.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from visionlora.data.files import Listing, suffix_of
from visionlora.data.images import IMAGE_SUFFIXES, printable

MAX_LINES = 20
"""The most problems that one message lists."""
ENDINGS = f"pictures end in {', '.join(IMAGE_SUFFIXES)}"

_MAX_COMPARED = 2000  # names that a wrong one is compared with: difflib compares letter by letter
_MAX_NAMES = 10
_MAX_QUOTED = 8


def count_of(number: int, thing: str, things: str | None = None) -> str:
    """A number and its noun.

    >>> count_of(1, "class", "classes"), count_of(2000, "picture")
    ('1 class', '2,000 pictures')
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {things or thing + 's'}"


def first_names(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are.

    >>> first_names("abcdefghijklm")
    'a, b, c, d, e, f, g, h, i, j and 3 more'
    """
    return _first([printable(name) for name in names], _MAX_NAMES)


def quoted(names: Iterable[str]) -> str:
    """The first eight names in quotes, and how many more there are.

    >>> quoted(["path", "label"]), quoted([])
    ('"path", "label"', 'nothing')
    """
    return _first([f'"{printable(name)}"' for name in names], _MAX_QUOTED) or "nothing"


def _first(shown: Sequence[str], most: int) -> str:
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


# Many problems at once.


def problem_report(root: Path, problems: Sequence[str], ending: str) -> str:
    """One message for all problems of a data set: at most 20 of them, then what to do."""
    return problem_reports({root: problems}, ending)


def problem_reports(found: Mapping[Path, Sequence[str]], ending: str) -> str:
    """One message for all problems of several folders: at most 20 of each, then what to do."""
    lines = []
    for root, problems in found.items():
        lines.append(f"{printable(root)} has {count_of(len(problems), 'problem')}:")
        lines += [f"  {problem}" for problem in problems[:MAX_LINES]]
        if len(problems) > MAX_LINES:
            lines.append(f"  and {len(problems) - MAX_LINES:,} more")
    return "\n".join([*lines, ending])


def remedy(usable: int, *, fatal: bool = False, skippable: bool = True) -> str:
    """The ending of such a report.

    Args:
        usable: how many pictures have no problem.
        fatal: whether there are problems that --skip-broken does not pass over.
        skippable: whether there are problems that it does.
    """
    if not usable:
        return "Fix this first: no usable picture is left."
    if fatal:
        return "Fix this first." + (" --skip-broken passes over some of it, but not all." if skippable else "")
    go_on = f"pass --skip-broken to leave out what cannot be used and go on with {count_of(usable, 'picture')}."
    return f"Fix this, or {go_on}"


def left_out(problems: Sequence[str]) -> list[str]:
    """Notes on what was left out: at most 20, then one on the rest."""
    notes = [f"left out: {problem}" for problem in problems[:MAX_LINES]]
    return notes + ([f"left out: {len(problems) - MAX_LINES:,} more"] if len(problems) > MAX_LINES else [])


# What is not there.


class Meant:
    """What names that are not there were probably meant to be, among many that are.

    Only about as many as one message lists are compared letter by letter.
    """

    def __init__(self, existing: Iterable[str]) -> None:
        """Takes posix paths."""
        self.existing = existing
        self.left = MAX_LINES

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.existing)

    @cached_property
    def _by_name(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self._sorted:
            last = name.rsplit("/", 1)[-1].casefold()
            for key in (last, last.rsplit(".", 1)[0]):
                found.setdefault(key, name)
        return found

    def by(self, name: str) -> str | None:
        """The same name in another folder or case or with an ending, else similar letters.

        >>> Meant(["cat.png", "x/dog.png"]).by("Dog"), Meant(["dog-1.png"]).by("dog_1.png"), Meant(["cat.png"]).by("zzz")
        ('x/dog.png', 'dog-1.png', None)
        """
        if same := self._by_name.get(name.rsplit("/", 1)[-1].casefold()):
            return same
        if not self.left:
            return None
        self.left -= 1
        return next(iter(difflib.get_close_matches(name, self._sorted[:_MAX_COMPARED], n=1)), None)


def missing(path: Path, kind: str = "folder", suffixes: Collection[str] = ()) -> str:
    """Says that nothing is at `path`, and what was probably meant or what there is instead.

    Args:
        path: what was given.
        kind: what should be there.
        suffixes: endings of files of this kind; for a folder there are none.
    """
    first = path  # the first part of the path that is not there
    while not first.parent.exists():
        first = first.parent
    parent = first.parent
    things = ["folders", *([f"{kind}s"] if suffixes else [])]
    siblings = []
    if parent.is_dir():
        entries = (e for e in parent.iterdir() if not e.name.startswith("."))
        siblings = sorted(e.name for e in entries if e.is_dir() or e.suffix.lower() in suffixes)
    if close := difflib.get_close_matches(first.name, siblings, n=1):
        hint = f"did you mean {printable(parent / close[0])}?"
    elif siblings:
        hint = f"the {' and '.join(things)} in {printable(parent.resolve())} are {first_names(siblings)}."
    elif parent.is_dir():
        hint = f"{printable(parent.resolve())} has no {' or '.join(things)}."
    else:
        hint = f"{printable(parent)} is a file."
    return f"There is no {kind} {printable(path)}; {hint}"


def no_pictures(root: Path, listing: Listing, empty: str) -> str:
    """Says why a folder yields no pictures.

    Args:
        root: the folder.
        listing: what lies in it.
        empty: what to say of a folder without files; goes after its name.
    """
    shown = printable(root)
    if listing.problems:
        return f"{shown} holds no pictures that can be reached: {listing.problems[0]}."
    if listing.links and not listing.others:
        return f"{shown} holds only linked folders, which are not entered: {first_names(listing.links)}; copy them."
    if not listing.others:
        return f"{shown} {empty}"
    counts = Counter(suffix_of(name) or "without ending" for name in listing.others).most_common(5)
    found = ", ".join(f"{count:,} {printable(suffix)}" for suffix, count in counts)
    hint = " Export them as JPEG or PNG first." if listing.other_pictures() else ""
    return f"{shown} holds no pictures: found {found}, but {ENDINGS}.{hint}"


def beside_pictures(tables: Collection[str]) -> list[str]:
    """A note on parquet files that hold pictures of their own, and are not read where pictures lie beside them."""
    them = "it" if len(tables) == 1 else "them"
    return [f"not used, as there are pictures beside {them}: {first_names(tables)}"] if tables else []


def in_several_rows(pictures: int) -> list[str]:
    """A note on pictures that have several rows with different captions, if there are any."""
    if not pictures:
        return []
    rows = "in several rows with different captions: used once, with any of them each time"
    return [f"{count_of(pictures, 'picture')} {rows}"]


def not_entered(listing: Listing) -> list[str]:
    """Notes on linked folders, folders of runs, and pictures of kinds that cannot be read, if there are any."""
    kinds = {
        "linked folders are not entered": listing.links,
        "folders of runs are not entered": listing.runs,
        "export as JPEG or PNG to use": listing.other_pictures(),
    }
    return [f"left out, {why}: {first_names(names)}" for why, names in kinds.items() if names]
