"""Any adapter file -> the in-memory form. The format is told by the content, never by the name of the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from visionlora.errors import AdapterFileError
from visionlora.formats import cloneofsimo, native, peft
from visionlora.formats.container import Contents, open_file
from visionlora.formats.embeddings import take_embeddings
from visionlora.formats.header import info_in
from visionlora.formats.names import FLAT_PREFIXES
from visionlora.formats.parts import Scale, check_used, rank_as_alpha, take_modules
from visionlora.formats.whole import without_told_by
from visionlora.lora.adapter import Adapter
from visionlora.lora.inject import no_garbage_collection

FOLDER_FILES = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What a folder that is not PEFT's may hold: a run of ours, or what diffusers' scripts save."""
EMBEDDING = "embedding"
"""The format of names that are of no adapter's layers."""
CHECKPOINT = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "conditioner.embedders.")


@no_garbage_collection()
def read(path: Path, allow_partial: bool = False) -> Adapter:
    """Reads a file or folder of any known trainer.

    Args:
        path: a file, a run folder, a folder of PEFT's or one with diffusers' pytorch_lora_weights.
        allow_partial: leave out tensors that nothing here takes (they are listed in `Adapter.unused`).

    Raises:
        AdapterFileError: when the file is missing, broken, of no known format, incomplete, holds NaN or infinite values,
            or has a tensor that nothing takes.
    """
    if peft.is_folder(path):
        return peft.read(path, allow_partial=allow_partial)
    path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    contents = open_file(path)
    if "visionlora" in contents.metadata:
        return native.parse(contents)
    check_kind(contents)
    if peft.lacks_its_scale(contents):
        return peft.read(path.parent, allow_partial=allow_partial, weights=path)
    tensors = dict(contents.tensors)
    if cloneofsimo.matches(tensors):
        embeddings = take_embeddings(path, tensors)
        modules, unused = cloneofsimo.take(path, tensors), sorted(tensors)
    else:
        embeddings = take_embeddings(path, tensors)
        modules, unused = take_modules(path, tensors, scale_in(contents))
    check_used(path, unused, bool(modules or embeddings), allow_partial)
    return Adapter(
        without_told_by(modules),
        info_in(contents.metadata),
        embeddings,
        format_of(contents.tensors),
        contents.metadata,
        tuple(unused),
    )


def check_kind(contents: Contents) -> None:
    """Raises AdapterFileError for a file that is no adapter at all."""
    if any(key.startswith(CHECKPOINT) for key in contents.tensors):
        raise AdapterFileError(
            f"{contents.path} is a whole model, not an adapter. Open it with --model, or get an adapter from it with "
            f"`visionlora extract BASE {contents.path.name}`."
        )
    if not contents.tensors:
        raise AdapterFileError(f"{contents.path} holds no tensors.")


def format_of(keys: Iterable[str]) -> str:
    """Whose spelling it is, for reports."""
    text = "\n".join(keys)  # one search in one text is much faster than one in each of thousands of names

    def has(pattern: str) -> bool:
        return re.search(pattern, text, re.MULTILINE) is not None

    lycoris = has(r"\.(hada_|lokr_|oft_blocks|w_norm|b_norm|diff|on_input|lora_mid)")
    if has(r"^(unet|text_encoder):\d+:(up|down)$"):
        return "cloneofsimo"
    if has("^(" + "|".join(FLAT_PREFIXES) + ")"):
        return "lycoris" if lycoris or has("^lycoris_") else "kohya"
    if has(r"\.processor\."):
        return "diffusers (attention processors)"
    if has(r"\.lora(_linear_layer)?\.(down|up)\.weight$"):
        return "diffusers (training scripts)"
    if has(r"\.lora_[ABE]\b"):
        return "diffusers" if has(r"^(unet|text_encoder(_2)?)\.") else "peft"
    return "lycoris" if lycoris or "lora" in text else EMBEDDING


# --------------------------------------------------------------------------------------------------------------- scale


def scale_in(contents: Contents) -> Scale:
    """How alpha follows from the header, for diffusers' files; equal to the rank where it says nothing.

    Raises:
        AdapterFileError: when the header is broken or does not say what it must.
    """
    text = contents.metadata.get("lora_adapter_metadata")
    if text is None:
        return rank_as_alpha
    try:
        found = dict(json.loads(text))
        configs = {"": found} if "r" in found or "lora_alpha" in found else by_component(found)
        for config in configs.values():
            peft.check_start(contents.path, config.get("init_lora_weights"))
        usable = {c: (float(e.get("lora_alpha", e.get("r")) or 0), e) for c, e in configs.items()}
    except AdapterFileError:
        raise
    except (ValueError, TypeError, AttributeError) as e:
        raise AdapterFileError(
            f"{contents.path} has a broken header ({type(e).__name__}: {e}). Copy it again."
        ) from None

    def alpha_of(component: str, path: str, rank: int) -> float:
        alpha, config = usable.get(component, usable.get("", (float(rank), {})))
        return peft.effective_alpha(config, path, rank, alpha)

    return alpha_of


def by_component(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`unet.r` and so on, taken apart."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found
