"""From a folder or a table to pictures with labels; no picture is opened here.

In: class folders (`root/<class>/...`, also below `train`, `val`, `test`), a folder with a `metadata.jsonl` or
`metadata.csv`, one of parquet files that hold pictures, or a table of its own (CSV, JSONL, parquet). Out: a `LabelledData`;
or one error that lists all there is to fix. `--skip-broken` and `--table` in the messages are options, `label_column` and so
on settings of the same names on the command line.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from visionlora.config.reading import is_utf8
from visionlora.data.captions import METADATA_FILES, SIDECAR_SUFFIXES
from visionlora.data.class_tables import LABEL_COLUMNS, from_shards, from_table, from_tables
from visionlora.data.files import Listing, list_folder, suffix_of
from visionlora.data.images import IMAGE_SUFFIXES, printable
from visionlora.data.labelled import (
    Found,
    LabelledData,
    LabelledItem,
    Row,
    Wanted,
    cleaned,
    split_folders,
    split_of,
    splits_beside_others,
    top_of,
)
from visionlora.data.parquet import PARQUET
from visionlora.data.tables import TABLE_SUFFIXES, Table, read_table
from visionlora.data.wording import (
    ENDINGS,
    beside_pictures,
    count_of,
    first_names,
    left_out,
    missing,
    no_pictures,
    not_entered,
    problem_report,
    quoted,
    remedy,
)
from visionlora.errors import ConfigError, DataError


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
    progress: Callable[[int, int], None] | None = None,
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
        progress: called with (rows unpacked, rows of the file) for parquet files that hold pictures.

    Raises:
        ConfigError: for a column that is not there, or options that contradict each other.
        DataError: everything that is wrong with the data, one line each.
    """
    wanted = Wanted(path_column, label_column, tuple(label_columns), group_column, split_column)
    if wanted.label is not None and wanted.labels:
        raise ConfigError("label_column is for one label a picture, label_columns for several; pass one of the two.")
    root, table = _places(path.expanduser(), table.expanduser() if table else None)
    if table is not None:
        found = from_table(root, table, wanted, everything=path.expanduser().is_dir(), progress=progress)
    else:
        found = _from_folder(root, wanted, progress)
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


# Labels from folders.


def _from_folder(root: Path, wanted: Wanted, progress: Callable[[int, int], None] | None) -> Found:
    listing = list_folder(root)
    tables, unlabelled = _metadata(root, listing, wanted)
    shards = [name for name in listing.others if suffix_of(name) == PARQUET]
    if shards and not listing.pictures:
        found = from_shards(root, shards, wanted, progress)
    elif tables:
        found = from_tables(root, tables, wanted, listing)
    elif options := wanted.options():
        raise ConfigError(
            f"{options[0]} is for tables, but {printable(root)} has no {' or '.join(METADATA_FILES)}; leave it out, or "
            "name the table with --table."
        )
    else:
        found = _from_class_folders(root, listing, unlabelled)
    found.skippable[:0] = listing.problems
    if listing.pictures:
        found.notes += beside_pictures(shards)
    found.notes += not_entered(listing)
    return found


def _metadata(root: Path, listing: Listing, wanted: Wanted) -> tuple[dict[str, Table], dict[str, list[str]]]:
    """The metadata files that hold labels, by their place; and the columns of those that hold none.

    A place is what their paths are relative to: "" for the root, or a split's folder in it with a slash at its end.
    """
    present = set(listing.others)
    places = ["", *(f"{name}/" for name in listing.folders if "/" not in name and split_of(name))]
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


