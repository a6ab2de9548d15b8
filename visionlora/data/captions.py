"""The captions of a folder of pictures: `metadata.jsonl`, `metadata.csv`, then `dog.txt` or `dog.png.txt` by `dog.png`.

In: the folder and the names of its pictures. Out: one caption a picture, and every problem as one line for a person.
A metadata file may lie in a subfolder too; its `file_name`s are relative to it. It may have a row for each caption of a
picture, or a list of them. Or, where that is wanted, the names themselves (`caption_of_name`).
"""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product, zip_longest
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from visionlora.data.files import Names, Unusable, numbered_lines, read_text
from visionlora.data.images import printable
from visionlora.data.tables import csv_lines, miscounted
from visionlora.data.tags import any_of, one_of
from visionlora.data.wording import ENDINGS, Meant, quoted

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""In order of precedence."""
SIDECAR_SUFFIXES = (".txt", ".caption")
"""In order of precedence; metadata files come first."""
TEXT_KEYS = ("text", "caption", "prompt")
"""Accepted names of the caption column, in order of precedence."""

# Text files that lie beside pictures without being anyone's caption.
_NOT_CAPTIONS = frozenset(
    (
        "attribution",
        "changelog",
        "classes",
        "copying",
        "credits",
        "labels",
        "licence",
        "license",
        "notice",
        "origin",
        "prompt",
        "prompts",
        "readme",
        "requirements",
    )
)


@dataclass(frozen=True)
class Captions:
    """What was found; pictures are named by their posix path relative to the folder."""

    texts: dict[str, str]
    """Picture -> caption."""
    sources: dict[str, int]
    """`metadata.jsonl`, `.txt files` ... that are there -> how many captions were taken from it."""
    problems: tuple[str, ...]
    """One line each: what is wrong; what to do."""
    blamed: frozenset[str]
    """Pictures without a caption whose cause is already among the problems."""
    joined: tuple[str, ...] = ()
    """Files of several lines that were read as one caption."""
    several: int = 0
    """Pictures that have rows with different captions in one file: any of these, each time."""


@dataclass
class _Findings:
    root: Path
    pictures: Names
    others: frozenset[str]
    for_all: str
    left: frozenset[str]
    texts: dict[str, str] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    blamed: set[str] = field(default_factory=set)
    joined: list[str] = field(default_factory=list)
    several: int = 0

    def __post_init__(self) -> None:
        self.meant = Meant(self.pictures.exact)
        self.meant_stems = Meant(_stem(picture) for picture in self.pictures.exact)

    def take(self, picture: str, caption: str, source: str) -> None:
        """Keeps the caption unless an earlier source has given one."""
        if picture not in self.texts:
            self.texts[picture] = caption
            self.sources[source] += 1

    def take_rows(self, captions: Mapping[str, list[str]], source: str) -> None:
        """Likewise with pictures that may have a row for each of their captions: any of them counts each time."""
        for picture, own in captions.items():
            self.several += picture not in self.texts and len(set(own)) > 1
            self.take(picture, any_of(own), source)


def read_captions(
    root: Path, pictures: Iterable[str], others: Iterable[str], for_all: str = "pass --prompt for all",
    left: Iterable[str] = (),
) -> Captions:  # fmt: skip
    """Captions of `pictures`, each from the first place that has one; the last are metadata files beside the folder.

    Args:
        root: the folder; but for what metadata files beside it say of its pictures, nothing outside it is read.
        pictures: posix paths relative to `root`.
        others: all other files of the folder, likewise.
        for_all: how to give all pictures one caption, for messages.
        left: pictures of the folder that are not wanted, and may be named all the same.
    """
    found = _Findings(root, Names(pictures), frozenset(others), for_all, frozenset(left))
    for name in METADATA_FILES:
        for file in sorted(f for f in found.others if PurePosixPath(f).name == name):
            _read_metadata(found, file)
    for suffix in SIDECAR_SUFFIXES:
        _read_sidecars(found, suffix)
    for name in METADATA_FILES:
        for levels in (1, 2):  # `images/train`, as YOLO has it, lies two below
            if len(found.texts) < len(found.pictures.exact):
                _read_above(found, name, levels)
    blamed = frozenset(found.blamed - found.texts.keys())
    texts = dict(sorted(found.texts.items()))
    return Captions(texts, found.sources, tuple(found.problems), blamed, tuple(found.joined), found.several)


def caption_of_name(name: str) -> str:
    """What the name of a file says: without its folder and ending, `-` and `_` as spaces.

    Numbers before it and counters behind it are left out, also several of them: `01_`, `3. `, `_01`, ` (3)`. What is
    only numbers gives nothing.

    >>> caption_of_name("dogs/a_red-dog (3).png"), caption_of_name("0012 a dog.v2_01.jpg"), caption_of_name("001.png")
    ('a red dog', 'a dog.v2', '')
    """
    text = _one_line(re.sub("[-_]", " ", PurePosixPath(name).stem))
    text = re.sub(r"^(\d+[.)]? )+", "", text)
    text = re.sub(r"( \d+| ?\(\d+\))+$", "", text).strip()
    return "" if re.fullmatch(r"[\d\W]*", text) else text


def caption_in(cell: Any) -> str:
    r"""The caption that a cell of a table holds: a text, or any one of a list of texts; empty where there is none.

    >>> caption_in(" a  dog\n"), caption_in(["a dog", "one {b}"]), caption_in(None)
    ('a dog', '{a dog|one \\{b\\}}', '')
    """
    if isinstance(cell, list):
        return one_of([text for text in cell if isinstance(text, str)])
    return _one_line(cell) if isinstance(cell, str) else ""


def _read_metadata(found: _Findings, file: str) -> None:
    found.sources[file] = 0
    captions: dict[str, list[str]] = {}
    try:
        for line, row, wrong in _rows(found.root / file):
            try:
                _take_row(found, file, _parse(row) if isinstance(row, str) else row, captions, wrong)
            except Unusable as error:
                found.problems.append(f"{printable(file)} line {line} {error}")
    except Unusable as error:
        found.problems.append(f"{printable(file)} {error}")
    found.take_rows(captions, file)


def _read_above(found: _Findings, file: str, levels: int) -> None:
    """What a metadata file above the folder says of its pictures: data sets of Hugging Face may have one for all splits."""
    root = found.root.resolve()
    captions: dict[str, list[str]] = {}
    if len(root.parts) <= levels:
        return
    above = root.parents[levels - 1]
    inside, shown = f"{root.relative_to(above).as_posix()}/", "../" * levels + file
    try:
        for line, row, wrong in _rows(above / file) if (above / file).is_file() else ():
            try:
                cells = _parse(row) if isinstance(row, str) else row
            except Unusable:  # whatever it is about; who reads all of the file is told
                continue
            name = str(cells.get("file_name") or "").strip().replace("\\", "/").removeprefix("./")
            own = name.removeprefix(inside)
            if own == name or (picture := found.pictures.find(own)) is None or picture in found.texts:
                continue
            found.sources.setdefault(shown, 0)
            try:
                _take_row(found, shown, {**cells, "file_name": own}, captions, wrong, "")
            except Unusable as error:
                found.problems.append(f"{shown} line {line} {error}")
    except Unusable as error:
        if _names_what_lies_in(above / file, inside):  # other files of that name are no concern of this folder
            found.problems.append(f"{shown} {error}")
    found.take_rows(captions, shown)


def _names_what_lies_in(file: Path, folder: str) -> bool:
    """Whether a file that cannot be read as a table has names below `folder/`, in whatever encoding."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    spelled = [unicodedata.normalize("NFC", folder), unicodedata.normalize("NFD", folder)]
    for name, end, encoding in product(spelled, "/\\", ("utf-8", "cp1252", "utf-16-le", "utf-16-be")):
        with contextlib.suppress(UnicodeEncodeError):
            if content.find(name.replace("/", end).encode(encoding)) >= 0:
                return True
    return False


