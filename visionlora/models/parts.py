"""Reads the parts of a diffusers folder that have weights, one by one, and tells what the folder lacks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.errors import ModelError
from visionlora.models.loading import check_loaded, loaded

WEIGHTS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}
"""What the files of weights of a library are called, up to the first dot; those of shards have more, their index has not."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""With weights, of what visionlora opens."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULER = "scheduler"
VARIANT = "fp16"
"""Whose files are taken where there are no plain ones."""
AGAIN = "Copy or download the folder again."
VOCABULARIES = ("tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""Files that hold all words of a tokenizer."""


def kinds_in(index: Mapping[str, Any]) -> dict[str, tuple[str, type[nn.Module]]]:
    """Library and class of each part with weights, by a model_index.json; without those of other libraries."""
    found = {}
    for part in PARTS:
        library, name = index.get(part) or (None, None)
        if library in WEIGHTS and (kind := getattr(import_module(library), str(name), None)) is not None:
            found[part] = (str(library), kind)
    return found


def read_parts(id: str, folder: Path, index: Mapping[str, Any], variant: str | None) -> dict[str, nn.Module]:
    """The parts of a folder that have weights.

    Args:
        id: as the user named the model, for messages.
        folder: of diffusers.
        index: what its model_index.json says.
        variant: of the files, where a part has such; None for the plain ones.

    Raises:
        ModelError: when a part's weights are not those of its configuration.
    """
    found = {}
    for part, (library, kind) in kinds_in(index).items():
        own = variant if variant is not None and has_weights(names_in(folder / part), library, variant) else None
        found[part] = read_part(
            f"The model {id} cannot be opened: the weights of its {part}", library, kind, folder / part, own
        )
    return found


def read_part(
    what: str, library: str, kind: Any, source: str | Path, variant: str | None = None, **more: Any
) -> nn.Module:
    """One part, whole.

    Args:
        what: begins the message of a refusal: whose weights they are.
        library: diffusers or transformers.
        kind: its class.
        source: a folder or a Hub id.
        variant: of the files; None for the plain ones.
        more: for `from_pretrained`.

    Raises:
        ModelError: when the weights are not those of the configuration.
    """
    model, info = loaded(what, library, kind, source, **({"variant": variant} if variant else {}), **more)
    check_loaded(what, model, info)
    return model


def names_in(folder: Path) -> set[str]:
    """Of the files in a folder; none where there is no folder."""
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def has_weights(names: Collection[str], library: str, variant: str | None) -> bool:
    """Whether there are weights that the library looks for.

    Args:
        names: of the files in the folder of a part.
        library: diffusers or transformers.
        variant: of the files; None for the plain ones.
    """
    more = "" if variant is None else rf"\.{variant}"
    stems = "|".join(WEIGHTS[library])
    ours = re.compile(rf"({stems})({more}\.(safetensors|bin)|\.(safetensors|bin)\.index{more}\.json)")
    return any(ours.fullmatch(name) for name in names)


def has_all_weights(folder: Path, index: Mapping[str, Any]) -> bool:
    """Whether each part has plain files of weights."""
    return all(has_weights(names_in(folder / part), library, None) for part, (library, _) in kinds_in(index).items())


def check_files(id: str, folder: Path, index: Mapping[str, Any]) -> None:
    """Raises ModelError where a part lacks a file, naming it; the libraries would go on without some of them.

    Args:
        id: as the user named the model.
        folder: of diffusers.
        index: what its model_index.json says.
    """
    for part in (*PARTS, *TOKENIZERS, SCHEDULER):
        library = (index.get(part) or [None])[0]
        if library not in WEIGHTS:
            continue
        own = folder / part
        start, there = f"The model {id} cannot be opened: its {part}", sorted(names_in(own))
        if not own.is_dir():
            raise ModelError(f"{start} is missing: there is no folder {own}. {AGAIN}")
        if (lack := lacking(part, str(library), there)) is not None:
            instead = f" (there: {', '.join(there)})" if there else ""
            raise ModelError(f"{start} has no {lack[0]}: {own} has {lack[1]}{instead}. {AGAIN}")


def lacking(part: str, library: str, there: Collection[str]) -> tuple[str, str] | None:
    """What a part has not, and by which files that is told; None for a whole one.

    Args:
        part: its name.
        library: diffusers or transformers.
        there: the files in its folder.
    """
    if part in TOKENIZERS:
        whole = {"vocab.json", "merges.txt"} <= set(there) or not set(VOCABULARIES).isdisjoint(there)
        return None if whole else ("vocabulary", "neither tokenizer.json nor vocab.json with merges.txt")
    config = "scheduler_config.json" if part == SCHEDULER else "config.json"
    if config not in there:
        return "configuration", f"no {config}"
    if part == SCHEDULER or any(has_weights(there, library, variant) for variant in (None, VARIANT)):
        return None
    plain = f"{WEIGHTS[library][0]}.safetensors"
    return "weights", f"no {plain}, nor such weights as .{VARIANT} or .bin, nor an index of their parts"


def check_words(id: str, part: str, tokenizer: Any, encoder: Any) -> None:
    """Raises ModelError for a tokenizer that makes the same of every text, or does not know where texts end.

    Args:
        id: as the user named the model.
        part: name of the tokenizer.
        tokenizer: of transformers.
        encoder: the text encoder that reads its tokens.
    """
    own = Path(str(tokenizer.name_or_path)) / "tokenizer_config.json"
    most = int(encoder.config.max_position_embeddings)
    if tokenizer.model_max_length > most:
        raise ModelError(
            f"The model {id} cannot be opened: its {part} does not say how long a text may be (model_max_length is "
            f"{tokenizer.model_max_length:.9g}, its text encoder reads {most}): {own} is missing or another's. {AGAIN}"
        )
    if set(tokenizer("a", add_special_tokens=False).input_ids) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"The model {id} cannot be opened: its {part} knows no letters, so that all prompts would be the same to it: the "
            f"vocabulary in {own.parent} ({len(tokenizer)} tokens) is not whole. {AGAIN}"
        )
