"""What every safetensors file of ours says to other tools: ss_* and modelspec.* entries, and the hash of its tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from visionlora.atomic import is_full, replace_file
from visionlora.errors import AdapterFileError, WriteError
from visionlora.formats.families import family_of, flat_shapes
from visionlora.formats.names import without_text_model
from visionlora.lora.adapter import Adapter, AdapterModule

WORDS = "visionlora.words"
"""JSON list of the words whose vectors were learned with an adapter, wherever these are."""
OWN = ("visionlora", WORDS, "lora_adapter_metadata", "format")
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""True of one file only, so they are never carried over to another."""
PIPELINE_PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Components that diffusers reads."""
LYCORIS_KINDS = ("loha", "lokr", "diff", "oft")
"""Kinds that LyCORIS' network module loads, and kohya's own does not."""


def most_common(values: Any) -> Any:
    """The value that occurs most often, the first of them on a tie."""
    return Counter(values).most_common(1)[0][0]


def plain_number(value: float) -> int | float:
    """A whole number without its point."""
    return int(value) if float(value).is_integer() else value


def diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """The PEFT config of each component under flat keys, so that diffusers and PEFT apply alpha/rank as trained.

    Names end as those of the layers do in every transformers: PEFT takes the ends of names, and refuses what it does not find.
    """
    flat: dict[str, Any] = {}
    for component in adapter.components:
        modules = adapter.component(component)
        modules = {
            without_text_model(component, n): m for n, m in modules.items() if m.product == "lora" and not m.options
        }
        if component not in PIPELINE_PARTS or not modules:
            continue
        rank, alpha = most_common(m.rank for m in modules.values()), most_common(m.alpha for m in modules.values())
        flat[f"{component}.r"] = rank
        flat[f"{component}.lora_alpha"] = plain_number(alpha)
        flat[f"{component}.target_modules"] = sorted(modules)
        flat[f"{component}.rank_pattern"] = {n: m.rank for n, m in modules.items() if m.rank != rank}
        flat[f"{component}.alpha_pattern"] = {n: m.alpha for n, m in modules.items() if m.alpha != alpha}
        if any(m.kind == "dora" for m in modules.values()):
            flat[f"{component}.use_dora"] = True
    return flat


def network_metadata(adapter: Adapter) -> dict[str, str]:
    """The least that A1111, Civitai and kohya's own tools look for.

    What the adapter carries from another file stays, except its rank and alpha: it may have been resized since.
    """
    if not set(adapter.components) & set(PIPELINE_PARTS):
        return carried(adapter)
    ranked = [m for m in adapter.modules.values() if m.rank]
    lycoris = any(m.product in LYCORIS_KINDS for m in adapter.modules.values())
    family = family_of(flat_shapes(adapter))
    found = {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
    }
    if family is not None:
        found["ss_base_model_version"] = family.kohya_version
        found["ss_v2"] = str(family.name == "sd2")
        found["modelspec.architecture"] = family.architecture + "/lora"
    found |= drawing_metadata(adapter)
    size = {
        "ss_network_dim": str(most_common(m.rank for m in ranked)) if ranked else "Dynamic",
        "ss_network_alpha": str(plain_number(most_common(m.alpha for m in ranked))) if ranked else "Dynamic",
    }
    return found | carried(adapter) | size


def drawing_metadata(adapter: Adapter) -> dict[str, str]:
    """How captions and noise were read in training, for drawing and for learning on; `info_in` reads it again."""
    found = {}
    if trigger := adapter.info.get("trigger"):
        found["modelspec.trigger_phrase"] = str(trigger)
    if words := {*adapter.embeddings, *adapter.info.get("words", ())}:
        found[WORDS] = json.dumps(sorted(words))
    if adapter.clip_skip != 1:
        found["ss_clip_skip"] = str(adapter.clip_skip)
    if adapter.zero_terminal_snr:
        found["ss_zero_terminal_snr"] = "True"
    if adapter.max_token_length != 75:
        found["ss_max_token_length"] = str(adapter.max_token_length)
    return found


def info_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What other tools' headers say about the adapter, in our words."""
    info: dict[str, Any] = {}
    module = metadata.get("ss_network_module", "")
    if module:
        info["method"] = module.rpartition(".")[2]
    if trigger := metadata.get("modelspec.trigger_phrase"):
        info["trigger"] = trigger
    with contextlib.suppress(ValueError):
        if isinstance(words := json.loads(metadata.get(WORDS, "null")), list):
            info["words"] = [str(word) for word in words]
    if name := metadata.get("ss_sd_model_name"):
        info["base_name"] = name
    numbers = {name: metadata.get(f"ss_{name}", "") for name in ("steps", "clip_skip", "max_token_length")}
    training: dict[str, Any] = {name: int(text) for name, text in numbers.items() if text.isdigit()}
    if metadata.get("ss_zero_terminal_snr") == "True":
        training["zero_terminal_snr"] = True
    return {**info, "training": training} if training else info


def carried(adapter: Adapter) -> dict[str, str]:
    """What other tools wrote and still holds for another file."""
    return {k: v for k, v in adapter.metadata.items() if k not in (*OWN, *HASHES)}


def tensor_hash(data: bytes) -> str:
    """SHA-256 of a safetensors file without its header: the hash that A1111 calls AutoV3."""
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return found


def hashed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The whole file, with the hash of its tensors in the header."""
    whole = unshared(tensors)
    # The hash covers the tensors alone, so it can be written into the header afterwards.
    digest = tensor_hash(save_tensors(whole, {}))
    data: bytes = save_tensors(whole, {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": "0x" + digest})
    return in_order(data)


def in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: the safetensors library writes it in an order that changes from run to run.

    The tensors begin at a multiple of 8 bytes, as the library has it.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def write_file(path: Path, data: bytes) -> None:
    """Writes atomically, making the folder.

    Raises:
        AdapterFileError: when the file cannot be written there.
        WriteError: when the disk is full; an older file of that name is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as e:
        if is_full(e):
            raise WriteError(f"The adapter cannot be written to {path}: {e.strerror or e}. Free some space.") from None
        raise AdapterFileError(
            f"The adapter cannot be written to {path}: {e.strerror or e}. Choose another path."
        ) from None


def peft_magnitude(magnitude: Tensor, module: AdapterModule) -> Tensor:
    """PEFT keeps the magnitude of a convolution as (1, o, 1, ...), that of a linear layer as (o,)."""
    spatial = module.tensors["lora_A"].dim() - 2
    return magnitude.view(1, -1, *(1,) * spatial) if spatial else magnitude


def magnitude_key(name: str) -> str:
    """What follows a module's name for its magnitude: PEFT has no `.weight`, which transformers' own loader asks for."""
    return ".lora_magnitude_vector" + (".weight" if name.startswith("text_encoder") else "")


def mixes_dora(adapter: Adapter, component: str) -> bool:
    """Whether a part has LoRA and DoRA, which a config of PEFT's has one word for."""
    kinds = {m.kind for m in adapter.component(component).values()}
    return {"lora", "dora"} <= kinds


def as_json(value: Any) -> str:
    """With keys in order, so that equal headers are equal bytes."""
    return json.dumps(value, sort_keys=True)
