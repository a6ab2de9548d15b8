"""Reads the parts of a diffusers folder that have weights, one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.models.loading import check_loaded, loaded

WEIGHTS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}
"""What the files of weights of a library are called, up to the first dot; those of shards have more, their index has not."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""With weights, of what visionlora opens."""
VARIANT = "fp16"
"""Whose files are taken where there are no plain ones."""


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
