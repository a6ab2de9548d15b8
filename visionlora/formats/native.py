"""visionlora's own adapter file: one safetensors that describes itself and loads in diffusers as it is.

Tensors: ``<component>.<module>.lora_A.weight`` and ``.lora_B.weight`` (PEFT's dotted spelling, which diffusers reads).
Header, all values strings:
    visionlora                JSON: format_version, base, config, alpha and rank per module, trigger, training
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
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from visionlora.atomic import replace_file
from visionlora.errors import AdapterFileError
from visionlora.lora.adapter import Adapter, AdapterModule

FORMAT_VERSION = 1
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """The PEFT config of each component under flat keys, so that diffusers and PEFT apply alpha/rank as trained."""
    flat: dict[str, Any] = {}
    for component in adapter.components:
        modules = adapter.component(component)
        rank = Counter(m.rank for m in modules.values()).most_common(1)[0][0]
        alpha = Counter(m.alpha for m in modules.values()).most_common(1)[0][0]
        flat[f"{component}.r"] = rank
        flat[f"{component}.lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        flat[f"{component}.target_modules"] = sorted(modules)
        flat[f"{component}.rank_pattern"] = {n: m.rank for n, m in modules.items() if m.rank != rank}
        flat[f"{component}.alpha_pattern"] = {n: m.alpha for n, m in modules.items() if m.alpha != alpha}
    return flat


def tensor_hash(data: bytes) -> str:
    """SHA-256 of a safetensors file without its header: the hash that A1111 calls AutoV3."""
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def to_bytes(adapter: Adapter, extra: Mapping[str, str]) -> bytes:
    """The whole file."""
    tensors: dict[str, Tensor] = {}
    for name, m in adapter.modules.items():
        tensors[name + ".lora_A.weight"] = m.lora_A.contiguous()
        tensors[name + ".lora_B.weight"] = m.lora_B.contiguous()
    header = {
        **adapter.info,
        "format_version": FORMAT_VERSION,
        "modules": {name: {"rank": m.rank, "alpha": m.alpha} for name, m in sorted(adapter.modules.items())},
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
    data = path.read_bytes()
    try:
        metadata = read_metadata(data)
        tensors = load_tensors(data)
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
        alphas = {str(name): float(entry["alpha"]) for name, entry in dict(listed).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise AdapterFileError(
            f"{path} has a broken header ({type(e).__name__}: {e}). Copy or download it again."
        ) from None
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than this visionlora reads "
            f"({FORMAT_VERSION}): update visionlora."
        )
    modules = {}
    for name, alpha in alphas.items():
        try:
            down, up = (tensors.pop(name + suffix) for suffix in SUFFIXES)
        except KeyError as e:
            raise AdapterFileError(f"{path} lacks the tensor {e.args[0]!r} that its header lists.") from None
        if down.dim() < 2 or up.dim() != down.dim() or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise AdapterFileError(
                f"{path} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)} in {name!r}, "
                "which cannot be multiplied."
            )
        if not (math.isfinite(alpha) and torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise AdapterFileError(f"{path} has NaN or infinite values in {name!r}: its training diverged.")
        modules[name] = AdapterModule(down, up, alpha)
    if tensors:
        raise AdapterFileError(
            f"{path} has {len(tensors)} tensors that its header does not list, the first "
            f"{sorted(tensors)[0]!r}: the file was changed by another tool."
        )
    return Adapter(modules, info)


def read_metadata(data: bytes) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return dict(header.get("__metadata__", {}))
