"""What is in an adapter file, without a model: from its header alone for lists, with its values for one file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visionlora.config.choices import WEIGHT_SUFFIXES
from visionlora.errors import AdapterFileError
from visionlora.formats import peft
from visionlora.formats.container import PEFT_CONFIG, Header, file_hashes, is_pickle, read_header
from visionlora.formats.families import family_of
from visionlora.formats.history import History, history_of
from visionlora.formats.names import locate_all
from visionlora.formats.parts import split_key
from visionlora.formats.read import FOLDER_FILES, format_of, read
from visionlora.lora.adapter import PRODUCT_KINDS, Adapter, AdapterModule, base_weights
from visionlora.lora.functional import wide
from visionlora.lora.inject import cut_modules, fit, no_garbage_collection

ROW_RANKS = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "lambda_d")
KIND_OF_SLOT = {
    "hada_w1_a": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "oft_blocks": "oft",
    "on_input": "ia3",
    "ia3_l": "ia3",
    "lambda_b": "vera",
    "diff": "full difference",
    "w_norm": "norms",
    "dora_scale": "dora",
    "magnitude": "dora",
    "diagonal": "adalora",
}
KIND_WORDS = {"diff": "full difference", "full": "trained in full"}
"""What kinds of modules are called, where not by their own word."""
OVERFITTED = 8.0
"""A module whose ΔW is this many times larger (per value, root mean square) than the median of its kind is named."""
LARGE_CHANGE = 0.5
"""‖ΔW‖ over ‖W‖ from which a module changes more than it keeps."""


@dataclass(frozen=True)
class Summary:
    """One line of a list: what the header says."""

    path: str
    size: int
    """Bytes."""
    format: str
    base: str
    """Which base models it fits: the family, as far as the shapes tell, or else the model that the header names."""
    method: str
    components: Mapping[str, int]
    """Adapted layers by component."""
    ranks: tuple[int, ...]
    """Ranks that occur, the most common first."""
    alpha: float | None
    """The most common alpha, where the header says one."""
    parameters: int
    trigger: str
    problem: str = ""
    """Why the file cannot be read; then the rest is empty."""


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted layer."""

    name: str
    kind: str
    rank: int
    alpha: float
    dtype: str
    norm: float | None
    """‖ΔW‖, Frobenius; None where it depends on the base."""
    rms: float | None
    """Root mean square of the values of ΔW."""
    share: float | None = None
    """‖ΔW‖ / ‖W‖, when a base model was given."""


@dataclass(frozen=True)
class Inspection:
    """Everything about one file."""

    summary: Summary
    modules: tuple[ModuleInfo, ...]
    blocks: Mapping[str, float]
    """‖ΔW‖ of each block of the model, in the model's order."""
    embeddings: Mapping[str, tuple[int, ...]]
    """Tokens and how many vectors each has, by component."""
    unused: tuple[str, ...]
    """Tensors of the file that nothing takes."""
    misfits: Mapping[str, str]
    """Modules that the given model has not, or in another shape, with the reason."""
    health: tuple[str, ...]
    """What looks wrong, one sentence each."""
    hashes: Mapping[str, str]
    history: History
    metadata: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


# -------------------------------------------------------------------------------------------------------- headers only


def adapter_files(folder: Path) -> list[Path]:
    """The adapters in a folder, sorted: files, and folders of PEFT's; of run folders and those of diffusers the file in it."""
    if peft.is_folder(folder):
        return [folder]
    found = [p for p in folder.iterdir() if p.is_file() and p.suffix in WEIGHT_SUFFIXES]
    for child in folder.iterdir():
        if child.is_dir():
            if peft.is_folder(child):
                found.append(child)
            elif (file := weights_file(child)).is_file():
                found.append(file)
    return sorted(found)


def weights_file(path: Path) -> Path:
    """The file with the tensors of an adapter."""
    if peft.is_folder(path):
        return next(
            (path / n for n in (peft.WEIGHTS, "adapter_model.bin") if (path / n).is_file()), path / peft.WEIGHTS
        )
    return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)


def settings_beside(file: Path) -> list[Path]:
    """What says how the tensors of an adapter's file are meant, where that is not in its header: PEFT's config."""
    return [config] if (config := file.parent / PEFT_CONFIG).is_file() else []


@no_garbage_collection()
def summarise(path: Path) -> Summary:
    """What the header of a file says; a file that cannot be read gives a summary with the reason."""
    try:
        file = weights_file(path)
        size = file.stat().st_size if file.is_file() else 0
        if file.is_file() and is_pickle(file):
            return summary_of(path, size, Header({}, {}), "a pickle: inspect the file itself", 0)
        return summary_of(path, size, read_header(file))
    except AdapterFileError as e:
        return Summary(str(path), 0, "", "", "", {}, (), None, 0, "", str(e))


