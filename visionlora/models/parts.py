"""Reads the parts of a diffusers folder one by one, and refuses weights that are not those of their configuration.

The libraries fill what a file lacks with random values and say so to their logs alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionlora.errors import ModelError, first_line
from visionlora.models.state_dicts import differences

WEIGHTS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}
"""What the files of weights of a library are called, up to the first dot; those of shards have more, their index has not."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""With weights, of what visionlora opens."""
VARIANT = "fp16"
"""Whose files are taken where there are no plain ones."""
RESHAPED = re.compile(
    r"because (\S+) expected shape torch\.Size\(\[([\d, ]*)\]\), but got torch\.Size\(\[([\d, ]*)\]\)"
)
"""How diffusers says that a tensor has another shape."""


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
    if variant is not None:
        more["variant"] = variant
    if library == "transformers":  # which since version 5 reads fp32 files as the fp16 that a config.json may name
        more = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **more}
    try:
        model, info = kind.from_pretrained(source, output_loading_info=True, **more)
    except ValueError as e:
        if (found := RESHAPED.search(first_line(e))) is None:
            raise
        name, wanted, given = found.groups()
        raise not_its_own(what, wrong={name: (f"({given})", f"({wanted})")}) from None
    check_loaded(what, model, info)
    return model  # type: ignore[no-any-return]


def check_loaded(what: str, model: nn.Module, info: Mapping[str, Any], spare: re.Pattern[str] | None = None) -> None:
    """Raises ModelError when a library had to make up tensors.

    Args:
        what: begins the message: whose weights they are.
        model: as `from_pretrained` of diffusers or transformers gave it.
        info: what it told of the loading.
        spare: names that may be missing, or have another shape.
    """
    own = model.state_dict()
    empty = {
        n for n, t in own.items() if t.is_meta
    }  # of diffusers, also where an index promises more than its files hold
    missing = {n for n in {*info["missing_keys"], *empty} if spare is None or not spare.match(n)}
    wrong = {}
    for given in info["mismatched_keys"]:  # names alone before transformers 5
        name, *shapes = (given,) if isinstance(given, str) else given
        if spare is None or not spare.match(name):
            wrong[name] = (str(tuple(shapes[0])) if shapes else "another size", str(tuple(own[name].shape)))
    if missing or wrong:
        raise not_its_own(what, missing, info["unexpected_keys"], wrong)


def not_its_own(
    what: str,
    missing: Collection[str] = (),
    extra: Collection[str] = (),
    wrong: Mapping[str, tuple[str, str]] | None = None,
) -> ModelError:
    """For weights that are not those of their configuration."""
    return ModelError(
        f"{what} are not those of its config.json: the file {differences(missing, extra, wrong or {})}. "
        "Copy or download the folder again, with versions of its libraries as new as those that saved it."
    )


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
