"""What the pictures of a source are called: captions found beside them, from their names, or one for all.

In: a `Source`. Out: captions by picture; the source learns where they come from, and what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from visionlora.data.captions import METADATA_FILES, SIDECAR_SUFFIXES, Captions, caption_of_name, read_captions
from visionlora.data.files import suffix_of
from visionlora.data.images import legible, printable
from visionlora.data.named_repeats import named
from visionlora.data.sources import Source
from visionlora.data.wording import (
    count_of,
    first_names,
    in_several_rows,
    quoted,
)
from visionlora.errors import DataError

OF_ALL = ("caption", "captions", "meta_cap", "metadata")
"""Names by which other trainers keep the captions of all pictures in one file of JSON or text."""
TRIGGER = "sks"
"""A rare word, free to get a meaning in training."""


def texts_of(source: Source) -> tuple[dict[str, str], Captions]:
    """Captions by picture, and what was found in the folder; the source learns where they come from."""
    prompt, words, unpacked = source.config.prompt, source.words, source.unpacked
    if unpacked is not None:
        captions = Captions(unpacked.captions, {unpacked.source: len(unpacked.captions)}, (), frozenset())
        if not unpacked.captions:
            captions = Captions({}, {}, (), frozenset())
    else:
        captions = read_captions(source.root, source.pictures, source.listing.others, words.for_all, source.left)
    if prompt is not None:
        source.caption_source = _prompt_source(words.prompt, prompt, captions)
        return dict.fromkeys(source.pictures, prompt.strip()), captions
    if source.config.captions == "filename":
        return _from_names(source, captions)
    source.notes += unread(source, captions)
    if captions.joined:
        source.notes.append(
            f"of several lines, which make one caption: {first_names(captions.joined)}; for one of them each time write "
            "{one|other}"
        )
    source.notes += in_several_rows(captions.several)
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
    text, why = _instance_prompt(source.root)
    source.caption_source = f'no captions in the folder, so all pictures get "{text}" ({why}); {words.changes}'
    return dict.fromkeys(source.pictures, text), captions


def unread(source: Source, captions: Captions) -> list[str]:
    """A note on files that may hold captions, where pictures have none: JSON beside them, tables and texts of other names."""
    lacking = {name for name in source.pictures if name not in captions.texts}
    owners = lacking | {PurePosixPath(name).with_suffix("").as_posix() for name in lacking}
    files = [
        f
        for f in source.listing.others
        if (suffix_of(f) == ".json" and f[: -len(".json")] in owners)
        or (lacking and suffix_of(f) in (".csv", ".jsonl", ".tsv") and PurePosixPath(f).name not in METADATA_FILES)
        or (lacking and suffix_of(f) in (".json", ".txt") and PurePosixPath(f).stem.lower() in OF_ALL)
    ]
    where = f"{' and '.join(SIDECAR_SUFFIXES)} files, {' and '.join(METADATA_FILES)}"
    return [f"not read: {first_names(files)}; captions are read from {where}"] if files else []


def _from_names(source: Source, captions: Captions) -> tuple[dict[str, str], Captions]:
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


def _instance_prompt(root: Path) -> tuple[str, str]:
    """A caption from the name of a folder, and how it was made."""
    name = legible(root.resolve().name)
    if (said := named(name)) is not None:
        return said[1], "the folder's name, as kohya reads it; all pictures count alike"
    return trigger_caption(root), "a rare word and the folder's name"


def trigger_caption(root: Path) -> str:
    """The caption of pictures for which nobody has said any word."""
    words = legible(root.resolve().name).lower().replace("_", " ").replace("-", " ").split()
    return " ".join([TRIGGER, *words])


def _prompt_source(option: str, prompt: str, captions: Captions) -> str:
    unused = f"; the captions in {' and '.join(map(printable, captions.sources))} are not used"
    return f'{option}: all pictures get "{prompt.strip()}"{unused if captions.sources else ""}'


def _found_source(captions: Captions, others: Mapping[str, int]) -> str:
    counts = [f"{printable(source)} ({count})" for source, count in {**captions.sources, **others}.items() if count]
    return f"captions from {' and '.join(counts)}"


def missing_captions(source: Source, names: list[str], total: int) -> str:
    """What to say of pictures without a caption, among so many."""
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
