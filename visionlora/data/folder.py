"""Folders of pictures to checked items with captions.

In: a folder, or several, or parquet files. Out: an `ImageFolder`, every picture of which has been decoded once; or one
error that lists all there is to fix. `--prompt` and `--skip-broken` in the messages are the options of the same names
on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visionlora.config.folders import FolderConfig
from visionlora.config.train_sd import TrainSDConfig
from visionlora.data.alike import look_alikes
from visionlora.data.cache import default_cache_folder
from visionlora.data.facts import FactsOfFolder
from visionlora.data.images import printable
from visionlora.data.masks import Box
from visionlora.data.source_captions import missing_captions, texts_of
from visionlora.data.sources import OPTION, SETTING, Looks, Source, Told, Words, looked_at, opened
from visionlora.data.tags import any_of
from visionlora.data.wording import (
    count_of,
    first_names,
    in_several_rows,
    not_entered,
    problem_reports,
    remedy,
)
from visionlora.errors import ConfigError, DataError

_MAX_SETS = 5
Doubles = dict[str, list[str]]
"""The name that a picture keeps -> all that it has, in order."""


@dataclass(frozen=True)
class ImageItem:
    """One picture and its caption."""

    path: Path
    caption: str
    sha256: str
    """Of the file's bytes, in hex."""
    repeats: int = 1
    """How often it counts in one pass."""
    mask: Path | None = None
    """A grey picture, white where to learn; the file itself where its alpha channel says it. See `masks.mask_of`."""
    mask_sha256: str | None = None
    """Of that file's bytes, in hex."""
    size: tuple[int, int] | None = field(default=None, compare=False)
    """Height and width of the upright picture, px; None where nobody has looked."""
    name: str = field(default="", compare=False)
    """How messages and run folders name it: its path in the folder, or the row of a parquet file."""
    rule: str = ""
    """How the file's numbers were read; see `images.Decoded`."""
    learned: Box | None = field(default=None, compare=False)
    """Where the mask is not black; None without one."""

    @property
    def content(self) -> str:
        """Tells what is learned, but not its caption: the picture, how it was read, and which mask it has."""
        picture = f"{self.sha256} {self.rule}".rstrip()
        if self.mask is None:
            return picture
        return f"{picture} {'alpha' if self.mask == self.path else self.mask_sha256}"


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder or several, sorted by path within each, none of them twice."""

    root: Path
    """The folder; of several what they have in common."""
    items: tuple[ImageItem, ...]
    notes: tuple[str, ...]
    """What a person should know: converted, doubled, left out; one line each."""
    caption_source: str
    """One line: where the captions came from."""
    alike: tuple[tuple[int, ...], ...] = ()
    """Sets of positions in `items` of pictures that look alike."""


def read_pictures(config: TrainSDConfig, *, cache: Path | None = None, progress: Told | None = None) -> ImageFolder:
    """The pictures that a run learns from: those of `images`, or of `folders`.

    Args:
        config: of the run.
        cache: see `read_image_folder`.
        progress: likewise.

    Raises:
        ConfigError: for settings that do not fit what is there.
        DataError: everything that is wrong with the pictures, one line a file.
    """
    if config.folders:
        return read_image_folders(config.folders, skip_broken=config.skip_broken, cache=cache, progress=progress)
    return read_image_folder(
        Path(config.images),
        config.prompt,
        captions=config.captions,
        masks=config.masks,
        skip_broken=config.skip_broken,
        cache=cache,
        progress=progress,
    )


def read_image_folder(
    folder: Path,
    prompt: str | None = None,
    *,
    captions: str = "auto",
    masks: str | None = None,
    skip_broken: bool = False,
    cache: Path | None = None,
    progress: Told | None = None,
) -> ImageFolder:
    """Reads and checks all pictures of a folder and its subfolders; hidden files are passed over.

    A parquet file, or a folder that holds no pictures but parquet files, is unpacked to the cache first.

    Args:
        folder: where the pictures are.
        prompt: the caption of every picture; when not given, captions come from the folder. Where all top folders are named
            like `10_sks dog`, their pictures count 10 times, with the caption `sks dog` if they have none of their own.
        captions: `filename` takes them from the names of the pictures instead.
        masks: `alpha`, a folder of masks, or the column of a parquet table that holds them; see `visionlora.data.masks`.
        skip_broken: leave out what cannot be used (and say so in the notes) instead of raising.
        cache: a folder for what is known of the pictures, and for those of parquet files; by default the user's.
        progress: called with (what is done, rows unpacked or pictures checked, how many there are).

    Raises:
        ConfigError: for settings that do not fit what is there.
        DataError: everything that is wrong with the folder, one line a file.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty; write a caption for all pictures, or leave it out.")
    config = FolderConfig(str(folder), prompt, captions=captions, masks=masks)
    return _read([config], OPTION, skip_broken, cache, progress)


