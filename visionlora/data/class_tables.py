"""Labels from tables: CSV, JSON lines, parquet, and the metadata files of a folder.

No picture is opened here; those that a parquet table holds are written to the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from visionlora.data.files import Listing, Names, Unusable, is_hidden, list_folder, suffix_of, without_suffix
from visionlora.data.images import IMAGE_SUFFIXES, printable
from visionlora.data.labelled import Found, Row, Wanted, cleaned, split_folders, split_of, top_of, used_files
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

ID_COLUMNS = ("image_id", "image_name", "picture", "img", "id_code", "id")
"""Columns that may name pictures, in order of precedence; they are used when they are named, else pointed out."""

GROUP_COLUMNS = ("group", "group_id", "patient", "patient_id", "subject", "subject_id")
"""Columns that look like groups; they are used when they are named, else pointed out."""

MISSING = ("nan", "NaN", "<NA>")
"""What pandas writes where a label is missing, in text that it made of it."""

OWN_PICTURE = "the picture of the row"
"""A column of the files to which the pictures of a parquet table were written."""


def from_table(
    root: Path,
    path: Path,
    wanted: Wanted,
    *,
    everything: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """What one table says of the pictures below `root`; of `everything` there, or of what it names alone."""
    table = read_table(path)
    if everything:
        return from_tables(root, {"": table}, wanted, list_folder(root))
    if _holds_pictures(table, wanted.path):
        return _from_rows(path, {table.shown: path}, wanted, progress, {table.shown: None})
    return from_tables(root, {"": table}, wanted, _listed(root, table, _path_column(table, wanted.path)))


def from_shards(
    root: Path, names: Sequence[str], wanted: Wanted, progress: Callable[[int, int], None] | None = None
) -> Found:
    """What parquet files of a folder say of the pictures that they hold; where one is named train, names say the splits.

    Args:
        root: the folder.
        names: of the files, relative to it.
        wanted: the columns that were asked for.
        progress: see `unpack`.
    """
    splits, notes = used_files(names)
    found = _from_rows(root, {name: root / name for name in splits}, wanted, progress, splits)
    found.notes += notes
    return found


def _from_rows(
    given: Path,
    files: Mapping[str, Path],
    wanted: Wanted,
    progress: Callable[[int, int], None] | None,
    splits: Mapping[str, str | None],
) -> Found:
    """What parquet tables say of the pictures that they hold, which are written to the cache as files.

    Args:
        given: what messages call the whole.
        files: name for messages -> table.
        wanted: the columns that were asked for.
        progress: see `unpack`.
        splits: by the same names, all None where names say none; a column of splits comes first.
    """
    tables: dict[str, Table] = {}
    shown: dict[str, str] = {}
    split_by: dict[str, str | None] = {}
    root, problems, notes = given, [], []
    for name, path in files.items():
        unpacked = unpack({name: path}, progress=progress)
        if not unpacked.pictures:
            problems += unpacked.problems or [f"{printable(name)} has no rows"]
            continue
        folder = next(iter(unpacked.pictures.values())).parent
        root, place = folder.parent, f"{folder.name}/"
        if place in tables:
            notes.append(f"the same as {tables[place].shown}, used once: {printable(name)}")
            continue
        own = {int(row.rpartition(" ")[2]): file for row, file in unpacked.pictures.items()}
        table = read_table(path, name)
        rows = [(line, {**cells, OWN_PICTURE: own[line].name}) for line, cells in table.rows if line in own]
        tables[place] = Table(table.shown, [*table.columns, OWN_PICTURE], rows, unpacked.problems, table.embedded)
        shown |= {place + file.name: row for row, file in unpacked.pictures.items()}
        split_by[place] = splits[name]
    if not tables:
        raise DataError(f"{problems[0]}.")
    found = from_tables(root, tables, replace(wanted, path=OWN_PICTURE), Listing(pictures=sorted(shown)))
    by_name = any(splits.values()) and all(row.split is None for row in found.rows)
    found.rows = [
        replace(row, shown=shown[row.name], split=split_by[f"{top_of(row.name)}/"] if by_name else row.split)
        for row in found.rows
    ]
    if by_name:
        found.source += ", splits from the names of the files"
    found.skippable[:0], found.notes[:0], found.given = problems, notes, given
    return found


def pictures_of(
    path: Path, path_column: str | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[list[tuple[str, Path]], list[str]]:
    """The pictures of a table, in the order of its rows; labels in it are passed over.

    Args:
        path: of a table that names pictures, relative to its own folder, or of a parquet table that holds them.
        path_column: of the pictures' paths; found by its name when not given.
        progress: see `unpack`.

    Returns:
        Name for messages and file of each; and each row that gives none as one line for a person.

    Raises:
        DataError: when it names pictures, and none of them is there.
    """
    table = read_table(path)
    if _holds_pictures(table, path_column):
        unpacked = unpack({table.shown: path}, progress=progress)
        return list(unpacked.pictures.items()), unpacked.problems
    root, column = path.parent, _path_column(table, path_column, "--path-column NAME")
    there = _Pictures(root, _listed(root, table, column))
    found, problems, absent = [], list(table.problems), []
    for line, cells in table.rows:
        where = f"{table.shown} line {line}"
        try:
            name = there.named(cells, column)
        except Unusable as error:
            problems.append(f"{where} {error}")
            continue
        if (picture := there.find(name)) is None:
            absent.append(name)
            problems.append(f"{where} {there.absent(name)}")
        else:
            found.append((printable(root / picture), root / picture))
    if absent and not found:
        raise DataError(f"{_none_there(table, absent, root)}, where the table is{there.hint(absent[0])}")
    return found, problems


def _holds_pictures(table: Table, path_column: str | None) -> bool:
    """Whether the pictures are in a table itself: it has no column of their paths."""
    return path_column is None and bool(table.embedded) and table.guess(PATH_COLUMNS) is None


def _listed(root: Path, table: Table, column: str) -> Listing:
    """What lies in the folders that a table names: it may lie in a large one next to that which it is about."""
    written = (_written(row.get(column)) for _, row in table.rows)
    names = [text.replace("\\", "/") for text in written if text]
    tops = {PurePosixPath(_relative(root, name)).parts[:1] for name in names}
    return list_folder(root, {top for parts in tops for top in parts})


def from_tables(root: Path, tables: Mapping[str, Table], wanted: Wanted, listing: Listing) -> Found:
    """What tables say of the pictures of a listing; each by the place that its paths are relative to."""
    found = Found(root, multi_label=bool(wanted.labels))
    there, told = _Pictures(root, listing), _Told()
    sources: dict[tuple[str, ...], list[str]] = {}
    split_sources = []
    for place, table in tables.items():
        columns = _columns(table, wanted, found)
        sources.setdefault(columns.labels, []).append(table.shown)
        if columns.split:
            split_sources.append(f'the column "{printable(columns.split)}"')
        _read_rows(place, table, columns, there, told, found)
    if told.absent and not told.rows:
        place, table = next(iter(tables.items()))
        names = [name for _, name in told.absent]
        name = names[0]
        hint = f"; from {printable(above)} they are there: give that folder" if (above := _above(root, name)) else ""
        raise DataError(_none_there(table, names, root / place) + (hint or there.hint(name)))
    found.skippable += [f"{where} {there.absent(name)}" for where, name in told.absent]
    found.rows = [row for _, row in told.rows.values()]
    told_by = (
        f"{'columns' if len(names) > 1 else 'column'} {quoted(names)} of {first_names(of)}"
        for names, of in sources.items()
    )
    found.source = f"labels from the {' and the '.join(told_by)}"
    if not split_sources:
        split_sources += _splits_by_folder(found)
    if split_sources:
        found.source += f", splits from {' and '.join(dict.fromkeys(split_sources))}"
    found.notes += _notes(told, wanted, found, listing)
    return found


def _none_there(table: Table, names: Sequence[str], place: Path) -> str:
    """What to say of a table all of whose pictures are missing from the place that its paths are relative to."""
    return (
        f"None of the {count_of(len(names), 'picture')} that {table.shown} names is there; the first is "
        f"{printable(names[0])}, and paths are relative to {printable(place)}"
    )


@dataclass(frozen=True)
class _Columns:
    """The names of the columns that are read of a table."""

    path: str
    labels: tuple[str, ...]
    group: str | None
    split: str | None


class _Pictures:
    """The pictures of a listing, as rows of tables name them."""

    def __init__(self, root: Path, listing: Listing) -> None:
        self.root, self.others = root, frozenset(listing.others)
        self.names = Names(listing.pictures)
        self.meant = Meant(listing.pictures)

    @cached_property
    def _bare(self) -> tuple[Names, dict[str, str]]:
        """The names without their endings, of pictures that are the only one of theirs."""
        count = Counter(map(without_suffix, self.names.exact))
        found = {bare: name for name in self.names.exact if count[bare := without_suffix(name)] == 1}
        return Names(found), found

    def find(self, name: str) -> str | None:
        """The picture of a name; its ending may be left out where one picture alone is called so."""
        if (exact := self.names.find(name)) is not None or suffix_of(name) in IMAGE_SUFFIXES:
            return exact
        names, found = self._bare
        return found[bare] if (bare := names.find(name)) is not None else None

    def named(self, cells: Mapping[str, Any], column: str, place: str = "") -> str:
        """The picture that a row means, as a posix path relative to the root; it may not be there.

        Raises:
            Unusable: when the cell is no path, or that of something else.
        """
        value = cells.get(column)
        name = _name(value, column, self.root, place)
        if (as_written := f"{PurePosixPath(place) / str(value)}") in self.names.exact:  # with spaces around
            return as_written
        if name in self.others:
            raise Unusable(f"names {printable(name)}, which is no picture; {ENDINGS}")
        return name

    def absent(self, name: str) -> str:
        """What to say of a row that names this."""
        return f"names {printable(name)}, which is not there{self.hint(name)}"

    def hint(self, name: str) -> str:
        """Which one was probably meant; empty where none is close."""
        close = self.meant.by(name)
        return f"; did you mean {printable(close)}?" if close else ""


@dataclass
class _Told:
    """What the rows of all tables have said."""

    rows: dict[str, tuple[str, Row]] = field(default_factory=dict)
    """By picture: where it was named first, and what it said."""
    doubles: list[str] = field(default_factory=list)
    absent: list[tuple[str, str]] = field(default_factory=list)
    """Where pictures are named that are not there, and their names."""


def _columns(table: Table, wanted: Wanted, found: Found) -> _Columns:
    """Which columns are read of a table; adds notes on others that look like groups or splits."""
    path, labels = _path_column(table, wanted.path), tuple(_label_columns(table, wanted))
    group = table.given(wanted.group, "group_column") if wanted.group else None
    split = _split_column(table, wanted, found)
    like = None if group or split else _like_groups(table)
    if like is not None and like not in labels:
        found.notes.append(
            f'the column "{printable(like)}" is not used; group_column={printable(like)} keeps pictures that share its '
            "value on one side of the split"
        )
    if wanted.labels:
        found.classes |= dict.fromkeys(labels)
    return _Columns(path, labels, group, split)


def _read_rows(place: str, table: Table, columns: _Columns, there: _Pictures, told: _Told, found: Found) -> None:
    """Adds what the rows of a table say, and what is wrong with them."""
    found.skippable += table.problems
    if not table.rows:
        found.fatal.append(f"{table.shown} has no rows; add one line for each picture")
    for line, cells in table.rows:
        where = f"{table.shown} line {line}"
        try:
            labels = _labels(cells, columns.labels, multi=found.multi_label)
            if not found.multi_label:
                found.classes[labels[0]] = None
            split = _split(cells, columns.split) if columns.split else None
            group = cleaned(text_of(cells.get(columns.group), columns.group)) or None if columns.group else None
            name = there.named(cells, columns.path, place)
        except Unusable as error:
            found.skippable.append(f"{where} {error}")
            continue
        if (picture := there.find(name)) is None:
            told.absent.append((where, name))
            continue
        row = Row(picture, labels, split, group)
        if picture not in told.rows:
            told.rows[picture] = where, row
        elif row == told.rows[picture][1]:
            told.doubles.append(picture)
        else:
            found.fatal.append(_contradiction(row, where, *told.rows[picture]))


def _notes(told: _Told, wanted: Wanted, found: Found, listing: Listing) -> Iterator[str]:
    """What a person should know of rows that can be used, and of pictures that none names."""
    if told.doubles:
        yield f"listed more than once, with the same label: {first_names(dict.fromkeys(told.doubles))}"
    if wanted.group and (alone := [row.name for row in found.rows if row.group is None]):
        yield (
            f"{count_of(len(alone), 'picture has', 'pictures have')} no group, so that {'it' if len(alone) == 1 else 'each'} "
            f"may be on any side: {first_names(alone)}"
        )
    unnamed = [name for name in listing.pictures if name not in told.rows]
    if unnamed and wanted.path != OWN_PICTURE:
        yield f"left out, no row names {count_of(len(unnamed), 'picture')} of the folder: {first_names(unnamed)}"
    joined = [name for name in found.classes if ";" in name or "|" in name]
    if joined and not found.multi_label:
        yield (
            f'{count_of(len(joined), "label")} such as "{printable(joined[0])}" may be several in one; each is taken as '
            "one class; for several labels a picture, make a column of 0 and 1 for each class and name them with "
            "label_columns=[A,B]"
        )
    for name in MISSING:
        if count := sum(row.labels == (name,) for row in found.rows) if not found.multi_label else 0:
            yield (
                f'"{name}" is a class here, of {count_of(count, "picture")}; it is also how pandas writes a label that is '
                "missing: remove such rows if that is what it is"
            )


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
        found.rows = [replace(row, split=splits[top_of(row.name)]) for row in found.rows]
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
    if not (text := _written(value).strip()):
        raise Unusable(f'names no picture in "{printable(column)}"; write its path there, or remove the row')
    given = text.replace("\\", "/")  # as Windows programs write it
    name = _relative(root, given)
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).anchor or ".." in path.parts:
        raise Unusable(f"names {printable(text)}, which leaves {printable(root)}; use a path inside it")
    if any(is_hidden(part) for part in path.parts):
        raise Unusable(f"names {printable(text)}, which is hidden; rename it to use it")
    return path.as_posix() if name != given else (PurePosixPath(place) / path).as_posix()


def _written(value: Any) -> str:
    """The name of a picture in a cell, which may be a number; empty where there is none."""
    return text_of(value, "") if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def _above(root: Path, name: str) -> Path | None:
    """The folder above the root, where the picture of a row is to be found from there."""
    above = root.parent
    return above if "/" in name and above != root and (above / name).is_file() else None


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


# Columns.


def _path_column(table: Table, given: str | None, option: str = "path_column=NAME") -> str:
    if given is not None:
        return table.given(given, "path_column")
    if (column := table.guess(PATH_COLUMNS)) is None:
        text = f"{table.shown} has no column of picture paths (it has {quoted(table.columns)}); "
        if table.embedded:
            text += f"for pictures in {quoted(table.embedded)}, give the table itself as --images; "
        like = table.guess(ID_COLUMNS) or "NAME"
        raise DataError(f'{text}name it with {option.replace("NAME", like)}, or call it "path".')
    return column


def _label_columns(table: Table, wanted: Wanted) -> list[str]:
    if wanted.labels:
        if len(set(wanted.labels)) < len(wanted.labels):
            raise ConfigError(f"label_columns names a column twice: {first_names(wanted.labels)}.")
        parts = [part.strip() for part in wanted.labels[0].split(",")]
        if len(wanted.labels) == 1 < len(parts) and set(parts) <= set(table.columns):
            raise ConfigError(f"label_columns: several are written in brackets: label_columns=[{','.join(parts)}].")
        return [table.given(name, "label_columns") for name in wanted.labels]
    if wanted.label is not None:
        return [table.given(wanted.label, "label_column")]
    if (column := table.guess(LABEL_COLUMNS)) is None:
        there = quoted([name for name in table.columns if name != OWN_PICTURE])
        if table.embedded:
            there += f"; {quoted(table.embedded)} {'holds' if len(table.embedded) == 1 else 'hold'} no plain values"
        raise DataError(
            f"{table.shown} has no column of labels (it has {there}); name it with "
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
    doubtful = "train" not in splits or splits.isdisjoint(("val", "test"))
    if wanted.split is None and doubtful and (None in splits or "train" not in splits):
        # "set" can mean many things; where train stands beside val or test, other words are mistakes.
        found.notes.append(f'the column "{printable(column or "")}" is not used: it does not name train, val and test')
        return None
    if "train" not in splits:
        found.fatal.append(
            f'no row is in train by the column "{printable(column or "")}"; allowed are train, val, test'
        )
    return column
