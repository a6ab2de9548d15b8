"""visionlora's own adapter file: one safetensors that describes itself and loads in diffusers as it is.

Tensors: ``<component>.<module>.lora_A.weight`` and ``.lora_B.weight`` (PEFT's dotted spelling, which diffusers reads),
with ``.lora_magnitude_vector`` for DoRA (and ``.weight`` after it for text encoders); the names of the other kinds are in
`TENSOR_KEYS`, those not there after a dot.
Embeddings: ``visionlora_embedding.<component>.<token>``; diffusers refuses files with a key that has no `lora` in it.
Header, all values strings:
    visionlora                JSON: format_version, base, config; kind, alpha, rank, options and (where they vary) tensors
                              per module; trigger, training
    lora_adapter_metadata     JSON as diffusers writes it: `unet.r`, `unet.lora_alpha`, `unet.alpha_pattern` …
    ss_*, modelspec.*         what A1111, Civitai and ComfyUI show; `sshs_model_hash` is the SHA-256 of the bytes after
                              the header (AutoV3)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.formats.container import Contents, open_file
from visionlora.formats.embeddings import check_vectors
from visionlora.formats.header import (
    as_json,
    diffusers_metadata,
    hashed,
    magnitude_key,
    mixes_dora,
    network_metadata,
    peft_magnitude,
    write_file,
)
from visionlora.formats.parts import check_finite, not_finite
from visionlora.lora.adapter import MODULE_KINDS, Adapter, AdapterModule

FORMAT_VERSION = 1
TENSOR_KEYS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lambda_b": ".vera_lambda_b",
    "lambda_d": ".vera_lambda_d",
    "vector": ".ia3_l",
    "value": ".value",
}
"""What follows a module's name, by the name of the tensor in memory."""
ROW_MAGNITUDE = ".row_magnitude"
EMBEDDING = "visionlora_embedding."
USUAL = {
    "lora": ("lora_A", "lora_B"),
    "tlora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "magnitude"),
    "vera": ("lambda_b", "lambda_d"),
    "ia3": ("vector",),
    "full": ("value",),
}
"""Tensors that the header need not list."""


def key_of(name: str, tensor: str, options: Mapping[str, Any], mixed: bool = False) -> str:
    """A tensor's name in the file.

    Magnitudes of columns are not under the name that diffusers reads, which knows rows alone: it refuses the file then; and so
    it is with all of them where a part is `mixed`, with LoRA on other layers.
    """
    if "least" in options:  # T-LoRA: whoever took its tensors for LoRA's would apply all of it at every timestep
        return f"{name}.timed_{tensor[-1]}"
    if tensor == "magnitude" and options.get("axis") == "in":
        return name + ".column_magnitude"
    if tensor == "magnitude":
        return name + (ROW_MAGNITUDE if mixed else magnitude_key(name))
    return name + TENSOR_KEYS.get(tensor, "." + tensor)


def described(module: AdapterModule) -> dict[str, Any]:
    """What the header says of a module."""
    entry: dict[str, Any] = {"kind": module.kind, "rank": module.rank, "alpha": module.alpha}
    if module.options:
        entry["options"] = dict(module.options)
    if set(module.tensors) != set(USUAL.get(module.kind, ())):
        entry["tensors"] = sorted(module.tensors)
    return entry


def to_bytes(adapter: Adapter, extra: Mapping[str, str]) -> bytes:
    """The whole file."""
    tensors: dict[str, Tensor] = {}
    mixed = {c for c in adapter.components if mixes_dora(adapter, c)}
    for name, m in adapter.modules.items():
        for what, tensor in m.tensors.items():
            plain = what == "magnitude" and "lora_A" in m.tensors and not m.options
            tensors[key_of(name, what, m.options, name.partition(".")[0] in mixed)] = (
                peft_magnitude(tensor, m) if plain else tensor
            )
    for token, parts in adapter.embeddings.items():
        tensors |= {f"{EMBEDDING}{component}.{token}": vectors for component, vectors in parts.items()}
    header = {
        **adapter.info,
        "format_version": FORMAT_VERSION,
        "modules": {name: described(m) for name, m in sorted(adapter.modules.items())},
    }
    if adapter.embeddings:
        header["embeddings"] = {token: sorted(parts) for token, parts in adapter.embeddings.items()}
    metadata = {
        "format": "pt",
        "visionlora": as_json(header),
        "lora_adapter_metadata": as_json(diffusers_metadata(adapter)),
        **network_metadata(adapter),
        **extra,
    }
    return hashed(tensors, metadata)


