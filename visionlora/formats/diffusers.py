"""Writes what diffusers' ``save_lora_weights`` would: ``unet.<path>.lora_A.weight`` with the scales in the header.

Files have no alpha tensors; ``lora_adapter_metadata`` says alpha and rank of every module. Versions of diffusers that do not
read it apply scaling 1: for them `folded` multiplies the scaling into B and widens all modules of a component to one rank
with zeros, so that every version applies the same ΔW.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.formats.embeddings import write_beside
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
from visionlora.formats.whole import pipeline_layers
from visionlora.lora.adapter import PRODUCT_KINDS, Adapter, AdapterModule


def write(adapter: Adapter, path: Path) -> None:
    """Writes atomically, with the scales in the header; tokens go into files of their own beside it.

    Raises:
        AdapterFileError: when the format cannot hold the adapter, or has no layers, or the path cannot be written.
    """
    write_file(path, to_bytes(adapter))
    write_beside(path, adapter.embeddings)


def write_folded(adapter: Adapter, path: Path) -> None:
    """The same with the scales multiplied in, for every version of diffusers."""
    write_file(path, to_bytes(folded(plain(adapter))))
    write_beside(path, adapter.embeddings)


def to_bytes(adapter: Adapter) -> bytes:
    """The whole file."""
    adapter = plain(adapter)
    tensors: dict[str, Tensor] = {}
    for name, m in adapter.modules.items():
        tensors[name + ".lora_A.weight"], tensors[name + ".lora_B.weight"] = m.tensors["lora_A"], m.tensors["lora_B"]
        if m.kind == "dora":
            tensors[name + magnitude_key(name)] = peft_magnitude(m.tensors["magnitude"], m)
    header = {
        "format": "pt",
        "lora_adapter_metadata": as_json(diffusers_metadata(adapter)),
        **network_metadata(adapter),
    }
    return hashed(tensors, header)


def plain(adapter: Adapter) -> Adapter:
    """The adapter with whole layers.

    Raises:
        AdapterFileError: when diffusers has no way to hold it.
    """
    modules = {f"{component}.{path}": m for component, path, m in pipeline_layers(adapter, "diffusers")}
    if not modules:
        raise AdapterFileError(
            "The adapter has no layers for a diffusers file, only the vectors of words: "
            "diffusers reads these where they are, by load_textual_inversion."
        )
    for name, m in modules.items():
        if m.kind not in ("lora", "dora") or m.options:
            what = "a DoRA by columns, or of another product" if m.kind == "dora" else f"a module of kind {m.kind}"
            kohya = m.product in PRODUCT_KINDS or m.kind in ("shift", "oft")
            others = "Formats visionlora and kohya keep it" if kohya else "Format visionlora keeps it"
            lora = "; `visionlora resize` makes plain LoRA of it" if m.kind in ("loha", "lokr") else ""
            raise AdapterFileError(f"diffusers cannot hold {name}: {what}. {others}{lora}.")
    for component in adapter.components:
        if mixes_dora(adapter, component):
            raise AdapterFileError(
                f"The adapter's {component} has DoRA on some layers and LoRA on others; diffusers takes one of them for all. "
                "Formats visionlora and kohya keep both."
            )
    return replace(adapter, modules=modules)


def reads(adapter: Adapter) -> bool:
    """Whether diffusers alone draws with visionlora's own file of an adapter as visionlora does."""
    try:
        return not adapter.embeddings and plain(adapter).modules.keys() == adapter.modules.keys()
    except AdapterFileError:
        return False


def folded(adapter: Adapter) -> Adapter:
    """Scaling 1 and one rank per component.

    Raises:
        AdapterFileError: for DoRA, whose magnitude older versions of diffusers drop.
    """
    modules = {}
    for component in adapter.components:
        own = adapter.component(component)
        rank = max(m.rank for m in own.values())
        for name, m in own.items():
            if m.kind != "lora":
                raise AdapterFileError(f"{component}.{name} is a DoRA, which cannot be folded: use format diffusers.")
            down, up = m.tensors["lora_A"].float(), m.tensors["lora_B"].float() * m.scaling
            modules[f"{component}.{name}"] = AdapterModule.lora(down, up, float(m.rank)).widened(rank)
    return replace(adapter, modules=modules)