def _rows(path: Path) -> Iterator[tuple[int, str | dict[str, Any], str]]:
    """Of each row of a metadata file the number of its line, itself, and why its caption cannot be used."""
    text = read_text(path)
    if path.suffix == ".csv":
        yield from _csv_rows(text)
    else:
        yield from ((number, line, "") for number, line in numbered_lines(text))


def _take_row(
    found: _Findings, file: str, row: dict[str, Any], captions: dict[str, list[str]], wrong: str,
    folder: str | None = None,
) -> None:  # fmt: skip
    """Puts the caption of one row with those of its picture.

    Args:
        found: so far; it gets what is wrong.
        file: where the row is.
        row: its cells.
        captions: of each picture what the rows of this file have said so far.
        wrong: why its caption cannot be used; empty where it can.
        folder: that its names are relative to, that of the file when not given.
    """
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise Unusable(f'names no picture (it has {quoted(row)}); add a "file_name"')
    picture = _picture_of(found, PurePosixPath(file).parent if folder is None else PurePosixPath(folder), name)
    if picture is None:
        return
    found.blamed.add(picture)  # for what may be raised below; a picture with a caption is taken out in the end
    if wrong:
        raise Unusable(wrong)
    key = next((key for key in TEXT_KEYS if row.get(key) is not None), None)
    if key is None:
        raise Unusable(f'has no caption (it has {quoted(row)}); add a "text"')
    texts = row[key] if isinstance(row[key], list) else [row[key]]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise Unusable(f'has a "{key}" that is no text; put the caption in quotes')
    if not (caption := caption_in(row[key])):
        raise Unusable(f'has an empty "{key}" for {printable(name)}; write a caption, or remove the line')
    captions.setdefault(picture, []).append(caption)


