"""A folder of pictures to checked items with captions.

In: a folder. Out: an `ImageFolder`, every picture of which has been decoded once; or one error that lists all there is
to fix. `--prompt` and `--skip-broken` in the messages are the options of the same names on the command line.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from visionlora.data.captions import Captions, read_captions
from visionlora.data.images import IMAGE_SUFFIXES, decode_noted, printable
from visionlora.errors import ConfigError, DataError

TRIGGER = "sks"
"""A rare word, free to get a meaning in training."""

_MAX_LINES = 20
_MAX_NAMES = 10

# Pictures too, but of kinds that Pillow cannot read; they are mentioned, not ignored.
_OTHER_PICTURES = frozenset((".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".svg"))


@dataclass(frozen=True)
class ImageItem:
    """One picture and its caption."""

    path: Path
    caption: str
    sha256: str
    """Of the file's bytes, in hex."""


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder, sorted by path, none of them twice."""

    root: Path
    items: tuple[ImageItem, ...]
    notes: tuple[str, ...]
    """What a person should know: converted, doubled, left out; one line each."""
    caption_source: str
    """One line: where the captions came from."""


def read_image_folder(
    folder: Path,
    prompt: str | None = None,
    *,
    skip_broken: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImageFolder:
    """Reads and checks all pictures of a folder and its subfolders; hidden files are passed over.

    Args:
        folder: where the pictures are.
        prompt: the caption of every picture; when not given, captions come from the folder.
        skip_broken: leave out what cannot be used (and say so in the notes) instead of raising.
        progress: called with (pictures checked, pictures in all).

    Raises:
        DataError: everything that is wrong with the folder, one line a file.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty; write a caption for all pictures, or leave it out.")
    root = folder.expanduser()
    _check_folder(root)
    pictures, others, problems = _scan(root)
    if not pictures:
        raise DataError(_no_pictures(root, others, problems))

    hashes, notes, broken = _check_pictures(root, pictures, progress)
    problems += broken
    captions = read_captions(root, pictures, others)
    if prompt is not None:
        texts, source = dict.fromkeys(pictures, prompt.strip()), _prompt_source(prompt, captions)
    elif captions.sources or captions.problems:
        texts, source = captions.texts, _found_source(captions)
        problems += captions.problems
    else:
        words = _instance_prompt(root)
        texts = dict.fromkeys(pictures, words)
        source = (
            f'no captions in the folder, so all pictures get "{words}" (a rare word and the folder\'s name); '
            '--prompt "..." changes it'
        )
    kept, doubles = _without_doubles(hashes, texts)
    missing = [name for name in kept if name not in texts and name not in captions.blamed]
    if missing:
        problems.append(_missing_captions(missing, len(kept)))
    items = tuple(ImageItem(root / name, texts[name], hashes[name]) for name in kept if name in texts)
    if problems and not (skip_broken and items):
        raise DataError(_report(root, problems, len(items)))
    notes += doubles + _other_pictures(others) + [f"left out: {problem}" for problem in problems]
    return ImageFolder(root, items, tuple(notes), source)


def _check_folder(root: Path) -> None:
    shown = printable(root)
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{shown} is a file, not a folder; pass the folder that holds the pictures.")
    missing = root  # the first part of the path that is not there
    while not missing.parent.exists():
        missing = missing.parent
    parent = missing.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    close = difflib.get_close_matches(missing.name, siblings, n=1)
    if close:
        hint = f"did you mean {printable(parent / close[0])}?"
    elif siblings:
        hint = f"the folders in {printable(parent.resolve())} are {_names(siblings)}."
    else:
        hint = f"{printable(parent.resolve())} has no folders."
    raise DataError(f"There is no folder {shown}; {hint}")