def read_image_folders(
    folders: Sequence[FolderConfig],
    *,
    skip_broken: bool = False,
    cache: Path | None = None,
    progress: Told | None = None,
) -> ImageFolder:
    """Reads and checks the pictures of several folders; one that is in two of them counts only in the first.

    Args:
        folders: where the pictures are and how each folder is read.
        skip_broken: see `read_image_folder`.
        cache: likewise.
        progress: likewise; pictures of all folders are counted together.

    Raises:
        ConfigError: for settings that do not fit what is there.
        DataError: everything that is wrong with the folders, one line a file.
    """
    return _read(folders, SETTING, skip_broken, cache, progress)


def _read(
    configs: Sequence[FolderConfig],
    words: Words,
    skip_broken: bool,
    cache: Path | None,
    progress: Told | None,
) -> ImageFolder:
    sources = opened(configs, words, cache, progress)
    total, done = sum(len(source.pictures) for source in sources), 0
    looks, found = Looks(), []
    for source in sources:
        known = FactsOfFolder(cache or default_cache_folder(), source.root, list(source.pictures.values()))
        with known:
            own = looked_at(source, known, done, total, progress)
        done += len(source.pictures)
        found.append(_items(source, own))
        looks.facts |= {source.name_of(name): fact for name, fact in own.facts.items()}
    notes = _without_common(sources, found)
    items = [item for own in found for item in own]
    problems = {source.root: source.problems for source in sources if source.problems}
    if problems and not (skip_broken and items):
        raise DataError(problem_reports(problems, remedy(len(items))))
    for source in sources:
        own_notes = [*source.notes, *(f"left out: {problem}" for problem in source.problems)]
        notes += [f"{source.label}: {note}" if source.label else note for note in own_notes]
    names = [item.name for item in items]
    facts = [looks.facts[name] for name in names]
    alike = look_alikes([fact.hash for fact in facts], [fact.thumbnail for fact in facts])
    notes += _alike(names, alike)
    captions = "; ".join(f"{s.label}: {s.caption_source}" if s.label else s.caption_source for s in sources)
    return ImageFolder(
        _common([source.root for source in sources]), tuple(items), tuple(notes), captions, tuple(map(tuple, alike))
    )


def _alike(names: Sequence[str], sets: Sequence[Sequence[int]]) -> list[str]:
    """A note on pictures that are nearly the same, if there are any."""
    if not sets:
        return []
    shown = []
    for members in sets[:_MAX_SETS]:
        more = f" and {len(members) - 2:,} more" if len(members) > 2 else ""
        shown.append(f"{printable(names[members[0]])} and {printable(names[members[1]])}{more}")
    rest = f" and {len(sets) - _MAX_SETS:,} more such sets" if len(sets) > _MAX_SETS else ""
    return [
        f"{sum(map(len, sets)):,} pictures look alike: {', '.join(shown)}{rest}; they count twice: remove one, or set repeats"
    ]


# What it is called.


