"""From a folder or a table to pictures with labels; no picture is opened here.

In: class folders (`root/<class>/...`, also below `train`, `val`, `test`), a folder with a `metadata.jsonl` or
`metadata.csv`, or a table of its own (CSV, JSONL, parquet). Out: a `LabelledData`; or one error that lists all there
is to fix. `--skip-broken` and `--table` in the messages are options, `label_column` and so on settings of the same names
on the command line.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from visionlora.data.captions import METADATA_FILES, SIDECAR_SUFFIXES
from visionlora.data.files import Listing, Unusable, is_hidden, list_folder, suffix_of
from visionlora.data.images import IMAGE_SUFFIXES, printable
from visionlora.data.tables import TABLE_SUFFIXES, Table, read_table, text_of, truth_of
from visionlora.data.wording import (
    ENDINGS,
    MAX_LINES,
    count_of,
    first_names,
    left_out,
    missing,
    no_pictures,
    other_pictures,
    problem_report,
    quoted,
    remedy,
)
from visionlora.errors import ConfigError, DataError

PATH_COLUMNS = ("path", "file_name", "filename", "file", "image", "image_path")
"""Names by which the column of picture paths is found, in order of precedence."""
LABEL_COLUMNS = ("label", "class", "category", "target", "label_name")
"""Names by which the column of labels is found, in order of precedence."""
SPLIT_COLUMNS = ("split", "subset", "set")
"""Names by which the column of splits is found, in order of precedence."""
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""How a split may be spelled, in any case -> what it is."""

_MAX_COMPARED = 2000  # difflib compares letter by letter


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


@dataclass(frozen=True)
class LabelledData:
    """The pictures of a data set, sorted by path, and the names of their classes."""

    root: Path
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
        path = self.items[i].path
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


@dataclass(frozen=True)
class _Wanted:
    """The columns that were asked for by name."""

    path: str | None
    label: str | None
    labels: tuple[str, ...]
    group: str | None
    split: str | None

    def options(self) -> list[str]:
        given = {
            "path_column": self.path,
            "label_column": self.label,
            "label_columns": self.labels,
            "group_column": self.group,
            "split_column": self.split,
        }
        return [option for option, value in given.items() if value]


@dataclass(frozen=True)
class _Row:
    name: str
    """Posix path relative to the root."""
    labels: tuple[str, ...]
    split: str | None = None
    group: str | None = None


@dataclass
class _Found:
    root: Path
    rows: list[_Row] = field(default_factory=list)
    classes: dict[str, None] = field(default_factory=dict)
    """As spelled in the data, also those of which no picture can be used; an ordered set."""
    skippable: list[str] = field(default_factory=list)
    """Problems that --skip-broken passes over by leaving something out."""
    fatal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    multi_label: bool = False
    source: str = ""


def read_labelled(
    path: Path,
    *,
    table: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    label_columns: tuple[str, ...] = (),
    group_column: str | None = None,
    split_column: str | None = None,
    skip_broken: bool = False,
) -> LabelledData:
    """Finds the pictures of a data set and their labels.

    Args:
        path: the folder of the pictures, or a table.
        table: names pictures (relative to `path`) and labels; without it, a metadata file in the folder does, else the
            names of the folders.
        path_column: of the pictures' paths; found by its name when not given, like the next.
        label_column: of the classes' names.
        label_columns: one column of 0 and 1 for each class; makes it a multi-label problem.
        group_column: of what must stay on one side of a split.
        split_column: of train, val and test.
        skip_broken: leave out what cannot be used (and say so in the notes) instead of raising.

    Raises:
        ConfigError: for a column that is not there, or options that contradict each other.
        DataError: everything that is wrong with the data, one line each.
    """
    wanted = _Wanted(path_column, label_column, tuple(label_columns), group_column, split_column)
    if wanted.label is not None and wanted.labels:
        raise ConfigError("label_column is for one label a picture, label_columns for several; pass one of the two.")
    root, table = _places(path.expanduser(), table.expanduser() if table else None)
    if table is not None:
        found = _from_table(root, table, wanted, everything=path.expanduser().is_dir())
    else:
        found = _from_folder(root, wanted)
    return _finished(found, skip_broken)


def natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """A key for sorting in which numbers count as numbers.

    >>> sorted(["10", "b", "2", "a10", "a9"], key=natural)
    ['2', '10', 'a9', 'a10', 'b']
    """
    parts = re.split(r"(\d{1,18})", name.casefold())
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


# From places to labels.