def _picture_of(found: _Findings, folder: PurePosixPath, name: str) -> str | None:
    """The picture that a row of a metadata file in `folder` means; None for one that is not wanted."""
    text = name.strip()
    shown = printable(text)
    path = PurePosixPath(text.replace("\\", "/"))  # as Windows programs write it
    if path.is_absolute() or PureWindowsPath(text).anchor or ".." in path.parts:
        raise Unusable(f"names {shown}, which leaves the folder; use a path inside it, relative to the metadata file")
    for named in ((folder / name).as_posix(), (folder / text).as_posix(), (folder / path).as_posix()):
        if (picture := found.pictures.find(named)) is not None:
            return picture
    wanted = (folder / path).as_posix()
    if wanted in found.left:
        return None
    if wanted in found.others:
        raise Unusable(f"names {shown}, which is no picture; {ENDINGS}")
    meant = found.meant.by(wanted)
    if meant and folder.parts:
        meant = meant.removeprefix(f"{folder}/")
    hint = f"did you mean {printable(meant)}?" if meant else "add the picture, or remove the line"
    raise Unusable(f"names {shown}, which is not there; {hint}")


def _read_sidecars(found: _Findings, suffix: str) -> None:
    by_stem: dict[str, list[str]] = {}
    for picture in sorted(found.pictures.exact):
        by_stem.setdefault(_stem(picture), []).append(picture)
    files = sorted(f for f in found.others if PurePosixPath(f).suffix.lower() == suffix)
    stems = Names(by_stem)
    owned: dict[str, list[str]] = {}
    for file in files:
        if (stem := stems.find(_stem(file))) is not None:
            owned[file] = by_stem[stem]
        elif (whole := found.pictures.find(_stem(file))) is not None:
            owned[file] = [whole]
    source = f"{suffix} files"
    if owned:
        found.sources[source] = 0
    for file in files:
        try:
            if file not in owned:
                _check_orphan(file, found.meant_stems, in_use=bool(owned) or suffix == ".caption")
                continue
            if all(picture in found.texts for picture in owned[file]):
                continue
            found.blamed.update(owned[file])  # for what may be raised below
            caption = _sidecar_text(found, file)
        except Unusable as error:
            found.problems.append(f"{printable(file)} {error}")
            continue
        for picture in owned[file]:
            found.take(picture, caption, source)


def _sidecar_text(found: _Findings, file: str) -> str:
    # Whatever the file says ends up in the run folder and perhaps in a published model card.
    if not _is_inside(found.root, found.root / file):
        raise Unusable("is a link to a file outside the folder; copy the file into the folder")
    text = read_text(found.root / file)
    caption = _one_line(text)
    if not caption:
        raise Unusable(f"is empty; write a caption in it, or {found.for_all} pictures")
    if sum(bool(line.strip()) for line in text.splitlines()) > 1:
        found.joined.append(file)
    return caption


def _check_orphan(file: str, stems: Meant, in_use: bool) -> None:
    """A caption file without its picture is a problem, but a readme is not."""
    stem = PurePosixPath(_stem(file))
    if stem.name.lower() in _NOT_CAPTIONS:
        return
    meant = stems.by(stem.as_posix())
    # Where no text file belongs to a picture, one that is like none of them either is just some text.
    if meant is None and not in_use:
        return
    hint = f"did you mean {printable(meant)}{PurePosixPath(file).suffix}?" if meant else "add the picture, or remove it"
    raise Unusable(f"is a caption, but no picture has its name; {hint}")


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Unusable(f"is not JSON ({error.msg} at character {error.colno}); put one object on each line") from None
    except (ValueError, RecursionError):  # a number of too many digits, too many brackets
        raise Unusable("is not JSON that can be read; put one object on each line") from None
    if not isinstance(row, dict):
        raise Unusable('is not an object; write it like {"file_name": "dog.png", "text": "a photo of a dog"}')
    return row


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Number of the line, its cells by column, and what is wrong with them."""
    lines = csv_lines(text)
    _, columns = next(lines, (0, []))
    if "file_name" not in columns or not set(TEXT_KEYS) & set(columns):
        raise Unusable(
            f'needs the columns "file_name" and "text" (it has {quoted(columns)}); name them in its first line'
        )
    for number, cells in lines:
        row = dict(zip_longest(columns, cells[: len(columns)]))
        yield number, row, miscounted(cells, columns) if len(cells) > len(columns) else ""


def _is_inside(root: Path, path: Path) -> bool:
    """Whether a file lies in the folder, or in the blobs of the same repository in a cache of the Hugging Face Hub."""
    target, folder = path.resolve(), root.resolve()
    if target.is_relative_to(folder):
        return True
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), None)
    # Every file of a snapshot is a link to one of these.
    return (
        repository is not None
        and repository.name.startswith(("datasets--", "models--", "spaces--"))
        and target.parent == repository / "blobs"
    )


def _stem(file: str) -> str:
    return PurePosixPath(file).with_suffix("").as_posix()


def _one_line(text: str) -> str:
    return " ".join(text.split())