def summary_of(path: Path, size: int, header: Header, problem: str = "", parameters: int | None = None) -> Summary:
    """The summary of a header."""
    slots: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, entry in header.tensors.items():
        split = split_key(key.removeprefix(peft.PREFIX))
        if split is not None and split[1] != "weight":
            slots.setdefault(split[0], {})[split[1]] = entry.shape
    places = locate_all(slots)
    if own_modules := modules_in(header.metadata):  # it says more than names of tensors do
        kinds = Counter(kind for _, kind, _ in own_modules)
        ranks = Counter(rank for _, _, rank in own_modules if rank)
        components = Counter(name.partition(".")[0] for name, _, _ in own_modules)
    else:
        kinds = Counter(next((KIND_OF_SLOT[s] for s in own if s in KIND_OF_SLOT), "lora") for own in slots.values())
        ranks = Counter(own[n][0] for own in slots.values() for n in ROW_RANKS if own.get(n))
        components = Counter(c for c, _ in places.values())
    shapes = {f"{c}.{p}": slots[layer] for layer, (c, p) in places.items()}
    return Summary(
        str(path),
        size,
        "visionlora"
        if "visionlora" in header.metadata
        else "peft"
        if peft.is_folder(path)
        else format_of(header.tensors),
        family_title(shapes) or base_id(header.metadata),
        ", ".join(k for k, _ in kinds.most_common()),
        dict(components),
        tuple(r for r, _ in ranks.most_common()),
        header_alpha(path, header.metadata),
        sum(e.size for e in header.tensors.values()) if parameters is None else parameters,
        trigger_of(header.metadata),
        problem,
    )


def modules_in(metadata: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """Name, kind and rank of each layer as one of our headers has them; none where it is not ours or says it otherwise."""
    try:
        modules = json.loads(metadata.get("visionlora", "{}"))["modules"].items()
        return [(name, KIND_WORDS.get(m["kind"], str(m["kind"])), int(m["rank"])) for name, m in modules]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def family_title(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """The family that a header's shapes belong to."""

    def flat(own: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        down, up = own.get("down"), own.get("up")
        return (up[0], math.prod(down[1:])) if up and down else None

    family = family_of({name: partial(flat, own) for name, own in shapes.items()})
    return family.title if family else ""


def base_id(metadata: Mapping[str, str]) -> str:
    """The base model that one of our headers names."""
    try:
        return str((json.loads(metadata.get("visionlora", "{}")).get("base") or {}).get("id") or "")
    except (ValueError, AttributeError):
        return ""


def header_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """The alpha that a header names for most modules."""
    try:
        if "visionlora" in metadata:
            alphas = Counter(float(m["alpha"]) for m in json.loads(metadata["visionlora"])["modules"].values())
            return alphas.most_common(1)[0][0] if alphas else None
        if peft.is_folder(path):
            return float(json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))["lora_alpha"])
        if "lora_adapter_metadata" in metadata:
            found = json.loads(metadata["lora_adapter_metadata"])
            return float(next(v for k, v in found.items() if k.rpartition(".")[2] == "lora_alpha"))
        return float(metadata["ss_network_alpha"])
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, OSError):
        return None


def trigger_of(metadata: Mapping[str, str]) -> str:
    """The words that call an adapter, as far as its header names them."""
    try:
        own = json.loads(metadata.get("visionlora", "{}")).get("trigger") or ""
    except (ValueError, AttributeError):
        own = ""
    return str(own or metadata.get("modelspec.trigger_phrase", ""))


# --------------------------------------------------------------------------------------------------------- one file


def block_of(name: str) -> str:
    """The block of a model that a layer belongs to.

    >>> block_of("unet.down_blocks.1.attentions.0.proj_in"), block_of("text_encoder.text_model.encoder.layers.3.mlp.fc1")
    ('unet down 1', 'text_encoder layer 3')
    >>> block_of("model.blocks.7.attn.qkv.q")
    'model block 7'
    """
    component, _, path = name.partition(".")
    if match := re.match(r"(down|up)_blocks\.(\d+)|(mid)_block", path):
        return f"{component} mid" if match[3] else f"{component} {match[1]} {match[2]}"
    if match := re.search(r"(?:layers?|encoder_layer_?|blocks)[._](\d+)\.", path + "."):
        return f"{component} {'layer' if 'layer' in match[0] else 'block'} {match[1]}"
    return f"{component} {path.split('.')[0]}"


def in_order(blocks: Mapping[str, float]) -> dict[str, float]:
    """Blocks in the order in which a picture passes them."""
    places = {"down": 0, "mid": 1, "up": 2}

    def key(name: str) -> tuple[str, int, int, str]:
        component, _, rest = name.partition(" ")
        word, _, number = rest.partition(" ")
        return component, places.get(word, 3 if number else -1), int(number) if number.isdigit() else 0, rest

    return {n: blocks[n] for n in sorted(blocks, key=key)}


