"""Adapter files -> models that use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visionlora.errors import AdapterFileError, nearest
from visionlora.formats import native, peft
from visionlora.lora.adapter import Adapter
from visionlora.lora.inject import Handle, attach
from visionlora.models.base import BaseModel, open_base

WRITERS: dict[str, Callable[[Adapter, Path], None]] = {"visionlora": native.write, "peft": peft.write}


def load_adapter(path: str | Path) -> Adapter:
    """Reads an adapter file, the run folder that holds one, or a folder of PEFT's.

    Raises:
        AdapterFileError: see `visionlora.formats.native.read` and `visionlora.formats.peft.read`.
    """
    path = Path(path).expanduser()
    if peft.is_folder(path):
        return peft.read(path)
    if (path / "adapter.safetensors").is_file():
        path = path / "adapter.safetensors"
    return native.read(path)


def save_adapter(adapter: Adapter, path: str | Path, format: str = "visionlora") -> None:
    """Writes an adapter, atomically.

    Args:
        adapter: from a file or a handle.
        path: a file, or for `peft` a folder.
        format: `visionlora` (our own, which diffusers reads too) or `peft`.

    Raises:
        AdapterFileError: when the format is unknown or cannot hold the adapter, or the path cannot be written.
    """
    if format not in WRITERS:
        raise AdapterFileError(f"There is no adapter format {format!r}. {nearest(format, WRITERS)}")
    WRITERS[format](adapter, Path(path).expanduser())


def check_base(adapter: Adapter, base: BaseModel, force: bool = False) -> None:
    """Refuses an adapter of another base model.

    Args:
        adapter: read from a file.
        base: what it is to be applied to.
        force: accept other weights in the same architecture (a fine-tune of the same family).

    Raises:
        AdapterFileError: when the architectures differ, or the weights do and `force` is not given.
    """
    made_for = adapter.info.get("base", {})
    there = base.fingerprints()
    for component in adapter.components:
        if component not in there:
            raise AdapterFileError(f"The adapter has a part for {component!r}, which {base.id} has not.")
        given = made_for.get("fingerprints", {}).get(component)
        if given is None:
            continue
        if given["architecture"] != there[component]["architecture"]:
            raise AdapterFileError(
                f"The adapter was made for {made_for.get('id')}, whose {component} has another "
                f"architecture than that of {base.id}. Open its own base: --model {made_for.get('id')}."
            )
        if given["weights"] != there[component]["weights"] and not force:
            raise AdapterFileError(
                f"The adapter was made for {made_for.get('id')}; {base.id} has the same architecture but "
                "other weights. If it is a fine-tune of the same family, use --force."
            )


def apply(
    base: BaseModel, adapter: Adapter, name: str = "default", scale: float = 1.0, force: bool = False
) -> list[Handle]:
    """Puts an adapter on an opened base model, one handle per component.

    Raises:
        AdapterFileError: when it was made for another base.
    """
    check_base(adapter, base, force)
    parts = base.components()
    handles = [attach(parts[component], adapter, component, name) for component in adapter.components]
    for handle in handles:
        handle.set_scale(scale)
    return handles


def load_pipeline(
    adapters: Mapping[str, str | Path | Adapter],
    model: str = "auto",
    scales: Mapping[str, float] | None = None,
    force: bool = False,
) -> Any:
    """A `StableDiffusionPipeline` with adapters on it, each with its own scale.

    Args:
        adapters: name -> file, run folder or `Adapter`.
        model: the base model; `auto` takes the one that the first adapter names.
        scales: name -> scale; 1 where not given.
        force: see `check_base`.
    """
    loaded = {n: a if isinstance(a, Adapter) else load_adapter(a) for n, a in adapters.items()}
    if model == "auto" and loaded:
        model = str(next(iter(loaded.values())).info.get("base", {}).get("id", "auto"))
    base = open_base(model)
    for name, adapter in loaded.items():
        apply(base, adapter, name, (scales or {}).get(name, 1.0), force)
    return base.pipe
