"""Files of tables: CSV, JSONL and parquet to rows of named cells.

In: a file. Out: a `Table`, with every row that cannot be read as one line for a person; and its cells as text or as yes
and no. What the columns mean is not known here.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionlora.data.files import Unusable, numbered_lines, read_text
from visionlora.data.images import printable
from visionlora.data.wording import count_of, quoted
from visionlora.errors import ConfigError, DataError, nearest

TEXT_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    shown: str
    """How messages name it; safe to print."""
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]
    """Number of the line, and its cells by column."""
    problems: list[str] = field(default_factory=list)
    """One line for each row that cannot be read."""
    embedded: list[str] = field(default_factory=list)
    """Columns of a parquet table that hold no plain values; they are not among the others."""

    def given(self, name: str, option: str) -> str:
        """The column that a person has named.

        Args:
            name: of the column.
            option: the setting by which it was named.

        Raises:
            ConfigError: when there is none of this name.
        """
        if name not in self.columns:
            raise ConfigError(
                f'{option}: {self.shown} has no column "{printable(name)}". {nearest(name, self.columns)}'
            )
        return name

    def guess(self, names: Iterable[str]) -> str | None:
        """The column of the first of these names, which are in lower case, that there is in any case."""
        by_name = {column.casefold(): column for column in reversed(self.columns)}
        return next((by_name[name] for name in names if name in by_name), None)


def read_table(path: Path, shown: str | Path | None = None) -> Table:
    """Reads a table whole.

    Args:
        path: the file; its ending says what it is.
        shown: how messages name it; the path when not given.

    Raises:
        ConfigError: for a parquet table without pyarrow.
        DataError: when the file as a whole cannot be read.
    """
    suffix, name = path.suffix.lower(), printable(path if shown is None else shown)
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{printable(path)} is no table that can be read; tables end in {', '.join(TABLE_SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            return _parquet(path, name)
        return _csv(read_text(path), name) if suffix in TEXT_SUFFIXES else _json_lines(read_text(path), name)
    except Unusable as error:
        raise DataError(f"{printable(path)} {error}.") from None


def text_of(value: Any, column: str) -> str:
    """A cell as text; whole numbers lose their point, as a column of ids with a gap becomes fractional in pandas.

    >>> text_of("cat", "label"), text_of(2.0, "label"), text_of(None, "label")
    ('cat', '2', '')

    Raises:
        Unusable: for a list or an object.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value)
    raise Unusable(f'has a "{printable(column)}" that is neither text nor a number; write it in quotes')


def truth_of(value: Any, column: str) -> bool:
    """A cell as yes or no.

    >>> truth_of(1, "cat"), truth_of("No", "cat")
    (True, False)

    Raises:
        Unusable: for all else.
    """
    text = text_of(value, column).strip()
    answer = _TRUTH.get(text.casefold())
    if answer is None:
        given = f'"{printable(text)}"' if text else "nothing"
        raise Unusable(f'has {given} in "{printable(column)}"; write 1 or 0 (or true, false, yes, no)')
    return answer


def csv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, with the number of the line; the first are the names of the columns.

    Empty cells too many at the end of a line are left out, and text behind a closing quote belongs to its cell.

    Raises:
        Unusable: when two columns have the same name, or a quote is not closed.
    """
    head = text.lstrip("\r\n").split("\n", 1)[0]
    # Spreadsheets write semicolons where the comma is the decimal point.
    delimiter = max(",;\t", key=head.count)
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter)
    columns: list[str] | None = None
    end = 0
    try:
        for cells in reader:
            _check_closed(lines[end : reader.line_num], delimiter)
            end = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                cells = columns = [cell.strip() for cell in cells]
                if doubled := [name for name, count in Counter(columns).items() if count > 1 and name]:
                    raise Unusable(f"has two columns of the name {quoted(doubled)}; rename one")
            while len(cells) > len(columns) and not cells[-1].strip():
                cells.pop()
            yield reader.line_num, cells
    except csv.Error as error:
        raise Unusable(
            f"has a quote in line {end + 1} that is not closed ({error}); close it, or save the file as plain CSV"
        ) from None


def _check_closed(lines: Sequence[str], delimiter: str) -> None:
    """Raises csv.Error for a row whose quote is not closed, or by one of another row."""
    if len(lines) > 1 or any('"' in line for line in lines):
        try:
            list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error as error:
            if len(lines) > 1 or "end of data" in str(error):
                raise


def miscounted(cells: Sequence[str], columns: Sequence[str]) -> str:
    """What to say of a line that has not one cell for each column."""
    number = f"{count_of(len(cells), 'cell')} for {count_of(len(columns), 'column')}"
    return f"has {number}; put cells with commas in quotes"


def pyarrow_for(path: Path, otherwise: str) -> Any:
    """pyarrow, with its reader of parquet.

    Args:
        path: what is to be read.
        otherwise: what else can be done, for the message.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{printable(path)} is a parquet table, which needs pyarrow: pip install 'visionlora[tables]', or {otherwise}."
        ) from None
    return pyarrow


def not_parquet(error: Exception) -> Unusable:
    """What to say of a file that pyarrow cannot read."""
    return Unusable(f"cannot be read as parquet ({printable(' '.join(str(error).split()))}); save it anew")


def _csv(text: str, shown: str) -> Table:
    lines = csv_lines(text)
    _, columns = next(lines, (0, []))
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    for number, cells in lines:
        if len(cells) == len(columns):
            rows.append((number, dict(zip(columns, cells, strict=True))))
        else:
            problems.append(f"{shown} line {number} {miscounted(cells, columns)}")
    return Table(shown, [name for name in columns if name], rows, problems)


def _json_lines(text: str, shown: str) -> Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    problems: list[str] = []
    for number, line in numbered_lines(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # besides bad JSON: a number of too many digits, too many brackets
            row = None
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
            rows.append((number, row))
        else:
            problems.append(
                f'{shown} line {number} is no JSON object; write it like {{"file_name": "a.png", "label": "cat"}}'
            )
    return Table(shown, list(columns), rows, problems)


def _parquet(path: Path, shown: str) -> Table:
    pyarrow = pyarrow_for(path, "save it as CSV")
    try:
        schema = pyarrow.parquet.read_schema(path)
        embedded = [f.name for f in schema if pyarrow.types.is_nested(f.type) or pyarrow.types.is_binary(f.type)]
        columns = [name for name in schema.names if name not in embedded]
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise not_parquet(error) from None
    for column, names in class_names(schema.metadata or {}).items():
        for row in rows:
            if isinstance(number := row.get(column), int):
                row[column] = names[number] if 0 <= number < len(names) else None
    return Table(shown, columns, list(enumerate(rows, 1)), embedded=embedded)


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes that columns hold by number, as Hugging Face's datasets keeps them beside a parquet table.

    >>> class_names({b"huggingface": b'{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'})
    {'label': ['cat', 'dog']}
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        of_classes = {name: f for name, f in features.items() if f.get("_type") == "ClassLabel"}
        return {name: [str(n) for n in f["names"]] for name, f in of_classes.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