def norm_of(module: AdapterModule) -> float | None:
    """‖ΔW‖ without a dense product where the factors are low; None where it depends on the base."""
    if module.kind == "shift":
        return float(module.tensors["shift"].double().norm())
    if module.kind not in PRODUCT_KINDS:
        return None
    down, up = module.lora_factors()
    a, b = wide(down).double().flatten(1), wide(up).double().flatten(1)
    square = float(((a @ a.t()) * (b.t() @ b)).sum())
    return math.sqrt(max(0.0, square)) * abs(module.scaling)


def inspect_file(path: str | Path, base: torch.nn.Module | None = None) -> Inspection:
    """Everything about one adapter; what nothing here takes is listed, not refused.

    Args:
        path: a file or folder.
        base: the model it is for, with components as children, for ‖ΔW‖ over ‖W‖.

    Raises:
        AdapterFileError: when the file is missing, broken or no adapter.
    """
    path = Path(path).expanduser()
    adapter = read(path, allow_partial=True)
    misfits = {} if base is None else misfits_of(adapter, base)
    file = weights_file(path)
    header = Header({}, {}) if is_pickle(file) else read_header(file)
    summary = summary_of(path, file.stat().st_size, header)
    weights = {} if base is None else base_weights(base, [n for n in adapter.modules if n not in misfits])
    modules = tuple(module_info(n, m, weights.get(n)) for n, m in adapter.modules.items())
    squares: dict[str, float] = {}
    for m in modules:
        if m.norm is not None:
            squares[block_of(m.name)] = squares.get(block_of(m.name), 0.0) + m.norm**2
    tokens = {f"{t} ({c})": tuple(v.shape) for t, parts in adapter.embeddings.items() for c, v in parts.items()}
    hidden = ("visionlora", "lora_adapter_metadata", "ss_tag_frequency", "ss_datasets", "ss_bucket_info")
    return Inspection(
        summary,
        modules,
        in_order({b: math.sqrt(s) for b, s in squares.items()}),
        tokens,
        adapter.unused,
        misfits,
        tuple(health(adapter, modules, misfits)),
        file_hashes(file),
        history_of(adapter),
        {k: v for k, v in adapter.metadata.items() if k not in hidden},
    )


def misfits_of(adapter: Adapter, base: torch.nn.Module) -> dict[str, str]:
    """Modules that a model has not, or in another shape, with the reason and the nearest name."""
    found: dict[str, str] = {}
    children = dict(base.named_children())
    for component in adapter.components:
        if component not in children:
            found |= {f"{component}.{n}": f"The model has no {component}." for n in adapter.component(component)}
            continue
        _, _, skipped = fit(
            children[component], cut_modules(children[component], adapter.component(component)), component
        )
        found |= {f"{component}.{n}": why for n, why in skipped}
    return found


def module_info(name: str, module: AdapterModule, weight: torch.Tensor | None) -> ModuleInfo:
    """What is known of one layer's adapter; with the base weight, also how much of it is changed, where one number says it."""
    norm, share = norm_of(module), None
    if weight is not None and module.kind != "tlora":  # whose ΔW changes from timestep to timestep
        if norm is None:
            norm = float(module.delta_weight(weight).double().norm())
        share = norm / max(1e-12, float(weight.double().norm()))
    flat = module.flat_shape()
    rms = norm / math.sqrt(flat[0] * flat[1]) if norm is not None and flat is not None else None
    dtype = str(next(iter(module.tensors.values())).dtype).removeprefix("torch.")
    return ModuleInfo(name, module.kind, module.rank, module.alpha, dtype, norm, rms, share)


def health(adapter: Adapter, modules: tuple[ModuleInfo, ...], misfits: Mapping[str, str]) -> list[str]:
    """What looks wrong with an adapter."""
    found = []
    if misfits:
        name, why = next(iter(misfits.items()))
        found.append(f"{len(misfits)} of {len(modules)} modules do not fit the model, such as {name}: {why}")
    dead = [m.name for m in modules if m.norm == 0]
    if dead:
        found.append(f"{len(dead)} of {len(modules)} modules change nothing (ΔW is zero), such as {dead[0]}.")
    rms = sorted(m.rms for m in modules if m.rms)
    if rms:
        median = rms[len(rms) // 2]
        loud = [m for m in modules if m.rms and m.rms > OVERFITTED * median]
        if loud:
            worst = max(loud, key=lambda m: m.rms or 0)
            found.append(
                f"{len(loud)} modules are more than {OVERFITTED:.0f} times stronger than the median, most of all {worst.name} "
                f"({(worst.rms or 0) / median:.0f} times): over-fitted, or trained at too high a rate."
            )
    large = [m for m in modules if m.share is not None and m.share > LARGE_CHANGE]
    if large:
        found.append(
            f"{len(large)} modules change their weight by more than {LARGE_CHANGE:.0%}, such as {large[0].name}."
        )
    if adapter.unused:
        found.append(f"{len(adapter.unused)} tensors are not used, such as {adapter.unused[0]}.")
    return found