def _scan(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Pictures, other files (posix paths relative to `root`, sorted) and folders that cannot be opened.

    Linked files count, linked folders are not entered: they may lead in circles.
    """
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        name = printable(Path(error.filename).relative_to(root))
        problems.append(f"{name} cannot be opened ({error.strerror}); check its permissions")

    names = []
    for where, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(where).relative_to(root)
        names += [(here / name).as_posix() for name in files if not name.startswith(".")]
    pictures = sorted(name for name in names if _suffix(name) in IMAGE_SUFFIXES)
    others = sorted(name for name in names if _suffix(name) not in IMAGE_SUFFIXES)
    return pictures, others, problems


def _check_pictures(
    root: Path, pictures: list[str], progress: Callable[[int, int], None] | None
) -> tuple[dict[str, str], list[str], list[str]]:
    """Decodes every picture: hashes of the good ones, notes on conversions, problems of the bad ones."""
    hashes: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    problems: list[str] = []
    for done, name in enumerate(pictures, 1):
        try:
            note = decode_noted(root / name, shown=name).note
            hashes[name] = _sha256(root / name)
        except DataError as error:
            problems.append(str(error))
        else:
            if note:
                converted.setdefault(note, []).append(name)
        if progress is not None:
            progress(done, len(pictures))
    return hashes, [f"{note}: {_names(names)}" for note, names in converted.items()], problems


def _without_doubles(hashes: dict[str, str], texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """One name for each content, the first that has a caption; and a note on each that was dropped."""
    same: dict[str, list[str]] = {}
    for name, digest in hashes.items():
        same.setdefault(digest, []).append(name)
    kept, notes = [], []
    for names in same.values():
        keep = next((name for name in names if name in texts), names[0])
        kept.append(keep)
        if len(names) > 1:
            note = f"the same picture, used once: {_names(names)}"
            if len({texts.get(name) for name in names}) > 1:
                note += f'; it keeps the caption of {printable(keep)}, "{printable(texts[keep])}"'
            notes.append(note)
    return sorted(kept), notes


def _instance_prompt(root: Path) -> str:
    name = root.resolve().name.lower()
    return " ".join([TRIGGER, *name.replace("_", " ").replace("-", " ").split()])


def _prompt_source(prompt: str, captions: Captions) -> str:
    unused = f"; the captions in {' and '.join(map(printable, captions.sources))} are not used"
    return f'--prompt: all pictures get "{prompt.strip()}"{unused if captions.sources else ""}'


def _found_source(captions: Captions) -> str:
    counts = [f"{printable(source)} ({count})" for source, count in captions.sources.items() if count]
    return f"captions from {' and '.join(counts)}"


def _missing_captions(missing: list[str], total: int) -> str:
    example = PurePosixPath(missing[0]).with_suffix(".txt").as_posix()
    if len(missing) == 1:
        return f"{printable(missing[0])} has no caption; write it in {printable(example)}, or pass --prompt for all"
    return (
        f"{len(missing)} of {total} pictures have no caption: {_names(missing)}; "
        f"write them in {printable(example)} and so on, or pass --prompt for all"
    )


def _other_pictures(others: list[str]) -> list[str]:
    names = [name for name in others if _suffix(name) in _OTHER_PICTURES]
    return [f"left out, export as JPEG or PNG to use: {_names(names)}"] if names else []


def _no_pictures(root: Path, others: list[str], problems: list[str]) -> str:
    shown = printable(root)
    accepted = f"pictures end in {', '.join(IMAGE_SUFFIXES)}"
    if problems:
        return f"{shown} holds no pictures that can be reached: {problems[0]}."
    if not others:
        return f"{shown} is empty; put the pictures into it ({accepted}) or pass another folder."
    counts = Counter(_suffix(name) or "without ending" for name in others).most_common(5)
    found = ", ".join(f"{count} {suffix}" for suffix, count in counts)
    hint = " Export them as JPEG or PNG first." if _other_pictures(others) else ""
    return f"{shown} holds no pictures: found {found}, but {accepted}.{hint}"


def _report(root: Path, problems: list[str], usable: int) -> str:
    lines = [f"{printable(root)} has {_count(len(problems), 'problem')}:"]
    lines += [f"  {problem}" for problem in problems[:_MAX_LINES]]
    if len(problems) > _MAX_LINES:
        lines.append(f"  and {len(problems) - _MAX_LINES} more")
    if usable:
        go_on = f"pass --skip-broken to leave out what cannot be used and go on with {_count(usable, 'picture')}."
        lines.append(f"Fix this, or {go_on}")
    else:
        lines.append("Fix this first: no usable picture is left.")
    return "\n".join(lines)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _names(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    return ", ".join(shown[:_MAX_NAMES]) + more
