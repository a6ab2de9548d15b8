"""Pictures with labels, and what is gathered on the way to them: columns that were asked for, rows, problems, splits."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from visionlora.data.wording import first_names

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
"""How a split may be spelled, in any case -> what it is."""


@dataclass(frozen=True)
class LabelledItem:
    """One picture and what it shows."""

    path: Path
    labels: tuple[int, ...]
    """Positions in `LabelledData.classes`, ascending; exactly one unless `multi_label`, then any number."""
    split: str | None = None
    """train, val or test where the data says so; all items have one, or none."""
    group: str | None = None
    """What must stay on one side of a split, e.g. a patient."""
    name: str = ""
    """How messages call it where that is not its path: `train.parquet row 3`."""


@dataclass(frozen=True)
class LabelledData:
    """The pictures of a data set, sorted by path, and the names of their classes."""

    root: Path
    """Their folder, or the table that holds them."""
    classes: tuple[str, ...]
    """In natural order, from all of the data: a class that is missing in one split shifts nothing."""
    items: tuple[LabelledItem, ...]
    multi_label: bool
    notes: tuple[str, ...]
    """What a person should know, one line each."""
    source: str
    """One line: where the labels came from."""

    def name_of(self, i: int) -> str:
        """How messages name the picture at position `i`: by its path relative to the root, where it lies there."""
        if name := self.items[i].name:
            return name
        path = self.items[i].path
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


@dataclass(frozen=True)
class Wanted:
    """The columns that were asked for by name."""

    path: str | None
    label: str | None
    labels: tuple[str, ...]
    group: str | None
    split: str | None

    def options(self) -> list[str]:
        """The settings that name one."""
        given = {
            "path_column": self.path,
            "label_column": self.label,
            "label_columns": self.labels,
            "group_column": self.group,
            "split_column": self.split,
        }
        return [option for option, value in given.items() if value]


@dataclass(frozen=True)
class Row:
    """One picture of a table or a class folder."""

    name: str
    """Posix path relative to the root."""
    labels: tuple[str, ...]
    split: str | None = None
    group: str | None = None
    shown: str = ""
    """How messages call it, where that is not its name."""


@dataclass
class Found:
    """What a folder or a table holds, and all that is wrong with it."""

    root: Path
    """The folder that names are relative to."""
    given: Path | None = None
    """What a person knows it by, where that is not the root."""
    rows: list[Row] = field(default_factory=list)
    classes: dict[str, None] = field(default_factory=dict)
    """As spelled in the data, also those of which no picture can be used; an ordered set."""
    skippable: list[str] = field(default_factory=list)
    """Problems that --skip-broken passes over by leaving something out."""
    fatal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    multi_label: bool = False
    source: str = ""


def cleaned(name: str) -> str:
    """The name that a class or a group goes by: composed letters, as macOS splits them, and no spaces around."""
    return unicodedata.normalize("NFC", name.strip())


def top_of(name: str) -> str:
    """The first folder of a posix path."""
    return name.split("/", 1)[0]


def split_of(name: str) -> str | None:
    """train, val or test, however it is spelled; None for other words."""
    return SPLIT_NAMES.get(name.strip().casefold())


def split_in(name: str) -> str | None:
    """train, val or test as the name of a file says it, or else that of its folder, by the rules of Hugging Face's data sets.

    >>> [split_in(f"data/{name}.parquet") for name in ("train-00000-of-00002", "pets_Validation", "test/0000", "pets")]
    ['train', 'val', 'test', None]
    """
    path = PurePosixPath(name)
    for part in (path.stem, *reversed(path.parts[:-1])):
        found = {split for word in re.split(r"[^a-z]+", part.casefold()) if (split := split_of(word))}
        if len(found) == 1:
            return found.pop()
    return None


def used_files(names: Iterable[str], only: str | None = None) -> tuple[dict[str, str | None], list[str]]:
    """The files of pictures that are used, each with the split that its name says, and a note on the others, if there are any.

    Where no name says train, all are used, and say no split.

    Args:
        names: of the files.
        only: the split that is used; by default any.
    """
    splits = {name: split_in(name) for name in names}
    if "train" not in splits.values():
        return dict.fromkeys(splits), []
    used: dict[str, str | None] = {n: split for n, split in splits.items() if split and only in (None, split)}
    aside = [name for name in splits if name not in used]
    return used, [f"not used, as others are called train: {first_names(aside)}"] if aside else []


def split_folders(names: Iterable[str]) -> dict[str, str] | None:
    """Top folder -> split, when all top folders of these pictures are splits and one of them is for training."""
    splits = {top: split_of(top) for top in {top_of(name) for name in names if "/" in name}}
    known = {top: split for top, split in splits.items() if split is not None}
    return known if len(known) == len(splits) and "train" in known.values() else None


def splits_beside_others(names: Iterable[str]) -> dict[str, str] | None:
    """Likewise where other folders lie beside the splits: one for training that holds folders itself, and another split."""
    depths: dict[str, int] = {}
    for name in names:
        depths[top_of(name)] = max(name.count("/"), depths.get(top_of(name), 0))
    known = {top: split for top, depth in depths.items() if depth and (split := split_of(top)) is not None}
    trains = any(split == "train" and depths[top] > 1 for top, split in known.items())
    return known if trains and len(set(known.values())) > 1 else None
