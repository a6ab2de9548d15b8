"""Two checkpoints -> the adapter that is their difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from visionlora.pipelines.convert import check_output

from visionlora.errors import AdapterFileError
from visionlora.formats.container import open_file
from visionlora.loaders import save_adapter
from visionlora.lora.adapter import Adapter
from visionlora.lora.arithmetic import Progress, Result, Size, extract_adapter
from visionlora.models.base import open_base

States = Mapping[str, Mapping[str, Tensor]]
PIPELINE_KEYS = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")


def states_of(model: str) -> tuple[States, dict[str, object]]:
    """({component: {parameter: values}}, what the header says of the model).

    A diffusers folder, Hub id or single-file checkpoint of Stable Diffusion has its UNet and text encoder; any other
    file of tensors, such as timm's, is one component `model`.
    """
    path = Path(model).expanduser()
    folder = path / "model.safetensors"
    file = folder if path.is_dir() and folder.is_file() else path
    if file.is_file() and not (path / "model_index.json").is_file():
        tensors = open_file(file, mapped=True).tensors
        if not any(k.startswith(PIPELINE_KEYS) for k in tensors):
            return {"model": {k: t for k, t in tensors.items() if t.is_floating_point()}}, {"id": str(model)}
    base = open_base(model)
    return {n: part.state_dict() for n, part in base.components().items()}, {
        "id": base.address,
        "fingerprints": base.fingerprints(),
    }


def extract(
    base: str, tuned: str, output: str | Path, size: Size, shifts: bool = False, to: str = "visionlora",
    overwrite: bool = False, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """An adapter from the difference of two models: `base` plus the adapter is `tuned`, as near as the size allows.

    Args:
        base: a diffusers folder, Hub id or checkpoint, or a file of tensors (a ViT's, for instance).
        tuned: of the same architecture.
        output: of the adapter.
        size: the rank, or the share of ‖ΔW‖² to keep.
        shifts: also keep the differences of norms and biases (formats visionlora and kohya).
        to: see `visionlora.loaders.save_adapter`.
        overwrite: replace what is there.
        progress: called with (parameters done, parameters).

    Raises:
        AdapterFileError: when the models differ in architecture or not at all, or the result cannot be written.
        ModelError: when one cannot be opened.
        ConfigError: when the output exists or the size is out of range.
    """
    check_output(output, to, overwrite)
    (before, info), (after, _) = states_of(base), states_of(tuned)
    if set(before) != set(after):
        raise AdapterFileError(
            f"{base} has {', '.join(before)} and {tuned} {', '.join(after)}: they cannot be compared."
        )
    total, done = sum(len(s) for s in before.values()), 0
    results = {}
    for component, state in before.items():
        start = done

        def count(k: int, _: int, start: int = start) -> None:
            if progress is not None:
                progress(start + k, total)

        results[component] = extract_adapter(state, after[component], size, component, shifts, count)
        done += len(state)
    modules = {n: m for r in results.values() for n, m in r.adapter.modules.items()}
    errors = {n: e for r in results.values() for n, e in r.errors.items()}
    if not modules:
        raise AdapterFileError(f"{tuned} does not differ from {base} in any matrix: there is nothing to extract.")
    odd = {n: why for r in results.values() for n, why in r.adapter.odd_layers.items()}
    about = {"method": "lora", "base": info, "extracted_from": str(tuned), **({"odd_layers": odd} if odd else {})}
    adapter = Adapter(modules, about)
    save_adapter(adapter, output, to)
    return Result(adapter, errors)