def _places(path: Path, table: Path | None) -> tuple[Path, Path | None]:
    """The folder of the pictures, and the table if one was named."""
    if path.is_dir():
        if table is not None and not table.is_file():
            raise DataError(missing(table, "table", TABLE_SUFFIXES))
        return path, table
    shown = printable(path)
    if not path.exists():
        named_table = path.suffix.lower() in TABLE_SUFFIXES
        raise DataError(missing(path, "table", TABLE_SUFFIXES) if named_table else missing(path))
    if table is not None:
        raise ConfigError(f"{shown} is a file; with --table, pass the folder that its paths are relative to.")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{shown} is one picture; pass the folder that holds the classes.")
    return path.parent, path


def _top(name: str) -> str:
    return name.split("/", 1)[0]


def _split_of(name: str) -> str | None:
    return SPLIT_NAMES.get(name.strip().casefold())


def _split_folders(names: Iterable[str]) -> dict[str, str] | None:
    """Top folder -> split, when all top folders of these pictures are splits and one of them is for training."""
    splits = {top: _split_of(top) for top in {_top(name) for name in names if "/" in name}}
    known = {top: split for top, split in splits.items() if split is not None}
    return known if len(known) == len(splits) and "train" in known.values() else None


# Labels from folders.


def _from_folder(root: Path, wanted: _Wanted) -> _Found:
    listing = list_folder(root)
    tables, unlabelled = _metadata(root, listing, wanted)
    if tables:
        found = _from_tables(root, tables, wanted, listing)
    elif options := wanted.options():
        raise ConfigError(
            f"{options[0]} is for tables, but {printable(root)} has no {' or '.join(METADATA_FILES)}; leave it out, or "
            "name the table with --table."
        )
    else:
        found = _from_class_folders(root, listing, unlabelled)
    found.skippable[:0] = listing.problems
    if listing.links:
        found.notes.append(f"left out, linked folders are not entered: {first_names(listing.links)}")
    found.notes += other_pictures(listing)
    return found


def _metadata(root: Path, listing: Listing, wanted: _Wanted) -> tuple[dict[str, Table], dict[str, list[str]]]:
    """The metadata files that hold labels, by their place; and the columns of those that hold none.

    A place is what their paths are relative to: "" for the root, or a split's folder in it with a slash at its end.
    """
    present = set(listing.others)
    places = ["", *(f"{name}/" for name in listing.folders if "/" not in name and _split_of(name))]
    tables: dict[str, Table] = {}
    unlabelled: dict[str, list[str]] = {}
    for place in places:
        if "" in tables:
            break  # there is one for all
        for name in (place + file for file in METADATA_FILES if place + file in present):
            table = read_table(root / name, name)
            if wanted.options() or table.guess(LABEL_COLUMNS):
                tables[place] = table
                break
            unlabelled[name] = table.columns
    return tables, unlabelled


def _from_class_folders(root: Path, listing: Listing, unlabelled: dict[str, list[str]]) -> _Found:
    pictures = listing.pictures
    if not pictures:
        empty = f"holds no pictures; put those of each class into a folder of its name ({ENDINGS})."
        raise DataError(no_pictures(root, listing, empty))
    splits = _split_folders(pictures) or {}
    depth = 2 if splits else 1
    found = _Found(root)
    strays = []
    for name in pictures:
        parts = name.split("/", depth)
        if len(parts) <= depth:
            strays.append(name)
        else:
            found.rows.append(_Row(name, (parts[-2],), splits.get(parts[0]) if splits else None))
    if not found.rows:
        raise DataError(_no_class_folders(root, strays, listing, unlabelled))
    for folder in listing.folders:
        if folder.count("/") == depth - 1 and (depth == 1 or _split_of(_top(folder))):
            found.classes[folder.rsplit("/", 1)[-1]] = None
    if len(found.classes) == 1 and (inner := _inner_folder(root, pictures)):
        raise DataError(
            f"{printable(root)} has only one class folder, {printable(inner.name)}, and that holds folders; did you mean "
            f"{printable(inner)}?"
        )
    if strays:
        found.skippable.append(
            f"{count_of(len(strays), 'picture lies', 'pictures lie')} in no class folder: {first_names(strays)}; move "
            "each into the folder of its class"
        )
    for name, columns in unlabelled.items():
        found.notes.append(f"{printable(name)} is not used: none of its columns is a label (it has {quoted(columns)})")
    found.source = "labels from the class folders"
    if splits:
        found.source += f", splits from the folders {first_names(sorted(splits))}"
    return found


def _inner_folder(root: Path, pictures: list[str]) -> Path | None:
    """The only folder in `root`, when it is itself a folder of classes, as archives often unpack."""
    parts = [name.split("/") for name in pictures]
    if len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 2 and len({p[1] for p in parts}) > 1:
        return root / parts[0][0]
    return None


