"""What adapter files are called in prompts, recipes and tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from visionlora.config.choices import WEIGHT_SUFFIXES
from visionlora.formats.peft import WEIGHTS
from visionlora.formats.read import FOLDER_FILES

SAME_EVERYWHERE = frozenset(Path(name).stem for name in (*FOLDER_FILES, WEIGHTS))
"""Names that trainers give to every file: the folder tells what it is."""


def name_of(path: str | Path) -> str:
    """A file's name without its suffix; the folder's, where every run calls its file so.

    >>> name_of("loras/ink.v2.safetensors"), name_of("runs/dog/adapter.safetensors"), name_of("runs/dog")
    ('ink.v2', 'dog', 'dog')
    """
    given = Path(path)
    stem = given.stem if given.suffix in WEIGHT_SUFFIXES else given.name
    return given.parent.name if stem in SAME_EVERYWHERE and given.parent.name else stem


def names_of(paths: Iterable[str | Path]) -> list[str]:
    """Names that tell files apart, each another.

    >>> names_of(["runs/dog/adapter.safetensors", "ink.safetensors", "other/ink.safetensors"])
    ['dog', 'ink', 'other/ink']
    """
    found: list[str] = []
    for path in paths:
        stem = name = name_of(path)
        if name in found:
            stem = name = f"{Path(path).parent.name}/{stem}"
        number = 1
        while name in found:
            name, number = f"{stem}-{number + 1}", number + 1
        found.append(name)
    return found
