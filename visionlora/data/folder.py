"""Folders of pictures to checked items with captions.

In: a folder, or several, or parquet files. Out: an `ImageFolder`, every picture of which has been decoded once; or one
error that lists all there is to fix. `--prompt` and `--skip-broken` in the messages are the options of the same names
on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from visionlora.config.folders import ALPHA, FolderConfig
from visionlora.config.train_sd import TrainSDConfig
from visionlora.data.alike import look_alikes
from visionlora.data.cache import default_cache_folder
from visionlora.data.captions import Captions, caption_of_name, read_captions
from visionlora.data.facts import Fact, FactsOfFolder
from visionlora.data.files import Listing, list_folder, sha256_of, suffix_of
from visionlora.data.images import legible, printable
from visionlora.data.masks import Masks, find_masks, masks_of_column
from visionlora.data.named_repeats import NamedRepeats, named_repeats
from visionlora.data.parquet import PARQUET, Unpacked, unpack
from visionlora.data.wording import (
    ENDINGS,
    count_of,
    first_names,
    linked_folders,
    missing,
    no_pictures,
    other_pictures,
    problem_reports,
    quoted,
    remedy,
)
from visionlora.errors import ConfigError, DataError

TRIGGER = "sks"
"""A rare word, free to get a meaning in training."""

_MAX_SETS = 5


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


@dataclass(frozen=True)
class _Words:
    """How the caption for all pictures is named in messages."""

    prompt: str
    for_all: str
    changes: str


_OPTION = _Words("--prompt", "pass --prompt for all", '--prompt "..." changes it')
_SETTING = _Words("its prompt", "give the folder a prompt for all", "a prompt for the folder changes it")


def read_pictures(
    config: TrainSDConfig, *, cache: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> ImageFolder:
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
    progress: Callable[[int, int], None] | None = None,
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
        progress: called with (pictures checked, pictures in all), before that with (rows unpacked, rows of the file).

    Raises:
        ConfigError: for settings that do not fit what is there.
        DataError: everything that is wrong with the folder, one line a file.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty; write a caption for all pictures, or leave it out.")
    config = FolderConfig(str(folder), prompt, captions=captions, masks=masks)
    return _read([config], _OPTION, skip_broken, cache, progress)


def read_image_folders(
    folders: Sequence[FolderConfig],
    *,
    skip_broken: bool = False,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
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
    return _read(folders, _SETTING, skip_broken, cache, progress)


@dataclass
class _Source:
    """One folder, from what is listed in it to its items."""

    config: FolderConfig
    words: _Words
    root: Path
    label: str
    """Goes before names and notes; empty where there is only one folder."""
    pictures: dict[str, Path]
    """Names within the folder -> files, in order."""
    listing: Listing
    unpacked: Unpacked | None = None
    masks: Masks | None = None
    named: NamedRepeats = field(default_factory=lambda: named_repeats(()))
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    caption_source: str = ""
    items: list[ImageItem] = field(default_factory=list)

    def name_of(self, picture: str) -> str:
        """How the picture is named among those of all folders."""
        folder = Path(self.config.path).parent if self.label and self.root.is_file() else self.label
        return (PurePosixPath(folder) / picture).as_posix()


@dataclass
class _Looks:
    """What decoding the pictures has shown, by their names."""

    facts: dict[str, Fact] = field(default_factory=dict)
    masks: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """File of the mask and its hash."""


def _read(
    configs: Sequence[FolderConfig],
    words: _Words,
    skip_broken: bool,
    cache: Path | None,
    progress: Callable[[int, int], None] | None,
) -> ImageFolder:
    sources = _opened(configs, words, cache, progress)
    total, done = sum(len(source.pictures) for source in sources), 0
    looks = _Looks()
    for source in sources:
        known = FactsOfFolder(cache or default_cache_folder(), source.root, list(source.pictures.values()))
        with known:
            own = _checked(source, known, done, total, progress)
        done += len(source.pictures)
        _caption(source, own)
        looks.facts |= {source.name_of(name): fact for name, fact in own.facts.items()}
    notes = _without_common(sources)
    items = [item for source in sources for item in source.items]
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


# What is there.


def _opened(
    configs: Sequence[FolderConfig],
    words: _Words,
    cache: Path | None,
    progress: Callable[[int, int], None] | None,
) -> list[_Source]:
    """Lists all folders; raises what is wrong with any of them as a whole."""
    sources, problems = [], []
    seen: set[Path] = set()
    for config in configs:
        root = Path(config.path).expanduser()
        if root.resolve() in seen:
            raise ConfigError(f"folders: {printable(root)} is there twice; raise its repeats instead.")
        seen.add(root.resolve())
        label = Path(config.path).as_posix() if len(configs) > 1 else ""
        try:
            sources.append(_open(_Source(config, words, root, label, {}, Listing()), cache, progress))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _open(source: _Source, cache: Path | None, progress: Callable[[int, int], None] | None) -> _Source:
    root, config = source.root, source.config
    if suffix_of(root.name) == PARQUET and not root.is_dir():
        if not root.exists():
            raise DataError(missing(root, "parquet file", (PARQUET,)))
        tables = {root.name: root}
    else:
        _check_folder(root)
        source.listing = listing = _without_masks(list_folder(root), root, config.masks)
        source.pictures = {name: root / name for name in listing.pictures}
        tables = {name: root / name for name in listing.others if suffix_of(name) == PARQUET}
        if source.pictures and tables:
            source.notes.append(f"not used, as there are pictures beside it: {first_names(tables)}")
            tables = {}
        if not source.pictures and not tables:
            empty = f"is empty; put the pictures into it ({ENDINGS}) or pass another folder."
            raise DataError(no_pictures(root, listing, empty))
    source.problems += source.listing.problems
    if source.words is _OPTION:  # one of several folders has settings that say it
        source.named = named_repeats(source.pictures)
        source.notes += [source.named.note()] if source.named.repeats else []
    if tables:
        column = config.masks if config.masks != ALPHA else None
        source.unpacked = unpack(tables, cache, progress, column)
        source.pictures = source.unpacked.pictures
        source.problems += source.unpacked.problems
        if not source.pictures and not source.problems:
            raise DataError(f"{printable(root)} has no rows; pass another table.")
        if column is not None:
            source.masks = masks_of_column(column, source.pictures, source.unpacked.masks)
            return source
    if config.masks is not None:
        source.masks = find_masks(config.masks, root, source.pictures)
    return source


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{printable(root)} is a file, not a folder; pass the folder that holds the pictures.")
    raise DataError(missing(root))


def _without_masks(listing: Listing, root: Path, masks: str | None) -> Listing:
    """The listing without a folder of masks that lies in the folder: they are no pictures to learn from."""
    folder = Path(masks).expanduser().resolve() if masks not in (None, ALPHA) else root.resolve()
    if folder == root.resolve() or not folder.is_relative_to(root.resolve()):
        return listing
    inside = folder.relative_to(root.resolve()).as_posix() + "/"
    pictures, others = ([n for n in names if not n.startswith(inside)] for names in (listing.pictures, listing.others))
    return Listing(pictures, others, listing.folders, listing.links, listing.problems)


# What it looks like.


def _checked(
    source: _Source, known: FactsOfFolder, before: int, total: int, progress: Callable[[int, int], None] | None
) -> _Looks:
    """Decodes every picture that is new, or has a mask: adds notes on conversions and problems to the source."""
    looks = _Looks()
    converted: dict[str, list[str]] = {}
    for done, (name, path) in enumerate(source.pictures.items(), before + 1):
        try:
            fact = known.of(path) if source.masks is None else None
            if fact is None:
                fact, decoded = known.look(path, name)
                if source.masks is not None:
                    mask = source.masks.check(name, decoded)
                    looks.masks[name] = mask, fact.sha256 if mask == path else sha256_of(mask)
        except DataError as error:
            source.problems.append(str(error))
        else:
            looks.facts[name] = fact
            if fact.note:
                converted.setdefault(fact.note, []).append(name)
        if progress is not None:
            progress(done, total)
    source.notes += [f"{note}: {first_names(names)}" for note, names in converted.items()]
    return looks


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


def _caption(source: _Source, looks: _Looks) -> None:
    """Makes the items of the source from its pictures that can be used."""
    texts, captions = _texts(source)
    kept, doubles = _without_doubles({name: fact.sha256 for name, fact in looks.facts.items()}, texts)
    uncaptioned = [name for name in kept if name not in texts and name not in captions.blamed]
    if uncaptioned:
        source.problems.append(_missing_captions(source, uncaptioned, len(kept)))
    source.notes += doubles + linked_folders(source.listing) + other_pictures(source.listing)
    source.notes += source.masks.notes if source.masks else ()
    for name in kept:
        if name in texts:
            path, name_of_all = source.pictures[name], source.name_of(name)
            fact, (mask, mask_sha256) = looks.facts[name], looks.masks.get(name, (None, None))
            item = ImageItem(
                path, texts[name], fact.sha256, source.named.of(name) or source.config.repeats, mask, mask_sha256,
                size=fact.size, name=name_of_all, rule=fact.rule,
            )  # fmt: skip
            source.items.append(item)


def _texts(source: _Source) -> tuple[dict[str, str], Captions]:
    """Captions by picture, and what was found in the folder; the source learns where they come from."""
    prompt, words, unpacked = source.config.prompt, source.words, source.unpacked
    if unpacked is not None:
        captions = Captions(unpacked.captions, {unpacked.source: len(unpacked.captions)}, (), frozenset())
        if not unpacked.captions:
            captions = Captions({}, {}, (), frozenset())
    else:
        captions = read_captions(source.root, source.pictures, source.listing.others, words.for_all)
    if prompt is not None:
        source.caption_source = _prompt_source(words.prompt, prompt, captions)
        return dict.fromkeys(source.pictures, prompt.strip()), captions
    if source.config.captions == "filename":
        return _from_names(source, captions)
    by_folder = source.named.captions(name for name in source.pictures if name not in captions.blamed)
    if captions.sources or captions.problems or by_folder:
        lacking = sum(name not in captions.texts for name in by_folder)
        source.caption_source = _found_source(captions, {"the names of the folders": lacking})
        source.problems += captions.problems
        return by_folder | captions.texts, captions
    if unpacked is not None:
        table, columns = next(iter(unpacked.others.items()))
        raise DataError(
            f'{printable(table)} has no column of captions (it has {quoted(columns)}); call it "text", or {words.for_all}.'
        )
    text = _instance_prompt(source.root)
    source.caption_source = (
        f'no captions in the folder, so all pictures get "{text}" (a rare word and the folder\'s name); {words.changes}'
    )
    return dict.fromkeys(source.pictures, text), captions


def _from_names(source: _Source, captions: Captions) -> tuple[dict[str, str], Captions]:
    """Captions from the names of the pictures."""
    origins: Mapping[str, str] = (
        source.unpacked.origins if source.unpacked else {name: name for name in source.pictures}
    )
    said = {name: caption_of_name(origins.get(name, "")) for name in source.pictures}
    texts = {name: text for name, text in said.items() if text and text == legible(text)}
    blamed = [name for name in source.pictures if name not in texts]
    source.problems += [
        f"{printable(name)} has {'letters in its name that are not UTF-8' if said[name] else 'no words in its name'}; rename "
        "it after what it shows, or leave captions=filename out"
        for name in blamed
    ]
    unused = f"; the captions in {' and '.join(map(printable, captions.sources))} are not used"
    source.caption_source = (
        f"captions from the names of the pictures ({len(texts)}){unused if captions.sources else ''}"
    )
    return texts, Captions({}, {}, (), frozenset(blamed))


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
    order = {name: i for i, name in enumerate(hashes)}
    return sorted(kept, key=order.__getitem__), notes


def _without_common(sources: Sequence[_Source]) -> list[str]:
    """Takes pictures out of folders that an earlier one holds too; a note on them."""
    first: dict[str, str] = {}
    notes = []
    for source in sources:
        doubles = [item for item in source.items if item.sha256 in first]
        notes += [
            f"the same picture in two folders, used once: {printable(first[item.sha256])}, not {printable(item.name)}"
            for item in doubles[:_MAX_SETS]
        ]
        if len(doubles) > _MAX_SETS:
            notes.append(f"and {len(doubles) - _MAX_SETS:,} more of {source.label}")
        source.items = [item for item in source.items if item.sha256 not in first]
        first |= {item.sha256: item.name for item in source.items}
    return notes


def _common(roots: Sequence[Path]) -> Path:
    """What several folders have in common; one is itself."""
    if len(roots) == 1:
        return roots[0]
    try:
        return Path(os.path.commonpath([root.absolute() for root in roots]))
    except ValueError:  # on several drives
        return roots[0]


def _instance_prompt(root: Path) -> str:
    name = legible(root.resolve().name).lower()
    return " ".join([TRIGGER, *name.replace("_", " ").replace("-", " ").split()])


def _prompt_source(option: str, prompt: str, captions: Captions) -> str:
    unused = f"; the captions in {' and '.join(map(printable, captions.sources))} are not used"
    return f'{option}: all pictures get "{prompt.strip()}"{unused if captions.sources else ""}'


def _found_source(captions: Captions, others: Mapping[str, int]) -> str:
    counts = [f"{printable(source)} ({count})" for source, count in {**captions.sources, **others}.items() if count]
    return f"captions from {' and '.join(counts)}"


def _missing_captions(source: _Source, names: list[str], total: int) -> str:
    example, for_all = printable(PurePosixPath(names[0]).with_suffix(".txt").as_posix()), source.words.for_all
    where = "it" if len(names) == 1 else "them"
    if source.unpacked is not None:
        column = next((column for column in source.unpacked.columns.values() if column), "text")
        how = f'fill in the column "{printable(column)}"'
    else:
        how = f"write {where} in {example}{'' if len(names) == 1 else ' and so on'}"
    if len(names) == 1:
        return f"{printable(names[0])} has no caption; {how}, or {for_all}"
    return f"{len(names):,} of {count_of(total, 'picture')} have no caption: {first_names(names)}; {how}, or {for_all}"