def write(adapter: Adapter, path: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes atomically.

    Raises:
        AdapterFileError: when the file cannot be written.
    """
    write_file(path, to_bytes(adapter, extra or {}))


def read(path: Path) -> Adapter:
    """Reads one of our files; every tensor is used or the file is refused.

    Raises:
        AdapterFileError: when the file is missing, broken, not ours, incomplete, or holds NaN or infinite values.
    """
    contents = open_file(path)
    if "visionlora" not in contents.metadata:
        raise AdapterFileError(f"{path} was not written by visionlora: its header has no `visionlora` entry.")
    return parse(contents)


def parse(contents: Contents) -> Adapter:
    """The adapter in one of our files.

    Raises:
        AdapterFileError: when it is incomplete, of a newer version, or holds NaN or infinite values.
    """
    path, tensors = contents.path, dict(contents.tensors)
    try:
        info = dict(json.loads(contents.metadata["visionlora"]))
        version, listed = int(info.pop("format_version", 0)), dict(info.pop("modules", {}))
        tokens = {str(t): [str(c) for c in parts] for t, parts in dict(info.pop("embeddings", {})).items()}
        entries = {str(name): entry_of(dict(e)) for name, e in listed.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise AdapterFileError(
            f"{path} has a broken header ({type(e).__name__}: {e}). Copy or download it again."
        ) from None
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than this visionlora reads "
            f"({FORMAT_VERSION}): update visionlora."
        )
    modules = {name: take_module(path, name, entry, tensors) for name, entry in entries.items()}
    embeddings = {
        token: {c: take_tensor(path, f"{EMBEDDING}{c}.{token}", tensors) for c in parts}
        for token, parts in tokens.items()
    }
    if tensors:
        raise AdapterFileError(
            f"{path} has {len(tensors)} tensors that its header does not list, the first "
            f"{sorted(tensors)[0]!r}: the file was changed by another tool."
        )
    check_finite(path, modules)
    check_vectors(path, embeddings)
    return Adapter(modules, info, embeddings, "visionlora", contents.metadata)


@dataclass(frozen=True)
class Listed:
    """What the header says of a module."""

    kind: str
    alpha: float
    options: Mapping[str, Any]
    tensors: tuple[str, ...]


def entry_of(entry: Mapping[str, Any]) -> Listed:
    """A module's entry in the header."""
    kind = str(entry.get("kind", "lora"))
    names = tuple(str(n) for n in entry.get("tensors", USUAL.get(kind, ())))
    return Listed(kind, float(entry["alpha"]), dict(entry.get("options", {})), names)


def key_there(name: str, tensor: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A tensor's name in a file at hand; for magnitudes there are several."""
    key = key_of(name, tensor, options)
    others = (name + ROW_MAGNITUDE, key.removesuffix(".weight")) if tensor == "magnitude" else ()
    return next((k for k in (key, *others) if k in tensors), key)


def take_tensor(path: Path, key: str, tensors: dict[str, Tensor]) -> Tensor:
    """One tensor out of `tensors`.

    Raises:
        AdapterFileError: when it is not there.
    """
    if key not in tensors:
        raise AdapterFileError(f"{path} lacks the tensor {key!r} that its header lists.")
    return tensors.pop(key)


def take_module(path: Path, name: str, entry: Listed, tensors: dict[str, Tensor]) -> AdapterModule:
    """One module out of `tensors`, checked.

    Raises:
        AdapterFileError: when its kind is unknown, a tensor is missing, or its values cannot be used.
    """
    if entry.kind not in MODULE_KINDS:
        raise AdapterFileError(
            f"{path} has a module of kind {entry.kind!r} ({name!r}), which this visionlora does not know "
            f"({', '.join(MODULE_KINDS)}): update visionlora."
        )
    own = {what: take_tensor(path, key_there(name, what, entry.options, tensors), tensors) for what in entry.tensors}
    if "magnitude" in own:
        own["magnitude"] = own["magnitude"].flatten()
    module = AdapterModule(entry.kind, own, entry.alpha, entry.options)
    if why := module.problem():
        raise AdapterFileError(f"{path} has an adapter for {name!r} that cannot be used: {why}.")
    if not math.isfinite(module.alpha):
        raise not_finite(path, name)
    return module
