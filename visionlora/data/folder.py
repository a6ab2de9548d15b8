"""A folder of pictures to checked items with captions.

In: a folder. Out: an `ImageFolder`, every picture of which has been decoded once; or one error that lists all there is
to fix. `--prompt` and `--skip-broken` in the messages are the options of the same names on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from visionlora.data.captions import Captions, read_captions
from visionlora.data.files import list_folder, sha256_of
from visionlora.data.images import decode_noted, printable
from visionlora.data.wording import (
    ENDINGS,
    count_of,
    first_names,
    missing,
    no_pictures,
    other_pictures,
    problem_report,
    remedy,
)
from visionlora.errors import ConfigError, DataError

TRIGGER = "sks"
"""A rare word, free to get a meaning in training."""


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
    listing = list_folder(root)
    pictures = listing.pictures
    if not pictures:
        empty = f"is empty; put the pictures into it ({ENDINGS}) or pass another folder."
        raise DataError(no_pictures(root, listing, empty))

    hashes, notes, broken = _check_pictures(root, pictures, progress)
    problems = [*listing.problems, *broken]
    captions = read_captions(root, pictures, listing.others)
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
    uncaptioned = [name for name in kept if name not in texts and name not in captions.blamed]
    if uncaptioned:
        problems.append(_missing_captions(uncaptioned, len(kept)))
    items = tuple(ImageItem(root / name, texts[name], hashes[name]) for name in kept if name in texts)
    if problems and not (skip_broken and items):
        raise DataError(problem_report(root, problems, remedy(len(items))))
    notes += doubles + other_pictures(listing) + [f"left out: {problem}" for problem in problems]
    return ImageFolder(root, items, tuple(notes), source)


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{printable(root)} is a file, not a folder; pass the folder that holds the pictures.")
    raise DataError(missing(root))


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
            hashes[name] = sha256_of(root / name)
        except DataError as error:
            problems.append(str(error))
        else:
            if note:
                converted.setdefault(note, []).append(name)
        if progress is not None:
            progress(done, len(pictures))
    return hashes, [f"{note}: {first_names(names)}" for note, names in converted.items()], problems


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
            note = f"the same picture, used once: {first_names(names)}"
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


def _missing_captions(names: list[str], total: int) -> str:
    example = PurePosixPath(names[0]).with_suffix(".txt").as_posix()
    if len(names) == 1:
        return f"{printable(names[0])} has no caption; write it in {printable(example)}, or pass --prompt for all"
    return (
        f"{len(names):,} of {count_of(total, 'picture')} have no caption: {first_names(names)}; "
        f"write them in {printable(example)} and so on, or pass --prompt for all"
    )
