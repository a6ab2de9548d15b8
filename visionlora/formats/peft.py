"""PEFT's folder: `adapter_config.json` beside `adapter_model.safetensors`, read to and written from the in-memory form.

Keys: ``base_model.model.<module>.lora_A.weight``, ``.lora_B.weight``, ``.lora_magnitude_vector`` (DoRA), ``.ia3_l``; what
trains in full stands under its plain name. The scale is in the config alone: alpha/r, alpha/√r with `use_rslora`, by
`rank_pattern` and `alpha_pattern` where they match. A part of a fused layer is written as an equal LoRA on the whole.
"""

from __future__ import annotations

import json
import math
import re
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
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.families import fused_names, lookup

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
READABLE = ("LORA", "IA3")
ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".ia3_l": "vector",
}


def is_folder(path: Path) -> bool:
    """Whether a folder is one of PEFT's."""
    return (path / CONFIG).is_file()


# ----------------------------------------------------------------------------------------------------------------- read


def read(folder: Path, component: str = "model") -> Adapter:
    """Reads a folder; every tensor is used or the folder is refused.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        component: the part of a pipeline that the adapter is for.

    Raises:
        AdapterFileError: when a file is missing or broken, the method cannot be read, or a tensor fits nothing.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} has no {WEIGHTS}: copy the whole folder that PEFT saved.") from None
    except Exception as e:  # JSON and safetensors raise their own kinds on broken bytes
        raise AdapterFileError(f"{folder} cannot be read as PEFT's folder ({e}). Copy or download it again.") from None
    kind = str(config.get("peft_type"))
    if kind not in READABLE:
        raise AdapterFileError(f"{folder} holds PEFT's {kind}; {' and '.join(READABLE)} are read.")
    found: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        ending = next((e for e in ENDINGS if (name.replace(".default", "")).endswith(e)), None)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{folder} has NaN or infinite values in {key!r}: its training diverged.")
        if ending is not None:
            path = name.replace(".default", "").removesuffix(ending)
            found.setdefault(path, {})[ENDINGS[ending]] = tensor
        elif any(part in name.split(".") for part in config.get("modules_to_save") or []):
            values[name] = tensor
        else:
            raise AdapterFileError(f"{folder} has a tensor {key!r} that fits no layer: nothing was loaded.")
    modules = {f"{component}.{path}": one_module(folder, path, own, config) for path, own in found.items()}
    modules |= {f"{component}.{n}": AdapterModule("full", {"value": t}, 1.0) for n, t in values.items()}
    return Adapter(modules, {"method": kind.lower(), "base": {"id": config.get("base_model_name_or_path")}})


def one_module(folder: Path, path: str, own: dict[str, Tensor], config: Mapping[str, Any]) -> AdapterModule:
    """What a folder holds for one layer."""
    if "vector" in own:
        vector = own["vector"]
        on_input = vector.shape[0] == 1 and vector.dim() > 1 and any(
            path == w or path.endswith("." + w) for w in config.get("feedforward_modules") or []
        )  # fmt: skip
        return AdapterModule("ia3", {"vector": vector.flatten()}, 1.0, {"on_input": on_input})
    if not {"lora_A", "lora_B"} <= own.keys():
        raise AdapterFileError(f"{folder} holds half an adapter for {path!r}: it has {', '.join(own)} alone.")
    rank = len(own["lora_A"])
    alpha = float(by_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"]))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if "magnitude" in own:
        return AdapterModule("dora", {**own, "magnitude": own["magnitude"].flatten()}, scaling * rank)
    return AdapterModule.lora(own["lora_A"], own["lora_B"], scaling * rank)


def by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that is a regular expression for the end of the name, on a dot boundary."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


# ---------------------------------------------------------------------------------------------------------------- write


def write(adapter: Adapter, folder: Path, component: str = "") -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads.

    Args:
        adapter: of one component, or with the component named.
        folder: made when it is not there.
        component: which part of the adapter.

    Raises:
        AdapterFileError: when PEFT cannot hold the adapter, saying what and why, or the folder cannot be written.
    """
    if not component and len(adapter.components) != 1:
        raise AdapterFileError(
            f"A PEFT folder holds one part; this adapter has {', '.join(adapter.components)}: name one with component=."
        )
    modules = whole_layers(adapter.component(component or adapter.components[0]))
    kinds = {m.kind for m in modules.values()} - {"full"}
    if len(kinds) > 1 or not kinds <= {"lora", "dora", "ia3"}:
        raise AdapterFileError(
            f"A PEFT folder holds one of lora, dora and ia3; this adapter holds {', '.join(sorted(kinds))}. "
            "visionlora's own format keeps it."
        )
    config = {**described(modules, kinds), "base_model_name_or_path": (adapter.info.get("base") or {}).get("id")}
    tensors = {PREFIX + key: t.contiguous() for name, m in modules.items() for key, t in keyed(name, m).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS, save_tensors(tensors, {"format": "pt"}))
        replace_file(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    except OSError as e:
        raise AdapterFileError(f"The folder {folder} cannot be written: {e.strerror or e}. Choose another.") from None


def whole_layers(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The modules with parts of fused layers joined: ΔW on some rows is a LoRA on all of them, zero elsewhere.

    Raises:
        AdapterFileError: for parts of torch's packed attention, which PEFT cannot hold, or of another kind than LoRA.
    """
    whole: dict[str, AdapterModule] = {}
    parts: dict[str, dict[str, AdapterModule]] = {}
    for name, m in modules.items():
        layer, _, part = name.rpartition(".")
        fused = lookup(layer, fused_names())
        if m.kind != "full" and fused is not None and part in fused_names()[fused]:
            parts.setdefault(layer, {})[part] = m
        elif m.kind != "full" and part in ("q", "k", "v"):
            raise AdapterFileError(
                f"{name!r} is a part of torch's packed attention, which PEFT has no way to hold. visionlora's own format "
                "keeps it; or merge it."
            )
        else:
            whole[name] = m
    for layer, own in parts.items():
        if any(m.kind != "lora" for m in own.values()):
            raise AdapterFileError(f"Parts of the fused layer {layer!r} can be written to PEFT as LoRA alone.")
        order = fused_names()[str(lookup(layer, fused_names()))]
        width = len(next(iter(own.values())).tensors["lora_B"])
        up = torch.zeros(width * len(order), sum(m.rank for m in own.values()))
        start = 0
        for part, m in own.items():
            row = order.index(part) * width
            up[row : row + width, start : start + m.rank] = m.lora_factors()[1] * m.scaling
            start += m.rank
        down = torch.cat([m.lora_factors()[0] for m in own.values()])
        whole[layer] = AdapterModule.lora(down, up, float(len(down)))
    return whole


def described(modules: Mapping[str, AdapterModule], kinds: set[str]) -> dict[str, Any]:
    """adapter_config.json."""
    adapted = {n: m for n, m in modules.items() if m.kind != "full"}
    saved = sorted({n.rpartition(".")[0] for n, m in modules.items() if m.kind == "full"})
    shared = {
        "task_type": None,
        "inference_mode": True,
        "target_modules": sorted(adapted),
        "modules_to_save": saved or None,
    }
    if kinds == {"ia3"}:
        inputs = sorted(n for n, m in adapted.items() if m.options.get("on_input"))
        return {**shared, "peft_type": "IA3", "feedforward_modules": inputs, "fan_in_fan_out": False}
    rank = Counter(m.rank for m in adapted.values()).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in adapted.values()).most_common(1)[0][0]
    return {
        **shared,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {re.escape(n): m.rank for n, m in adapted.items() if m.rank != rank},
        "alpha_pattern": {re.escape(n): m.alpha for n, m in adapted.items() if m.alpha != alpha},
        "use_dora": kinds == {"dora"},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def keyed(name: str, module: AdapterModule) -> dict[str, Tensor]:
    """The tensors of one module under PEFT's names and in its shapes."""
    if module.kind == "full":
        return {name: module.tensors["value"]}
    if module.kind == "ia3":
        vector = module.tensors["vector"]
        return {name + ".ia3_l": vector.view(1, -1) if module.options.get("on_input") else vector.view(-1, 1)}
    found = {f"{name}.lora_A.weight": module.tensors["lora_A"], f"{name}.lora_B.weight": module.tensors["lora_B"]}
    if "magnitude" in module.tensors:
        spatial = module.tensors["lora_A"].dim() - 2
        magnitude = module.tensors["magnitude"]
        found[name + ".lora_magnitude_vector"] = magnitude.view(1, -1, *(1,) * spatial) if spatial else magnitude
    return found
