"""Pictures within parquet files, as Hugging Face stores data sets: written once to a folder of the cache as files.

In: parquet files with a column of pictures (`struct{bytes, path}` or bytes), one of captions (text, or a list of texts, one of
which is taken each time), and if wanted one of masks. Out: a file for each picture, with its caption, and for its mask; and
each row that holds none as one line for a person.

What is written goes by the content of the parquet file and is whole or not there. One row group is in memory at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from visionlora.data.captions import TEXT_KEYS, caption_in
from visionlora.data.files import Unusable, sha256_of, suffix_of
from visionlora.data.images import IMAGE_SUFFIXES, printable
from visionlora.data.tables import not_parquet, pyarrow_for
from visionlora.data.wording import quoted
from visionlora.errors import DataError

PARQUET = ".parquet"
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png")
"""Names by which the column of pictures is found where there are several, in order of precedence."""

_VERSION = "3"  # of what is written; a new number makes old folders unused
_ROWS = "rows.json"
_ROWS_AT_ONCE = 16
_ONE_DAY = 86_400  # s


@dataclass(frozen=True)
class Unpacked:
    """The pictures of some parquet files; each is named like `train.parquet row 3`."""

    pictures: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """Picture -> the file name that the data set gives it, where it does."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Parquet file -> its column of captions."""
    others: dict[str, list[str]] = field(default_factory=dict)
    """Parquet file -> all its columns."""
    masks: dict[str, Path] = field(default_factory=dict)
    """Picture -> its mask, where it has one."""
    problems: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Where the captions come from, in words."""
        names = dict.fromkeys(column for column in self.columns.values() if column)
        return f"the column {quoted(names)} of {' and '.join(map(printable, self.columns))}"


@dataclass(frozen=True)
class _Row:
    """What is known of one row."""

    number: int
    """From 1."""
    file: str
    """Of the picture, in the folder; empty when there is none."""
    size: int
    origin: str
    caption: str
    problem: str
    mask: str = ""
    """File of the mask, likewise."""
    mask_size: int = 0


@dataclass(frozen=True)
class _Content:
    columns: list[str]
    caption_column: str | None
    rows: list[_Row]


def unpack(
    files: Mapping[str, Path],
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    masks: str | None = None,
) -> Unpacked:
    """Writes the pictures of parquet files to the cache, unless they are there already.

    Args:
        files: name for messages -> file.
        cache: by default the user's cache folder.
        progress: called with (rows done, rows of the file); not at all when all is there.
        masks: the column that holds the masks.

    Raises:
        ConfigError: without pyarrow.
        DataError: for a file that cannot be read or has no column of pictures or of masks, or a cache that cannot be written.
    """
    if cache is None:
        from visionlora.data.cache import default_cache_folder  # brings torch

        cache = default_cache_folder()
    found = Unpacked()
    for shown, path in files.items():
        folder, content = _unpacked(path, shown, cache / "parquet", progress, masks)
        found.columns[shown], found.others[shown] = content.caption_column, content.columns
        for row in content.rows:
            name = f"{shown} row {row.number}"
            if row.problem:
                found.problems.append(f"{printable(name)} {row.problem}")
                continue
            found.pictures[name] = folder / row.file
            if row.caption:
                found.captions[name] = row.caption
            if row.origin:
                found.origins[name] = row.origin
            if row.mask:
                found.masks[name] = folder / row.mask
    return found


def _unpacked(
    path: Path, shown: str, cache: Path, progress: Callable[[int, int], None] | None, masks: str | None
) -> tuple[Path, _Content]:
    try:
        name = f"{_VERSION}-{sha256_of(path)[:32]}"
        final = cache / (name if masks is None else f"{name}-{hashlib.sha256(masks.encode()).hexdigest()[:8]}")
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read ({error.strerror}); check its permissions.") from None
    if (known := _known(final)) is not None:
        return final, known
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        temporary = Path(tempfile.mkdtemp(".tmp", ".rows-", cache))
        try:
            content = _write_rows(path, shown, temporary, progress, masks)
            if _known(final) is None:  # of another process, which began at the same time
                shutil.rmtree(final, ignore_errors=True)
            with contextlib.suppress(OSError):  # likewise
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if _known(final) is None:
            raise OSError("it cannot be renamed")
    except Unusable as error:
        raise DataError(f"{printable(shown)} {error}.") from None
    except OSError as error:
        raise DataError(
            f"The pictures of {printable(shown)} cannot be written to {printable(cache)} ({error.strerror or error}); "
            "make room, or set VISIONLORA_CACHE to another folder."
        ) from None
    return final, content


def _known(folder: Path) -> _Content | None:
    """What a folder holds, or None when it is not there or no longer whole."""
    try:
        kept = json.loads((folder / _ROWS).read_text(encoding="utf-8"))
        content = _Content(kept["columns"], kept["captions"], [_Row(*row) for row in kept["rows"]])
        sizes = [pair for row in content.rows for pair in ((row.file, row.size), (row.mask, row.mask_size)) if pair[0]]
        whole = all((folder / file).stat().st_size == size for file, size in sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if whole else None


def _remove_leftovers(cache: Path) -> None:
    """Removes what a killed process has left, which may be large."""
    for folder in cache.glob(".rows-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ONE_DAY:
                shutil.rmtree(folder, ignore_errors=True)


def _write_rows(
    path: Path, shown: str, folder: Path, progress: Callable[[int, int], None] | None, masks: str | None
) -> _Content:
    pyarrow = pyarrow_for(path, "save its pictures as files")
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise not_parquet(error) from None
    with table:
        names, image, text = _columns(pyarrow, table.schema_arrow, masks)
        rows: list[_Row] = []
        for cell, caption, mask in _cells(pyarrow, table, (image, text, masks)):
            row, content = _row(len(rows) + 1, cell, caption)
            if row.file:
                (folder / row.file).write_bytes(content)
                if grey := _bytes_of(mask):
                    row = replace(row, mask=f"{row.number:08}-mask", mask_size=len(grey))
                    (folder / row.mask).write_bytes(grey)
            rows.append(row)
            if progress is not None:
                progress(len(rows), table.metadata.num_rows)
    kept = {"columns": names, "captions": text, "rows": [astuple(row) for row in rows]}
    (folder / _ROWS).write_text(json.dumps(kept), encoding="utf-8")
    return _Content(names, text, rows)


def _cells(pyarrow: Any, table: Any, names: Sequence[str | None]) -> Iterator[tuple[Any, ...]]:
    """The cells of some columns, row by row; None for a column that is not there."""
    columns = [name for name in names if name is not None]
    for group in range(table.num_row_groups):
        batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise not_parquet(error) from None
            if batch is None:
                break
            nothing = [None] * batch.num_rows
            yield from zip(
                *(nothing if name is None else batch.column(name).to_pylist() for name in names), strict=True
            )


def _bytes_of(cell: Any) -> bytes:
    """Of a picture; none where there is none."""
    content: bytes = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
    return content


def _row(number: int, cell: Any, caption: Any) -> tuple[_Row, bytes]:
    origin = str(cell.get("path") or "") if isinstance(cell, dict) else ""
    content = _bytes_of(cell)
    words, problem = caption_in(caption), ""
    if not content and origin:
        problem = (
            f"holds only the name of its picture ({printable(origin)}); store the pictures themselves in the table, or use "
            "a folder of files"
        )
    elif not content:
        problem = "holds no picture; remove the row"
    if problem:
        return _Row(number, "", 0, origin, words, problem), b""
    suffix = suffix_of(PurePosixPath(origin.replace("\\", "/")).name)
    file = f"{number:08}{suffix if suffix in IMAGE_SUFFIXES else ''}"
    return _Row(number, file, len(content), origin, words, ""), content


def _columns(pyarrow: Any, schema: Any, masks: str | None) -> tuple[list[str], str, str | None]:
    """All columns, that of pictures and, if there is one, that of captions."""
    names = list(schema.names)
    pictures = [f.name for f in schema if _holds_pictures(pyarrow.types, f.type)]
    if masks is not None and masks not in pictures:
        there = f"its pictures are in {quoted(pictures)}" if pictures else f"it has {quoted(names)}"
        raise Unusable(f"has no column {masks!r} of pictures to take the masks from; {there}")
    pictures = [name for name in pictures if name != masks]
    named = [name for wanted in IMAGE_COLUMNS for name in pictures if name.casefold() == wanted]
    if not pictures:
        raise Unusable(
            f"has no column of pictures (it has {quoted(names)}); store their bytes in one, as the Image feature of Hugging "
            "Face's datasets does"
        )
    if not named and len(pictures) > 1:
        raise Unusable(f'has several columns of pictures, {quoted(pictures)}; call the one to learn from "image"')
    texts = [f.name for f in schema if _holds_text(pyarrow.types, f.type)]
    captions = [name for wanted in TEXT_KEYS for name in texts if name.casefold() == wanted]
    return names, (named or pictures)[0], next(iter(captions), None)


def _holds_pictures(types: Any, kind: Any) -> bool:
    if types.is_struct(kind):
        return any(f.name == "bytes" and _is_binary(types, f.type) for f in kind)
    return _is_binary(types, kind)


def _is_binary(types: Any, kind: Any) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        return _holds_text(types, kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_text(types, kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
