"""The folders and tables that pictures are read from: what is there, and what each picture looks like.

In: where to look. Out: a `Source` for each, and `Looks`, every picture of which has been decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from visionlora.config.folders import ALPHA, FolderConfig
from visionlora.data.facts import Fact, FactsOfFolder
from visionlora.data.files import Listing, list_folder, suffix_of
from visionlora.data.images import printable
from visionlora.data.labelled import split_folders, splits_beside_others, top_of, used_files
from visionlora.data.masks import Box, Masks, find_masks, masks_of_column
from visionlora.data.named_repeats import NamedRepeats, named, named_repeats
from visionlora.data.parquet import PARQUET, Unpacked, unpack
from visionlora.data.pixels import stamp_of
from visionlora.data.wording import (
    ENDINGS,
    beside_pictures,
    first_names,
    missing,
    no_pictures,
)
from visionlora.errors import ConfigError, DataError

Told = Callable[[str, int, int], None]
"""Called with (what is done, done, total)."""


@dataclass(frozen=True)
class Words:
    """How the caption for all pictures is named in messages."""

    prompt: str
    for_all: str
    changes: str


OPTION = Words("--prompt", "pass --prompt for all", '--prompt "..." changes it')
SETTING = Words("its prompt", "give the folder a prompt for all", "a prompt for the folder changes it")


@dataclass
class Source:
    """One folder, from what is listed in it to what is said of it."""

    config: FolderConfig
    words: Words
    root: Path
    label: str
    """Goes before names and notes; empty where there is only one folder."""
    pictures: dict[str, Path]
    """Names within the folder -> files, in order."""
    listing: Listing
    left: frozenset[str] = frozenset()
    """Pictures that lie there and are not among them: those of other splits, or of other folders."""
    unpacked: Unpacked | None = None
    masks: Masks | None = None
    named: NamedRepeats = field(default_factory=lambda: named_repeats(()))
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    caption_source: str = ""

    def name_of(self, picture: str) -> str:
        """How the picture is named among those of all folders."""
        folder = Path(self.config.path).parent if self.label and self.root.is_file() else self.label
        return (PurePosixPath(folder) / picture).as_posix()


@dataclass
class Looks:
    """What decoding the pictures has shown, by their names."""

    facts: dict[str, Fact] = field(default_factory=dict)
    masks: dict[str, tuple[Path, str, Box]] = field(default_factory=dict)
    """File of the mask, its hash, and where it is not black."""


def opened(
    configs: Sequence[FolderConfig],
    words: Words,
    cache: Path | None,
    progress: Told | None,
) -> list[Source]:
    """Lists all folders; raises what is wrong with any of them as a whole."""
    sources, problems = [], []
    seen: set[Path] = set()
    for config in configs:
        root = Path(config.path).expanduser()
        if root.resolve() in seen:
            raise ConfigError(f"folders: {printable(root)} is there twice; raise its repeats instead.")
        seen.add(root.resolve())
        label = Path(config.path).as_posix() if len(configs) > 1 else ""
        others = [Path(other.path).expanduser() for other in configs if other is not config]
        try:
            sources.append(_open(Source(config, words, root, label, {}, Listing()), others, cache, progress))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _open(source: Source, elsewhere: Sequence[Path], cache: Path | None, progress: Told | None) -> Source:
    """Lists one; what lies in another of the folders, or their masks, is left to that."""
    root, config = source.root, source.config
    if suffix_of(root.name) == PARQUET and not root.is_dir():
        if not root.exists():
            raise DataError(missing(root, "parquet file", (PARQUET,)))
        tables = {root.name: root}
    else:
        _check_folder(root)
        masks = [] if config.masks in (None, ALPHA) else [Path(config.masks).expanduser()]
        whole = list_folder(root)
        source.listing = listing = _without(whole, root, [*filter(Path.is_dir, masks), *elsewhere])
        _check_layout(root, listing)
        shared = _shared_folder(listing.pictures)
        inner = [name.removeprefix(shared) for name in listing.pictures]
        if (splits := split_folders(inner) or splits_beside_others(inner)) is not None:
            listing = source.listing = _trained_on(source, splits, shared)
        source.pictures = {name: root / name for name in listing.pictures}
        source.left = frozenset(whole.pictures) - source.pictures.keys()
        tables = {name: root / name for name in listing.others if suffix_of(name) == PARQUET}
        if source.pictures:
            source.notes += beside_pictures(tables)
            tables = {}
        used, notes = used_files(tables, only="train")
        tables = {name: tables[name] for name in used}
        source.notes += notes
        if not source.pictures and not tables:
            empty = f"is empty; put the pictures into it ({ENDINGS}) or pass another folder."
            raise DataError(no_pictures(root, listing, empty))
    source.problems += source.listing.problems
    if source.words is OPTION:  # one of several folders has settings that say it
        source.named = named_repeats(source.pictures)
        source.notes += source.named.notes()
    if tables:
        column = config.masks if config.masks != ALPHA else None
        told = None if progress is None else partial(progress, "Unpacking pictures")
        source.unpacked = unpack(tables, cache, told, column)
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


def _check_layout(root: Path, listing: Listing) -> None:
    """Raises DataError for the folder above those that kohya's trainer takes: its class pictures are not to be learned."""
    tops: dict[str, set[str]] = {}
    for name in listing.pictures:
        top, *inner = PurePosixPath(name).parts[:-1] or ("",)
        tops.setdefault(top, set()).add(inner[0] if inner else "")
    said = {top for top, inner in tops.items() if top in ("img", "reg") and all(map(named, inner))}
    if said == {"img", "reg"}:
        of_class = sorted(tops["reg"])[0]
        words = named(of_class)
        raise DataError(
            f"{printable(root)} is laid out for kohya's trainer: learn from {printable(root / 'img')}, with its class pictures "
            f"as prior_images={printable(root / 'reg' / of_class)} and prior_prompt='{words[1] if words else of_class}'."
        )


