"""Labels from tables: CSV, JSON lines, parquet, and the metadata files of a folder.

No picture is opened here; those that a parquet table holds are written to the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from visionlora.data.files import Listing, Names, Unusable, is_hidden, list_folder
from visionlora.data.images import printable
from visionlora.data.labelled import Found, Row, Wanted, cleaned, split_folders, split_of, top_of
from visionlora.data.parquet import unpack
from visionlora.data.tables import Table, read_table, text_of, truth_of
from visionlora.data.wording import ENDINGS, Meant, count_of, first_names, quoted
from visionlora.errors import ConfigError, DataError

PATH_COLUMNS = ("path", "file_name", "filename", "file", "image", "image_path")
"""Names by which the column of picture paths is found, in order of precedence."""
LABEL_COLUMNS = ("label", "class", "category", "target", "label_name")
"""Names by which the column of labels is found, in order of precedence."""
SPLIT_COLUMNS = ("split", "subset", "set")
"""Names by which the column of splits is found, in order of precedence."""

GROUP_COLUMNS = ("group", "group_id", "patient", "patient_id", "subject", "subject_id")
"""Columns that look like groups; they are used when they are named, else pointed out."""

OWN_PICTURE = "the picture of the row"
"""A column of the files to which the pictures of a parquet table were written."""


def from_table(root: Path, path: Path, wanted: Wanted, *, everything: bool) -> Found:
    """What one table says of the pictures below `root`; of `everything` there, or of what it names alone."""
    table = read_table(path)
    if not everything and wanted.path is None and table.embedded and table.guess(PATH_COLUMNS) is None:
        return _from_rows(path, table, wanted)
    if everything:
        return from_tables(root, {"": table}, wanted, list_folder(root))
    # A table may lie in a large folder next to the one that it is about: only what it names is listed.
    column = _path_column(table, wanted)
    names = [row[column].replace("\\", "/") for _, row in table.rows if isinstance(row.get(column), str)]
    tops = {PurePosixPath(_relative(root, name)).parts[:1] for name in names}
    return from_tables(root, {"": table}, wanted, list_folder(root, {top for parts in tops for top in parts}))


def _from_rows(path: Path, table: Table, wanted: Wanted) -> Found:
    """What a parquet table says of the pictures that it holds, which are written to the cache as files."""
    unpacked = unpack({table.shown: path})
    files = {int(name.rpartition(" ")[2]): file for name, file in unpacked.pictures.items()}
    if not files:
        raise DataError(f"{unpacked.problems[0] if unpacked.problems else f'{table.shown} has no rows'}.")
    rows = [(line, {**cells, OWN_PICTURE: files[line].name}) for line, cells in table.rows if line in files]
    told = Table(table.shown, [*table.columns, OWN_PICTURE], rows, unpacked.problems)
    root, listing = next(iter(files.values())).parent, Listing(pictures=sorted(file.name for file in files.values()))
    return from_tables(root, {"": told}, replace(wanted, path=OWN_PICTURE), listing)


def from_tables(root: Path, tables: Mapping[str, Table], wanted: Wanted, listing: Listing) -> Found:
    """What tables say of the pictures of a listing; each by the place that its paths are relative to."""
    found = Found(root, multi_label=bool(wanted.labels))
    pictures, others = Names(listing.pictures), frozenset(listing.others)
    absent: list[tuple[str, str]] = []
    seen: dict[str, tuple[str, Row]] = {}
    doubles: list[str] = []
    sources, split_sources = [], []
    for place, table in tables.items():
        found.skippable += table.problems
        path_column = _path_column(table, wanted)
        label_columns = _label_columns(table, wanted)
        group_column = table.given(wanted.group, "group_column") if wanted.group else None
        split_column = _split_column(table, wanted, found)
        like = None if group_column or split_column else _like_groups(table)
        if like is not None and like not in label_columns:
            found.notes.append(
                f'the column "{printable(like)}" is not used; group_column={printable(like)} keeps pictures that share its '
                "value on one side of the split"
            )
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
                group = cleaned(text_of(cells.get(group_column), group_column)) or None if group_column else None
                name = _name(cells.get(path_column), path_column, root, place)
                if name in others:
                    raise Unusable(f"names {printable(name)}, which is no picture; {ENDINGS}")
            except Unusable as error:
                found.skippable.append(f"{where} {error}")
                continue
            if (picture := pictures.find(name)) is None:
                absent.append((where, name))
                continue
            name, row = picture, Row(picture, labels, split, group)
            if name not in seen:
                seen[name] = where, row
            elif row == seen[name][1]:
                doubles.append(name)
            else:
                found.fatal.append(_contradiction(row, where, *seen[name]))
    meant = Meant(listing.pictures)
    if absent and not seen:
        place, table = next(iter(tables.items()))
        raise DataError(
            f"None of the {count_of(len(absent), 'picture')} that {table.shown} names is there; the first is "
            f"{printable(absent[0][1])}, and paths are relative to {printable(root / place)}{_hint(meant, absent[0][1])}"
        )
    found.skippable += [
        f"{where} names {printable(name)}, which is not there{_hint(meant, name)}" for where, name in absent
    ]
    found.rows = [row for _, row in seen.values()]
    found.source = f"labels from the {' and the '.join(sources)}"
    if not split_sources:
        split_sources += _splits_by_folder(found)
    if split_sources:
        found.source += f", splits from {' and '.join(dict.fromkeys(split_sources))}"
    if doubles:
        found.notes.append(f"listed more than once, with the same label: {first_names(dict.fromkeys(doubles))}")
    if wanted.group and (alone := [row.name for row in found.rows if row.group is None]):
        found.notes.append(
            f"{count_of(len(alone), 'picture has', 'pictures have')} no group, so that {'it' if len(alone) == 1 else 'each'} "
            f"may be on any side: {first_names(alone)}"
        )
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
    split = split_of(text)
    if split is None:
        given = f'"{printable(text)}"' if text.strip() else "nothing"
        raise Unusable(f'has {given} in "{printable(column)}"; allowed are train, val and test')
    return split


def _splits_by_folder(found: Found) -> list[str]:
    """Gives rows the splits that their folders are called by, where all are; says where they come from."""
    splits = split_folders(row.name for row in found.rows)
    if splits and all("/" in row.name for row in found.rows):
        found.rows = [Row(r.name, r.labels, splits[top_of(r.name)], r.group) for r in found.rows]
        return [f"the folders {first_names(sorted(splits))}"]
    tops = {top_of(row.name): split_of(top_of(row.name)) for row in found.rows if "/" in row.name}
    if "train" in tops.values() and not {"val", "test"}.isdisjoint(tops.values()):
        outside = next(row.name for row in found.rows if tops.get(top_of(row.name)) is None)
        found.notes.append(
            f"the folders {first_names(sorted(top for top, split in tops.items() if split))} are not taken as splits: rows "
            f"also name pictures outside them, e.g. {printable(outside)}"
        )
    return []


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


def _contradiction(row: Row, where: str, before_where: str, before: Row) -> str:
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


def _hint(meant: Meant, name: str) -> str:
    close = meant.by(name)
    return f"; did you mean {printable(close)}?" if close else ""


# Columns.


def _path_column(table: Table, wanted: Wanted) -> str:
    if wanted.path is not None:
        return table.given(wanted.path, "path_column")
    if (column := table.guess(PATH_COLUMNS)) is None:
        text = f"{table.shown} has no column of picture paths (it has {quoted(table.columns)}); "
        if table.embedded:
            text += f"for pictures in {quoted(table.embedded)}, give the table itself as --images; "
        raise DataError(f'{text}name it with path_column=NAME, or call it "path".')
    return column


def _label_columns(table: Table, wanted: Wanted) -> list[str]:
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


def _like_groups(table: Table) -> str | None:
    """A column that seems to name groups: several pictures share some of its values, but not all."""
    column = table.guess(GROUP_COLUMNS)
    values = [str(cells.get(column or "")) for _, cells in table.rows]
    return column if 1 < len(set(values)) < len(values) else None


def _split_column(table: Table, wanted: Wanted, found: Found) -> str | None:
    if wanted.split is not None:
        column: str | None = table.given(wanted.split, "split_column")
    elif (column := table.guess(SPLIT_COLUMNS)) is None:
        return None
    values = {value if isinstance(value := cells.get(column or ""), str) else "" for _, cells in table.rows}
    splits = {split_of(value) for value in values}
    if wanted.split is None and (None in splits or "train" not in splits):
        # "set" can mean many things; only a column that was asked for must hold splits.
        found.notes.append(f'the column "{printable(column or "")}" is not used: it does not name train, val and test')
        return None
    if "train" not in splits:
        found.fatal.append(
            f'no row is in train by the column "{printable(column or "")}"; allowed are train, val, test'
        )
    return column