def _items(source: Source, looks: Looks) -> list[ImageItem]:
    """The pictures of a source that can be used; it gets notes and problems."""
    texts, captions = texts_of(source)
    kept, doubles = _without_doubles({name: fact.sha256 for name, fact in looks.facts.items()}, texts)
    if source.unpacked is not None and source.config.prompt is None:
        doubles = _with_captions_of_all_rows(source, doubles, texts)
    uncaptioned = [name for name in kept if name not in texts and name not in captions.blamed]
    if uncaptioned:
        source.problems.append(missing_captions(source, uncaptioned, len(kept)))
    source.notes += _used_once(doubles, texts) + not_entered(source.listing)
    source.notes += source.masks.notes if source.masks else ()
    items = []
    for name in kept:
        if name in texts:
            fact, (mask, mask_sha256, learned) = looks.facts[name], looks.masks.get(name, (None, None, None))
            repeats = source.named.of(name) or source.config.repeats
            item = ImageItem(
                source.pictures[name], texts[name], fact.sha256, repeats, mask, mask_sha256,
                size=fact.size, name=source.name_of(name), rule=fact.rule, learned=learned,
            )  # fmt: skip
            items.append(item)
    return items


def _without_doubles(hashes: dict[str, str], texts: dict[str, str]) -> tuple[list[str], Doubles]:
    """One name for each content, the first that has a caption; and all names of each that has several."""
    same: dict[str, list[str]] = {}
    for name, digest in hashes.items():
        same.setdefault(digest, []).append(name)
    first = {next((name for name in names if name in texts), names[0]): names for names in same.values()}
    order = {name: i for i, name in enumerate(hashes)}
    return sorted(first, key=order.__getitem__), {keep: names for keep, names in first.items() if len(names) > 1}


def _with_captions_of_all_rows(source: Source, doubles: Doubles, texts: dict[str, str]) -> Doubles:
    """Gives pictures that have a row for each of their captions any of them each time; those that are left as they were."""
    left: Doubles = {}
    for keep, names in doubles.items():
        own = {texts[name] for name in names if name in texts}
        if len(own) < 2:
            left[keep] = names
        else:
            texts[keep] = any_of([texts[name] for name in names if name in texts])
    source.notes += in_several_rows(len(doubles) - len(left))
    return left


def _used_once(doubles: Doubles, texts: dict[str, str]) -> list[str]:
    """Notes on pictures that are there several times."""
    notes = []
    for keep, names in list(doubles.items())[:_MAX_SETS]:
        note = f"the same picture, used once: {first_names(names)}"
        if len({texts.get(name) for name in names}) > 1:
            note += f'; it keeps the caption of {printable(keep)}, "{printable(texts[keep])}"'
        notes.append(note)
    more = len(doubles) - _MAX_SETS
    return [*notes, f"and {count_of(more, 'picture')} more that are there several times"] if more > 0 else notes


def _without_common(sources: Sequence[Source], found: Sequence[list[ImageItem]]) -> list[str]:
    """Takes pictures out of folders that an earlier one holds too; a note on them."""
    first: dict[str, str] = {}
    notes = []
    for source, items in zip(sources, found, strict=True):
        doubles = [item for item in items if item.sha256 in first]
        notes += [
            f"the same picture in two folders, used once: {printable(first[item.sha256])}, not {printable(item.name)}"
            for item in doubles[:_MAX_SETS]
        ]
        if len(doubles) > _MAX_SETS:
            notes.append(f"and {len(doubles) - _MAX_SETS:,} more of {source.label}")
        items[:] = [item for item in items if item.sha256 not in first]
        first |= {item.sha256: item.name for item in items}
    return notes


def _common(roots: Sequence[Path]) -> Path:
    """What several folders have in common; one is itself."""
    if len(roots) == 1:
        return roots[0]
    try:
        return Path(os.path.commonpath([root.absolute() for root in roots]))
    except ValueError:  # on several drives
        return roots[0]
