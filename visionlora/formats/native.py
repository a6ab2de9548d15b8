"""visionlora's own adapter file: one safetensors that describes itself and loads in diffusers as it is.

Tensors: ``<component>.<module>.lora_A.weight`` and ``.lora_B.weight`` (PEFT's dotted spelling, which diffusers reads),
with ``.lora_magnitude_vector`` for DoRA; the names of the other kinds are in `TENSOR_KEYS`.
Header, all values strings:
    visionlora                JSON: format_version, base, config; kind, alpha, rank and options per module; trigger, training
    lora_adapter_metadata     JSON as diffusers writes it: `unet.r`, `unet.lora_alpha`, `unet.alpha_pattern` …
    ss_*, modelspec.*         what A1111, Civitai and ComfyUI show; `sshs_model_hash` is the SHA-256 of the bytes after
                              the header (AutoV3)
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from visionlora.atomic import replace_file
from visionlora.errors import AdapterFileError
from visionlora.lora.adapter import TENSOR_NAMES, Adapter, AdapterModule

FORMAT_VERSION = 1
TENSOR_KEYS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "magnitude": ".lora_magnitude_vector",
    "lambda_b": ".vera_lambda_b",
    "lambda_d": ".vera_lambda_d",
    "vector": ".ia3_l",
    "value": ".value",
}
"""What follows a module's name, by the name of the tensor in memory."""
PIPELINE_PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Components that diffusers reads."""


def diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """The PEFT config of each component under flat keys, so that diffusers and PEFT apply alpha/rank as trained."""
    flat: dict[str, Any] = {}
    for component in adapter.components:
        modules = adapter.component(component)
        if component not in PIPELINE_PARTS or {m.kind for m in modules.values()} > {"lora", "dora"}:
            continue
        rank = Counter(m.rank for m in modules.values()).most_common(1)[0][0]
        alpha = Counter(m.alpha for m in modules.values()).most_common(1)[0][0]
        flat[f"{component}.r"] = rank
        flat[f"{component}.lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        flat[f"{component}.target_modules"] = sorted(modules)
        flat[f"{component}.rank_pattern"] = {n: m.rank for n, m in modules.items() if m.rank != rank}
        flat[f"{component}.alpha_pattern"] = {n: m.alpha for n, m in modules.items() if m.alpha != alpha}
        if any(m.kind == "dora" for m in modules.values()):
            flat[f"{component}.use_dora"] = True
    return flat


def peft_magnitude(magnitude: Tensor, module: AdapterModule) -> Tensor:
    """PEFT keeps the magnitude of a convolution as (1, o, 1, ...), that of a linear layer as (o,)."""
    spatial = module.tensors["lora_A"].dim() - 2
    return magnitude.view(1, -1, *(1,) * spatial) if spatial else magnitude


def described(module: AdapterModule) -> dict[str, Any]:
    """What the header says of a module."""
    entry: dict[str, Any] = {"kind": module.kind, "rank": module.rank, "alpha": module.alpha}
    return {**entry, "options": dict(module.options)} if module.options else entry


def tensor_hash(data: bytes) -> str:
    """SHA-256 of a safetensors file without its header: the hash that A1111 calls AutoV3."""
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def to_bytes(adapter: Adapter, extra: Mapping[str, str]) -> bytes:
    """The whole file."""
    tensors: dict[str, Tensor] = {}
    for name, m in adapter.modules.items():
        for what, tensor in m.tensors.items():
            shaped = peft_magnitude(tensor, m) if what == "magnitude" else tensor
            tensors[name + TENSOR_KEYS[what]] = shaped.contiguous()
    header = {
        **adapter.info,
        "format_version": FORMAT_VERSION,
        "modules": {name: described(m) for name, m in sorted(adapter.modules.items())},
    }
    metadata = {
        "format": "pt",
        "visionlora": json.dumps(header, sort_keys=True),
        "lora_adapter_metadata": json.dumps(diffusers_metadata(adapter), sort_keys=True),
        **extra,
    }
    # The hash covers the tensors alone, so it can be written into the header afterwards.
    digest = tensor_hash(save_tensors(tensors, metadata))
    whole: bytes = save_tensors(
        tensors, {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": "0x" + digest}
    )
    return whole


def write(adapter: Adapter, path: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes atomically.

    Raises:
        AdapterFileError: when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_bytes(adapter, extra or {}))
    except OSError as e:
        raise AdapterFileError(
            f"The adapter cannot be written to {path}: {e.strerror or e}. Choose another path."
        ) from None


def read(path: Path) -> Adapter:
    """Reads one of our files; every tensor is used or the file is refused.

    Raises:
        AdapterFileError: when the file is missing, broken, not ours, incomplete, or holds NaN or infinite values.
    """
    if not path.is_file():
        found = [p.name for p in sorted(path.glob("*.safetensors"))] if path.is_dir() else []
        hint = f" It is a folder with {', '.join(found)}: name the file." if found else ""
        raise AdapterFileError(f"There is no adapter file at {path}.{hint}")
    try:
        with safe_open(str(path), framework="pt") as file:  # maps the file: nothing is read twice
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as e:  # safetensors raises its own, undocumented kinds on broken bytes
        raise AdapterFileError(f"{path} is not a whole safetensors file ({e}). Copy or download it again.") from None
    if "visionlora" not in metadata:
        raise AdapterFileError(
            f"{path} was not written by visionlora: its header has no `visionlora` entry. Only "
            "visionlora's own adapter files are read so far."
        )
    try:
        info = dict(json.loads(metadata["visionlora"]))
        version, listed = int(info.get("format_version", 0)), info.pop("modules", {})
        entries = {
            str(name): (str(e.get("kind", "lora")), float(e["alpha"]), dict(e.get("options", {})))
            for name, e in dict(listed).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise AdapterFileError(
            f"{path} has a broken header ({type(e).__name__}: {e}). Copy or download it again."
        ) from None
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than this visionlora reads "
            f"({FORMAT_VERSION}): update visionlora."
        )
    modules = {name: take_module(path, name, entry, tensors) for name, entry in entries.items()}
    if tensors:
        raise AdapterFileError(
            f"{path} has {len(tensors)} tensors that its header does not list, the first "
            f"{sorted(tensors)[0]!r}: the file was changed by another tool."
        )
    check_finite(path, modules)
    return Adapter(modules, info)


def check_finite(path: Path, modules: Mapping[str, AdapterModule]) -> None:
    """Raises AdapterFileError when some value is NaN or infinite; both survive a sum, and one long sum is fast."""
    tensors = [t for m in modules.values() for t in m.tensors.values()]
    parts = [[t.reshape(-1) for t in tensors if t.dtype == dtype] for dtype in {t.dtype for t in tensors}]
    if not all(bool(torch.isfinite(torch.cat(part).sum(dtype=torch.float64))) for part in parts):
        bad = next(n for n, m in modules.items() if not all(torch.isfinite(t).all() for t in m.tensors.values()))
        raise not_finite(path, bad)


def not_finite(path: Path, name: str) -> AdapterFileError:
    """What a file of a training that diverged gets."""
    return AdapterFileError(f"{path} has NaN or infinite values in {name!r}: its training diverged.")


def take_module(
    path: Path, name: str, entry: tuple[str, float, dict[str, Any]], tensors: dict[str, Tensor]
) -> AdapterModule:
    """One module out of `tensors`, checked.

    Raises:
        AdapterFileError: when its kind is unknown, a tensor is missing, or its values cannot be used.
    """
    kind, alpha, options = entry
    if kind not in TENSOR_NAMES:
        raise AdapterFileError(
            f"{path} has a module of kind {kind!r} ({name!r}), which this visionlora does not know "
            f"({', '.join(TENSOR_NAMES)}): update visionlora."
        )
    try:
        own = {what: tensors.pop(name + TENSOR_KEYS[what]) for what in TENSOR_NAMES[kind]}
    except KeyError as e:
        raise AdapterFileError(f"{path} lacks the tensor {e.args[0]!r} that its header lists.") from None
    if "lora_A" in own:
        down, up = own["lora_A"], own["lora_B"]
        if down.dim() < 2 or up.dim() != down.dim() or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise AdapterFileError(
                f"{path} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)} in {name!r}, "
                "which cannot be multiplied."
            )
    if not math.isfinite(alpha):
        raise not_finite(path, name)
    if "magnitude" in own:
        own["magnitude"] = own["magnitude"].flatten()
    return AdapterModule(kind, own, alpha, options)