def _shared_folder(pictures: Sequence[str]) -> str:
    """The folder in which all others lie, and no picture, such as `images/` of YOLO's layout; empty where there is none."""
    tops = {top_of(name) for name in pictures}
    return f"{tops.pop()}/" if len(tops) == 1 and all(name.count("/") > 1 for name in pictures) else ""


def _trained_on(source: Source, splits: Mapping[str, str], within: str) -> Listing:
    """What is listed without the folders of other splits, and a note on them.

    Args:
        source: of the pictures.
        splits: folder -> split.
        within: the folder that these lie in, with a slash; empty for the source's own.
    """
    listing = source.listing
    others = {within + top: split for top, split in sorted(splits.items()) if split != "train"}
    counts = {top: sum(name.startswith(f"{top}/") for name in listing.pictures) for top in others}
    counted = " and ".join(f"{printable(top)} ({count})" for top, count in counts.items() if count)
    if counted:
        val = next((top for top, split in others.items() if split == "val"), None)
        more = f"; validation={printable(source.root / val)} judges by it" if val is not None else ""
        source.notes.append(f"not learned from, as the name of a split says: {counted}{more}")
    below = tuple(f"{top}/" for top in others)
    pictures, rest = ([n for n in names if not n.startswith(below)] for names in (listing.pictures, listing.others))
    return replace(listing, pictures=pictures, others=rest)


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{printable(root)} is a file, not a folder; pass the folder that holds the pictures.")
    raise DataError(missing(root))


def _without(listing: Listing, root: Path, others: Iterable[Path]) -> Listing:
    """The listing without what lies in others: folders of masks, or folders and tables that are read by themselves."""
    own = root.resolve()
    inside = [path.relative_to(own).as_posix() for path in (o.resolve() for o in others) if own in path.parents]
    if not inside:
        return listing
    below = tuple(f"{name}/" for name in inside)
    pictures, rest = (
        [name for name in names if name not in inside and not name.startswith(below)]
        for names in (listing.pictures, listing.others)
    )
    return replace(listing, pictures=pictures, others=rest)


# What it looks like.


def looked_at(source: Source, known: FactsOfFolder, before: int, total: int, progress: Told | None) -> Looks:
    """Decodes every picture that is new, or whose mask is: adds notes on conversions and problems to the source."""
    looks = Looks()
    converted: dict[str, list[str]] = {}
    for done, (name, path) in enumerate(source.pictures.items(), before + 1):
        try:
            if source.masks is None:
                fact = known.of(path) or known.look(path, name)[0]
            else:
                fact, looks.masks[name] = _with_mask(source.masks, known, name, path)
        except DataError as error:
            source.problems.append(str(error))
        else:
            looks.facts[name] = fact
            if fact.note:
                converted.setdefault(fact.note, []).append(name)
        if progress is not None:
            progress("Checking pictures", done, total)
    source.notes += [f"{note}: {first_names(names)}" for note, names in converted.items()]
    return looks


def _with_mask(masks: Masks, known: FactsOfFolder, name: str, path: Path) -> tuple[Fact, tuple[Path, str, Box]]:
    """What is known of a picture and its mask; both are decoded where one of them is new."""
    file = masks.file_of(name)
    fact, mask = known.of(path), known.mask_of(path, file)
    if fact is None or mask is None:
        stamp = stamp_of(file)
        fact, decoded = known.look(path, name)
        mask = known.add_mask(path, file, stamp, masks.check(name, decoded))
    return fact, (file, mask.sha256, mask.learned)
