"""Which adapters a prompt is drawn with: their files, how recipes call them, and their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from visionlora.config import GenerateConfig
from visionlora.config.choices import EMBEDDED_SD, may_be_on_hub, missing_beside
from visionlora.diffusion.given import named
from visionlora.diffusion.recipe import LoraUse, Recipe, take_tags
from visionlora.errors import AdapterFileError, ConfigError, DataError, nearest
from visionlora.formats.called import names_of
from visionlora.formats.container import file_hashes
from visionlora.formats.container import missing as missing_file
from visionlora.formats.inspection import settings_beside, weights_file


def uses_of(prompt: str, config: GenerateConfig) -> list[LoraUse]:
    """The adapters of one prompt: those of the command, and those that its tags name, whose scale counts.

    Raises:
        ConfigError: when a tag names no adapter.
    """
    named_so = zip(names_of(path for path, _, _ in config.loras), config.loras, strict=True)
    uses = {name: LoraUse(name, *lora) for name, lora in named_so}
    for name, scale in take_tags(prompt)[1]:
        if name in uses:
            uses[name] = replace(uses[name], scale=scale)
            continue
        uses[name] = LoraUse(name, str(tagged(name, config.lora_folder, uses)), scale)
    return [hashed(use) for use in uses.values()]


def tagged(name: str, folder: Path, others: Iterable[str]) -> Path:
    """The adapter that a tag names, in a folder or, as in A1111, below it.

    Args:
        name: a run, or a file without its suffix.
        folder: to look in; below the working folder, which was not chosen for it, nothing is looked for.
        others: names of those that are given.

    Raises:
        ConfigError: when there is none, or more than one.
    """
    for path in (folder / f"{name}.safetensors", folder / name):
        if path.exists():
            return path
    files = sorted(folder.glob("*.safetensors" if folder == Path() else "**/*.safetensors"))
    if len(found := [p for p in files if p.stem == name]) == 1:
        return found[0]
    if found:
        several = ", ".join(f"<lora:{p.relative_to(folder).with_suffix('').as_posix()}>" for p in found)
        raise ConfigError(f"The prompt names an adapter {name!r}, and there are several: write one of {several}.")
    there = [*others, *(p.stem for p in files)]
    hint = nearest(name, there) if there else "Give it with --lora, or name its folder with --lora-folder."
    raise ConfigError(f"The prompt names an adapter {name!r}, which is not there. {hint}")


def check_once(loras: Iterable[tuple[str, float, Mapping[str, float]]]) -> None:
    """Raises ConfigError when a file is given twice: both would act, at the sum of their scales.

    Args:
        loras: path, scale and factors by block of each, as in `GenerateConfig.loras`.
    """
    there: dict[Path, LoraUse] = {}
    for path, scale, blocks in loras:
        use = LoraUse("", path, scale, blocks)
        before = there.setdefault(weights_file(Path(path).expanduser()).resolve(), use)
        if before is not use:
            raise ConfigError(
                f"The adapter {path} is given twice, as {before.word()} and {use.word()}: give it once, at the scale that "
                f"is meant, such as {use.word()}."
            )


def hashed(use: LoraUse) -> LoraUse:
    """With the hashes of its file, which is read again only when it has changed.

    Raises:
        AdapterFileError: when there is none.
    """
    file = weights_file(Path(use.path).expanduser())
    if not file.is_file():
        raise missing_file(Path(use.path).expanduser())
    states = ((f, f.stat()) for f in (file, *settings_beside(file)))
    tensors, whole = hashes_in_state(tuple((f, state.st_size, state.st_mtime_ns) for f, state in states))
    return replace(use, hash=tensors, file_hash=whole)


@lru_cache(maxsize=1024)
def hashes_in_state(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, str]:
    """AutoV3 of a file, and the hash of it and all that belongs to it; they have these sizes and times of change."""
    first, *others = (file_hashes(file) for file, _, _ in files)
    parts = [found["sha256"] for found in (first, *others)]
    whole = hashlib.sha256("".join(parts).encode()).hexdigest() if others else parts[0]
    return first.get("AutoV3", first["sha256"]), whole


def changed_since(recipe: Recipe) -> list[str]:
    """A line about each file of a recipe that is not here, or is no longer what it was."""
    regions = recipe.compose_options.get("regions", {})
    pictures = {
        recipe.init_image: recipe.init_hash, recipe.mask: recipe.mask_hash, recipe.control: recipe.control_hash,
        **{str(regions[name]): hash for name, hash in recipe.region_hashes.items()},
    }  # fmt: skip
    before = {use.path: (use.hash, use.file_hash) for use in recipe.loras}
    before |= {path: ("", hash) for path, hash in pictures.items() if path}
    uses = {use.path: use for use in recipe.loras}
    lines = [line for model in (recipe.model, recipe.controlnet) if (line := missing(model))]
    for path, hashes in before.items():
        try:
            if path in uses:
                use = hashed(uses[path])
                now = use.hash, use.file_hash
            else:
                now = "", named(Path(path), "picture")[1]
        except (AdapterFileError, DataError):
            lines.append(f"{path} is not here.")
            continue
        if any(was and was != found for was, found in zip(hashes, now, strict=True)):
            lines.append(f"{path} has other contents than when the picture was drawn.")
    return lines


def missing(model: str) -> str:
    """What is said of a model that is not here; nothing where it is, or looks like an id of the Hub."""
    if model in ("", EMBEDDED_SD) or Path(model).expanduser().exists():
        return ""
    if not may_be_on_hub(model):
        return f"{model} is not here."
    return f"{model} is not here. {beside}" if (beside := missing_beside(model)) else ""