def _from_class_folders(root: Path, listing: Listing, unlabelled: dict[str, list[str]]) -> Found:
    pictures = listing.pictures
    if not pictures:
        empty = f"holds no pictures; put those of each class into a folder of its name ({ENDINGS})."
        raise DataError(no_pictures(root, listing, empty))
    splits = split_folders(pictures) or splits_beside_others(pictures) or {}
    depth = 2 if splits else 1
    found = Found(root)
    aside = [name for name in pictures if splits and "/" in name and top_of(name) not in splits]
    found.notes += _said_of_splits(pictures, splits, aside)
    left_aside = set(aside)
    strays = []
    for name in pictures:
        if name in left_aside:
            continue
        parts = name.split("/", depth)
        if len(parts) <= depth:
            strays.append(name)
        else:
            found.rows.append(Row(name, (parts[-2],), splits.get(parts[0]) if splits else None))
    if not found.rows:
        raise DataError(_no_class_folders(root, strays, listing, unlabelled))
    of_runs = {PurePosixPath(run).parent.as_posix() for run in listing.runs}
    for folder in listing.folders:
        if folder not in of_runs and folder.count("/") == depth - 1 and (depth == 1 or split_of(top_of(folder))):
            found.classes[folder.rsplit("/", 1)[-1]] = None
    if undecoded := [name for name in found.classes if not is_utf8(name)]:
        raise DataError(
            f"Class folders have names that are not UTF-8, as old archives give them: {first_names(undecoded)}; rename them."
        )
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


def _said_of_splits(pictures: list[str], splits: dict[str, str], aside: list[str]) -> list[str]:
    """Notes on folders that lie beside splits, and on classes that are called like splits."""
    if aside:
        tops = sorted({top_of(name) for name in aside})
        return [
            f"left out, beside the splits {first_names(sorted(splits))}: {count_of(len(aside), 'picture')} in "
            f"{first_names(tops)}"
        ]
    tops = sorted({top_of(name) for name in pictures if "/" in name and split_of(top_of(name))})
    if splits or len(tops) < 2:
        return []
    return [
        f"the folders {first_names(tops)} are taken as classes, not as splits; for splits, put train and val or test, each "
        "with a folder for every class, into a folder of their own"
    ]


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


# From what was found to the result.


def _finished(found: Found, skip_broken: bool) -> LabelledData:
    fatal, skippable, notes = list(found.fatal), list(found.skippable), list(found.notes)
    fatal += _name_clashes(found.classes, "class")
    fatal += _name_clashes({row.group for row in found.rows if row.group is not None}, "group")
    counts = Counter(label for row in found.rows for label in row.labels)
    empty = sorted((name for name in found.classes if not counts[name]), key=natural)
    skippable += [f'class "{printable(name)}" has no picture; add some, or remove the class' for name in empty]
    classes = {cleaned(name): None for name in sorted(counts, key=lambda name: natural(cleaned(name)))}
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
        raise DataError(problem_report(found.given or found.root, fatal + skippable, ending))
    place = {name: i for i, name in enumerate(classes)}
    items = tuple(
        LabelledItem(
            found.root / row.name, tuple(sorted(place[cleaned(n)] for n in row.labels)), row.split, row.group, row.shown
        )
        for row in sorted(found.rows, key=lambda row: row.name)
    )
    rare = [cleaned(name) for name in counts if counts[name] == 1]
    if rare:
        notes.append(
            f"{count_of(len(rare), 'class has', 'classes have')} only one picture: "
            f"{first_names(sorted(rare, key=natural))}"
        )
    notes += left_out(skippable)
    return LabelledData(found.given or found.root, tuple(classes), items, found.multi_label, tuple(notes), found.source)


def _name_clashes(names: Iterable[str], kind: str) -> Iterator[str]:
    """One line for each two classes, or other kind of thing, that a person would take for one."""
    before: dict[str, str] = {}
    for name in sorted(names):
        clean = cleaned(name)
        if not clean:
            yield f"a {kind} has a name of only spaces; rename it"
            continue
        whole = re.fullmatch(r"(-?\d+)\.0+", clean)
        other = before.setdefault(whole[1] if whole else unicodedata.normalize("NFC", clean.casefold()), name)
        if other == name:
            continue
        if whole or re.fullmatch(r"-?\d+\.0+", cleaned(other)):
            pair, reason = (quoted([other]), quoted([name])), "how the number is written"
        elif cleaned(other) != clean:
            pair, reason = (quoted([other]), quoted([name])), "case"
        elif other.strip() != name.strip():
            # Both would look the same.
            pair, reason = (ascii(other), ascii(name)), "how accents are encoded (Unicode normal form)"
        else:
            pair, reason = (quoted([other]), quoted([name])), "the spaces around them"
        yield f"the {kind} names {pair[0]} and {pair[1]} differ only in {reason}; give both the same name"
