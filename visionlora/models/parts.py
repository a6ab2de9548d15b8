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
        own = variant if variant is not None and has_weights(folder / part, library, variant) else None
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


def has_weights(folder: Path, library: str, variant: str | None) -> bool:
    """Whether there are files of weights that the library looks for.

    Args:
        folder: of one part.
        library: diffusers or transformers.
        variant: of the files; None for the plain ones.
    """
    more = "" if variant is None else rf"\.{variant}"
    names = "|".join(WEIGHTS[library])
    ours = re.compile(rf"({names})({more}\.(safetensors|bin)|\.(safetensors|bin)\.index{more}\.json)")
    return folder.is_dir() and any(ours.fullmatch(file.name) for file in folder.iterdir())


def has_all_weights(folder: Path, index: Mapping[str, Any]) -> bool:
    """Whether each part has plain files of weights."""
    return all(has_weights(folder / part, library, None) for part, (library, _) in kinds_in(index).items())


def check_tokenizers(id: str, folder: Path, index: Mapping[str, Any]) -> None:
    """Raises ModelError where a tokenizer has no words in its folder: transformers makes an empty one without a word.

    Args:
        id: as the user named the model.
        folder: of diffusers.
        index: what its model_index.json says.
    """
    for part in ("tokenizer", "tokenizer_2"):
        if (index.get(part) or [None])[0] != "transformers":
            continue
        if not (own := folder / part).is_dir():
            raise ModelError(
                f"The model {id} cannot be opened: its {part} is missing: there is no folder {own}. {AGAIN}"
            )
        there = {file.name for file in own.iterdir()}
        if not there & set(VOCABULARIES) and not {"vocab.json", "merges.txt"} <= there:
            raise ModelError(
                f"The model {id} cannot be opened: its {part} has no vocabulary: {own} has neither tokenizer.json nor "
                f"vocab.json with merges.txt{listed(there)}. {AGAIN}"
            )


def listed(names: Collection[str]) -> str:
    """What is there instead, in brackets."""
    return f" (there: {', '.join(sorted(names))})" if names else ""


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