def _no_class_folders(root: Path, strays: list[str], listing: Listing, unlabelled: dict[str, list[str]]) -> str:
    shown, where = printable(root), PurePosixPath(strays[0]).parent
    text = (
        f"{shown} holds {count_of(len(strays), 'picture')} but no class folders; put the pictures of each class into a "
        f"folder of its name ({printable(root / where / 'cat' / PurePosixPath(strays[0]).name)}), or name a table of "
        "labels with --table."
    )
    for name, columns in unlabelled.items():
        text += f" {printable(name)} has no column of labels (it has {quoted(columns)})."
    if unlabelled or any(suffix_of(name) in SIDECAR_SUFFIXES for name in listing.others):
        text += " Pictures with captions are for `visionlora train-sd`."
    return text


# Labels from tables.


def _from_table(root: Path, path: Path, wanted: _Wanted, *, everything: bool) -> _Found:
    table = read_table(path)
    if everything:
        return _from_tables(root, {"": table}, wanted, list_folder(root))
    # A table may lie in a large folder next to the one that it is about: only what it names is listed.
    column = _path_column(table, wanted)
    names = [row[column].replace("\\", "/") for _, row in table.rows if isinstance(row.get(column), str)]
    tops = {PurePosixPath(_relative(root, name)).parts[:1] for name in names}
    return _from_tables(root, {"": table}, wanted, list_folder(root, {top for parts in tops for top in parts}))


def _from_tables(root: Path, tables: Mapping[str, Table], wanted: _Wanted, listing: Listing) -> _Found:
    found = _Found(root, multi_label=bool(wanted.labels))
    pictures, others = frozenset(listing.pictures), frozenset(listing.others)
    absent: list[tuple[str, str]] = []
    seen: dict[str, tuple[str, _Row]] = {}
    doubles: list[str] = []
    sources, split_sources = [], []
    for place, table in tables.items():
        found.skippable += table.problems
        path_column = _path_column(table, wanted)
        label_columns = _label_columns(table, wanted)
        group_column = table.given(wanted.group, "group_column") if wanted.group else None
        split_column = _split_column(table, wanted, found)
        if split_column:
            split_sources.append(f'the column "{printable(split_column)}"')
        if wanted.labels:
            found.classes |= dict.fromkeys(label_columns)
        sources.append(f"{'columns' if len(label_columns) > 1 else 'column'} {quoted(label_columns)} of {table.shown}")
        if not table.rows:
            found.fatal.append(f"{table.shown} has no rows; add one line for each picture")
        for line, cells in table.rows:
            where = f"{table.shown} line {line}"
            try:
                labels = _labels(cells, label_columns, multi=found.multi_label)
                if not found.multi_label:
                    found.classes[labels[0]] = None
                split = _split(cells, split_column) if split_column else None
                group = text_of(cells.get(group_column), group_column) or None if group_column else None
                name = _name(cells.get(path_column), path_column, root, place)
                if name in others:
                    raise Unusable(f"names {printable(name)}, which is no picture; {ENDINGS}")
            except Unusable as error:
                found.skippable.append(f"{where} {error}")
                continue
            if name not in pictures:
                absent.append((where, name))
                continue
            row = _Row(name, labels, split, group)
            if name not in seen:
                seen[name] = where, row
            elif row == seen[name][1]:
                doubles.append(name)
            else:
                found.fatal.append(_contradiction(row, where, *seen[name]))
    # Only problems that are shown get a hint: each is compared with many names.
    hints = _hints([name for _, name in absent[:MAX_LINES]], listing.pictures)
    if absent and not seen:
        place, table = next(iter(tables.items()))
        raise DataError(
            f"None of the {count_of(len(absent), 'picture')} that {table.shown} names is there; the first is "
            f"{printable(absent[0][1])}, and paths are relative to {printable(root / place)}{hints[0]}"
        )
    for i, (where, name) in enumerate(absent):
        hint = hints[i] if i < len(hints) else ""
        found.skippable.append(f"{where} names {printable(name)}, which is not there{hint}")
    found.rows = [row for _, row in seen.values()]
    found.source = f"labels from the {' and the '.join(sources)}"
    splits = None if split_sources else _split_folders(row.name for row in found.rows)
    if splits and all("/" in row.name for row in found.rows):
        found.rows = [_Row(r.name, r.labels, splits[_top(r.name)], r.group) for r in found.rows]
        split_sources.append(f"the folders {first_names(sorted(splits))}")
    if split_sources:
        found.source += f", splits from {' and '.join(dict.fromkeys(split_sources))}"
    if doubles:
        found.notes.append(f"listed more than once, with the same label: {first_names(dict.fromkeys(doubles))}")
    unnamed = [name for name in listing.pictures if name not in seen]
    if unnamed:
        found.notes.append(
            f"left out, no row names {count_of(len(unnamed), 'picture')} of the folder: {first_names(unnamed)}"
        )
    joined = [name for name in found.classes if ";" in name or "|" in name]
    if joined and not found.multi_label:
        found.notes.append(
            f'{count_of(len(joined), "label")} such as "{printable(joined[0])}" may be several in one; each is taken as '
            "one class; for several labels a picture, make a column of 0 and 1 for each class and name them with "
            "label_columns=[A,B]"
        )
    return found


def _labels(cells: Mapping[str, Any], columns: Sequence[str], *, multi: bool) -> tuple[str, ...]:
    """The names of the classes that a row gives to its picture."""
    if multi:
        return tuple(column for column in columns if truth_of(cells.get(column), column))
    value = cells.get(columns[0])
    if isinstance(value, (list, tuple)):
        raise Unusable(
            f'has several values in "{printable(columns[0])}"; make a column of 0 and 1 for each class and name them with '
            "label_columns=[A,B]"
        )
    text = text_of(value, columns[0])
    if not text.strip():
        raise Unusable(f'has an empty "{printable(columns[0])}"; write the class there, or remove the row')
    return (text,)


def _split(cells: Mapping[str, Any], column: str) -> str:
    text = text_of(cells.get(column), column)
    split = _split_of(text)
    if split is None:
        given = f'"{printable(text)}"' if text.strip() else "nothing"
        raise Unusable(f'has {given} in "{printable(column)}"; allowed are train, val and test')
    return split


def _name(value: Any, column: str, root: Path, place: str) -> str:
    """The picture that a row means, as a posix path relative to the root."""
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f'names no picture in "{printable(column)}"; write its path there, or remove the row')
    text = value.strip()
    given = text.replace("\\", "/")  # as Windows programs write it
    name = _relative(root, given)
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).anchor or ".." in path.parts:
        raise Unusable(f"names {printable(text)}, which leaves {printable(root)}; use a path inside it")
    if any(is_hidden(part) for part in path.parts):
        raise Unusable(f"names {printable(text)}, which is hidden; rename it to use it")
    return path.as_posix() if name != given else (PurePosixPath(place) / path).as_posix()


def _relative(root: Path, name: str) -> str:
    """An absolute path inside the root without the root, all else as it is."""
    if not name.startswith("/") and not PureWindowsPath(name).drive:
        return name
    path = Path(name)
    for base in (root.absolute(), root.resolve()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return name


def _contradiction(row: _Row, where: str, before_where: str, before: _Row) -> str:
    line = before_where.rsplit(" ", 1)[-1]
    if row.labels != before.labels:
        what = f"labels {printable(row.name)} {quoted(row.labels)}, after {quoted(before.labels)} in line {line}"
    else:
        kind, now, then = next(
            (kind, now, then)
            for kind, now, then in (("split", row.split, before.split), ("group", row.group, before.group))
            if now != then
        )
        what = f'puts {printable(row.name)} into {kind} "{now}", after "{then}" in line {line}'
    return f"{where} {what}; keep one of the two"


def _hints(names: Iterable[str], pictures: list[str]) -> list[str]:
    """What each name was probably meant to be: a file of the same name elsewhere or with an ending, or a similar one."""
    by_name: dict[str, str] = {}
    for picture in pictures:
        last = picture.rsplit("/", 1)[-1].casefold()
        for key in (last, last.rsplit(".", 1)[0]):
            by_name.setdefault(key, picture)
    hints = []
    for name in names:
        close = by_name.get(name.rsplit("/", 1)[-1].casefold()) or next(
            iter(difflib.get_close_matches(name, pictures[:_MAX_COMPARED], n=1)), None
        )
        hints.append(f"; did you mean {printable(close)}?" if close else "")
    return hints


# Columns.


def _path_column(table: Table, wanted: _Wanted) -> str:
    if wanted.path is not None:
        return table.given(wanted.path, "path_column")
    if (column := table.guess(PATH_COLUMNS)) is None:
        text = f"{table.shown} has no column of picture paths (it has {quoted(table.columns)}); "
        if table.embedded:
            text += f"{quoted(table.embedded)} cannot be used: save the pictures as files and write their paths; "
        raise DataError(f'{text}name it with path_column=NAME, or call it "path".')
    return column


def _label_columns(table: Table, wanted: _Wanted) -> list[str]:
    if wanted.labels:
        if len(set(wanted.labels)) < len(wanted.labels):
            raise ConfigError(f"label_columns names a column twice: {first_names(wanted.labels)}.")
        return [table.given(name, "label_columns") for name in wanted.labels]
    if wanted.label is not None:
        return [table.given(wanted.label, "label_column")]
    if (column := table.guess(LABEL_COLUMNS)) is None:
        raise DataError(
            f"{table.shown} has no column of labels (it has {quoted(table.columns)}); name it with "
            'label_column=NAME, or call it "label"; for one column of 0 and 1 a class, name them with label_columns=[A,B].'
        )
    return [column]


def _split_column(table: Table, wanted: _Wanted, found: _Found) -> str | None:
    if wanted.split is not None:
        column: str | None = table.given(wanted.split, "split_column")
    elif (column := table.guess(SPLIT_COLUMNS)) is None:
        return None
    values = {value if isinstance(value := cells.get(column or ""), str) else "" for _, cells in table.rows}
    splits = {_split_of(value) for value in values}
    if wanted.split is None and (None in splits or "train" not in splits):
        # "set" can mean many things; only a column that was asked for must hold splits.
        found.notes.append(f'the column "{printable(column or "")}" is not used: it does not name train, val and test')
        return None
    if "train" not in splits:
        found.fatal.append(
            f'no row is in train by the column "{printable(column or "")}"; allowed are train, val, test'
        )
    return column


# From what was found to the result.


def _finished(found: _Found, skip_broken: bool) -> LabelledData:
    fatal, skippable, notes = list(found.fatal), list(found.skippable), list(found.notes)
    fatal += _name_clashes(found.classes)
    counts = Counter(label for row in found.rows for label in row.labels)
    empty = sorted((name for name in found.classes if not counts[name]), key=natural)
    skippable += [f'class "{printable(name)}" has no picture; add some, or remove the class' for name in empty]
    classes = {_clean(name): None for name in sorted(counts, key=lambda name: natural(_clean(name)))}
    if not found.multi_label and len(classes) == 1:
        fatal.append(
            f'all {count_of(len(found.rows), "picture")} are of one class, "{printable(next(iter(classes)))}"; add '
            "another class to tell apart"
        )
    if found.multi_label and not classes:
        fatal.append("no picture has any label")
    if found.multi_label and (always := [c for c in counts if counts[c] == len(found.rows)]):
        if len(found.classes) == 1:
            fatal.append(f"all pictures have the only label, {quoted(always)}; add pictures that do not")
        else:
            notes.append(f"every picture has the label {quoted(always)}")
    if not found.rows or fatal or (skippable and not skip_broken):
        ending = remedy(len(found.rows), fatal=bool(fatal), skippable=bool(skippable))
        raise DataError(problem_report(found.root, fatal + skippable, ending))
    place = {name: i for i, name in enumerate(classes)}
    items = tuple(
        LabelledItem(found.root / row.name, tuple(sorted(place[_clean(n)] for n in row.labels)), row.split, row.group)
        for row in sorted(found.rows, key=lambda row: row.name)
    )
    rare = [_clean(name) for name in counts if counts[name] == 1]
    if rare:
        notes.append(
            f"{count_of(len(rare), 'class has', 'classes have')} only one picture: "
            f"{first_names(sorted(rare, key=natural))}"
        )
    notes += left_out(skippable)
    return LabelledData(found.root, tuple(classes), items, found.multi_label, tuple(notes), found.source)


def _clean(name: str) -> str:
    """The name that a class goes by: composed letters, as macOS splits them, and no spaces around."""
    return unicodedata.normalize("NFC", name.strip())


def _name_clashes(names: Iterable[str]) -> Iterator[str]:
    """One line for each two classes that a person would take for one."""
    before: dict[str, str] = {}
    for name in sorted(names):
        clean = _clean(name)
        if not clean:
            yield "a class has a name of only spaces; rename it"
            continue
        other = before.setdefault(unicodedata.normalize("NFC", clean.casefold()), name)
        if other == name:
            continue
        if _clean(other) != clean:
            pair, reason = (quoted([other]), quoted([name])), "case"
        elif other.strip() != name.strip():
            # Both would look the same.
            pair, reason = (ascii(other), ascii(name)), "how accents are encoded (Unicode normal form)"
        else:
            pair, reason = (quoted([other]), quoted([name])), "the spaces around them"
        yield f"the class names {pair[0]} and {pair[1]} differ only in {reason}; give both the same name"
