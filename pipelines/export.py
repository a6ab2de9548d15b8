"""Classifier adapter -> a model that runs without visionlora: timm, transformers, a state dict, PEFT or ONNX.

Each is written beside its place, opened again, and moved there when its answers are those of the adapter; else nothing is left.
The temperature goes into the head, so that softmax (or sigmoid) of the logits gives the probabilities of `predict`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from visionlora.atomic import check_new, replace_file
from visionlora.classifier import COMPONENT, ClassTask
from visionlora.errors import ConfigError, nearest
from visionlora.formats import peft
from visionlora.loaders import check_classifies, check_fingerprints, load_adapter
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.inject import attach
from visionlora.lora.merge import bake
from visionlora.models.evaluation import forget_biases
from visionlora.models.heads import LAST, as_logits
from visionlora.models.input_size import patch_embeds
from visionlora.models.vision import VisionModel, open_backbone
from visionlora.report.runfolder import check_place

TARGETS = ("timm", "transformers", "state-dict", "peft", "onnx")
FOLDERS = ("timm", "transformers", "peft")
"""Those of them that are folders, in which other files are left alone."""
HOW = {
    "timm": "timm.create_model({local!r}, pretrained=True)",
    "transformers": "AutoModelForImageClassification.from_pretrained({path!r})",
    "state-dict": "model.load_state_dict(load_file({path!r}))",
    "peft": "PeftModel.from_pretrained(model with {classes} classes, {path!r})",
    "onnx": "onnxruntime.InferenceSession({path!r})",
}
"""How each is opened."""
CHECKED = 4
"""Pictures of noise on which answers are compared."""
TOLERANCE = 1e-3
"""Of logits; a larger difference is an error of the export."""


@dataclass(frozen=True)
class Exported:
    """What was written and how well it agrees."""

    path: Path
    difference: float | None
    """Largest difference of a logit from the adapter's; None where the other library is not installed to compare."""
    how: str
    """One line: how to open it."""


def export(
    adapter: str | Path, output: str | Path, to: str, model: str | None = None, force: bool = False,
    overwrite: bool = False, weights: str | None = None,
) -> Exported:  # fmt: skip
    """Writes a classifier for another library and compares.

    Args:
        adapter: a file or run folder of `visionlora classify`.
        output: the folder or file to write.
        to: timm, transformers (folders), state-dict (.safetensors), peft (folder) or onnx (file).
        model: another place of the backbone than the adapter names.
        force: accept a backbone of the same architecture with other weights.
        overwrite: replace what is there.
        weights: another place of the backbone's state dict.

    Raises:
        ConfigError: when the target does not fit the backbone's library, needs a package, or the output exists.
        AdapterFileError: when the adapter is no classifier's or of another backbone.
        RunFolderError: when nothing can be written at the output.
    """
    if to not in TARGETS:
        raise ConfigError(f"There is no export to {to!r}. {nearest(to, TARGETS)}")
    path = Path(output).expanduser()
    check_new(path, overwrite)
    if not path.exists():
        check_place(path if to in FOLDERS else path.parent)
    elif path.is_dir() != (to in FOLDERS):
        there, needed = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise ConfigError(f"{path} is a {there}, and {to} is written to a {needed}: name another output.")
    loaded = load_adapter(adapter)
    check_classifies(loaded, adapter)
    base = loaded.info.get("base", {})
    chosen = weights or (base.get("weights") if model is None else None)
    named_by = None if model else "the adapter"
    backbone = open_backbone(model or str(base.get("id", "auto")), chosen, base.get("image_size"), named_by)
    task = ClassTask.of(loaded, backbone.head).with_temperature_in_head()
    check_fingerprints(loaded, backbone.id, backbone.fingerprints(), force, backbone.fingerprints(older=True))
    if to in ("timm", "transformers") and backbone.library != to:
        raise ConfigError(
            f"{backbone.id} is a model of {backbone.library}, which {to} cannot open. Export it to "
            f"{backbone.library if backbone.library in TARGETS else 'state-dict'} or onnx."
        )
    if (backbone.head == LAST and to in FOLDERS) or (backbone.flat and to == "peft"):
        raise ConfigError(
            f"{backbone.id} has no place for one linear head, so visionlora put its own there, which {to} cannot. "
            "Export it to onnx or state-dict."
        )
    x = torch.randn(
        CHECKED, 3, task.preprocessing.size, task.preprocessing.size, generator=torch.Generator().manual_seed(0)
    )
    finish_head(backbone, task)
    untouched = {n: t.clone() for n, t in backbone.model.state_dict().items()} if to == "peft" else {}
    wanted = bake_in(backbone, loaded, x)
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=above, prefix=".export-") as temporary:
        place = Path(temporary) / path.resolve().name
        if to == "peft":
            backbone.model.load_state_dict(untouched)
            found = to_peft(with_head(loaded, backbone, task), backbone, place, x, wanted)
        else:
            found = WRITERS[to](backbone, task, place, x, wanted)
        if found is not None and not found <= TOLERANCE:
            raise ConfigError(
                f"{path} would give other answers than the adapter (logits differ by {found:.3g}), so it was not written: "
                "please report this."
            )
        move(place, path)
    how = HOW[to].format(path=str(path), local=f"local-dir:{path}", classes=len(task.classes))
    return Exported(path, found, how)


def move(place: Path, path: Path) -> None:
    """Moves a file or folder to its path; of a folder that is there the other files are left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and path.is_dir():
        for file in place.iterdir():
            file.replace(path / file.name)
    else:
        place.replace(path)


def finish_head(backbone: VisionModel, task: ClassTask) -> None:
    """Puts the head of the adapter in its place."""
    head = backbone.new_head(len(task.classes), 0)
    with torch.no_grad():
        head.weight.copy_(task.weight)
        head.bias.copy_(task.bias)
    head.requires_grad_(False)


def with_head(adapter: Adapter, backbone: VisionModel, task: ClassTask) -> Adapter:
    """The adapter with the head of the task."""
    values = {"weight": task.weight, "bias": task.bias}
    head = {f"{COMPONENT}.{backbone.head}.{n}": AdapterModule("full", {"value": t}, 1.0) for n, t in values.items()}
    return replace(adapter, modules={**adapter.modules, **head})


@torch.no_grad()
def bake_in(backbone: VisionModel, adapter: Adapter, x: Tensor) -> Tensor:
    """Merges ΔW for good and returns the logits of `x` with the adapter kept apart, to compare with."""
    rest = {n: m for n, m in adapter.modules.items() if not n.startswith(f"{COMPONENT}.{backbone.head}.")}
    if not rest:
        return as_logits(backbone.model(x))
    handle = attach(backbone.model, Adapter(rest, adapter.info), COMPONENT, "exported")
    forget_biases(backbone.model)
    wanted = as_logits(backbone.model(x))
    bake([handle])
    return wanted


@torch.no_grad()
def difference(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    """Largest difference of a logit."""
    return float((as_logits(model.eval()(x)) - wanted).abs().max())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, each in memory of its own."""
    return {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}


def to_timm(backbone: VisionModel, task: ClassTask, path: Path, x: Tensor, wanted: Tensor) -> float:
    """A folder for `timm.create_model("local-dir:…", pretrained=True)`."""
    import timm

    path.mkdir()
    tensors = weights_of(backbone.model)
    if backbone.flat:  # timm has a convolution of one pixel there
        tensors[f"{backbone.head}.weight"] = tensors[f"{backbone.head}.weight"][:, :, None, None]
    replace_file(path / "model.safetensors", save_tensors(tensors, {"format": "pt"}))
    model, p = cast(Any, backbone.model), task.preprocessing
    given = dict(model.pretrained_cfg)
    config = {
        "architecture": given["architecture"],
        "num_classes": len(task.classes),
        "num_features": backbone.features,
        "label_names": list(task.classes),
        "pretrained_cfg": {
            "input_size": [3, p.size, p.size], "mean": list(p.mean), "std": list(p.std), "crop_pct": p.crop_pct,
            "interpolation": p.interpolation, "crop_mode": p.crop_mode, "num_classes": len(task.classes),
            "first_conv": given.get("first_conv"), "classifier": backbone.head, "pool_size": None,
            "label_names": list(task.classes),
        },
    }  # fmt: skip
    if arguments := model_arguments(backbone):
        config["model_args"] = arguments
    replace_file(path / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return difference(timm.create_model(f"local-dir:{path}", pretrained=True), x, wanted)


def model_arguments(backbone: VisionModel) -> dict[str, Any]:
    """The arguments that a timm folder gives to its architecture, which a name alone does not tell."""
    found: dict[str, Any] = {}
    if (folder := backbone.folder) is not None:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args", {})
    resized = hasattr(backbone.model, "set_input_size") or bool(patch_embeds(backbone.model))
    if backbone.image_size is not None and resized:
        found = {**found, "img_size": backbone.image_size}
    return dict(found)


def to_transformers(backbone: VisionModel, task: ClassTask, path: Path, x: Tensor, wanted: Tensor) -> float:
    """A folder for `AutoModelForImageClassification.from_pretrained`, with an image processor."""
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    path.mkdir()
    model, p = cast(Any, backbone.model), task.preprocessing
    names = dict(enumerate(task.classes))
    model.config.id2label, model.config.label2id = names, {n: i for i, n in names.items()}
    model.config.problem_type = "multi_label_classification" if task.multi_label else "single_label_classification"
    model.save_pretrained(path)
    numbers = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    side = p.stored_size
    size = {"height": side, "width": side} if p.crop_mode == "squash" else {"shortest_edge": side}
    ViTImageProcessor(
        size=size, do_center_crop=True, crop_size={"height": p.size, "width": p.size}, image_mean=list(p.mean),
        image_std=list(p.std), resample=numbers[p.interpolation],
    ).save_pretrained(path)  # fmt: skip
    return difference(AutoModelForImageClassification.from_pretrained(path), x, wanted)


def to_state_dict(backbone: VisionModel, task: ClassTask, path: Path, x: Tensor, wanted: Tensor) -> float:
    """One safetensors file with every weight under its own name."""
    metadata = {"format": "pt", "classes": json.dumps(task.classes)}
    replace_file(path, save_tensors(weights_of(backbone.model), metadata))
    for p in backbone.model.parameters():
        p.zero_()
    backbone.model.load_state_dict(load_file(path))
    return difference(backbone.model, x, wanted)


def to_peft(adapter: Adapter, backbone: VisionModel, path: Path, x: Tensor, wanted: Tensor) -> float | None:
    """A folder for `PeftModel.from_pretrained`, with the head among its modules_to_save."""
    peft.write(adapter, path)
    try:
        from peft import PeftModel
    except ImportError:
        return None
    with torch.no_grad():
        cast(
            nn.Linear, backbone.model.get_submodule(backbone.head)
        ).weight.zero_()  # the head must come from the folder
    return difference(PeftModel.from_pretrained(backbone.model, str(path)), x, wanted)


class LogitsOnly(nn.Module):
    """A model of any library that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, c)."""
        return as_logits(self.model(x))


def to_onnx(backbone: VisionModel, task: ClassTask, path: Path, x: Tensor, wanted: Tensor) -> float:
    """One ONNX file for batches of any size, with classes, preprocessing and temperature (1) among its metadata."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            f"ONNX needs the extra of that name ({e.name} is missing): pip install 'visionlora[onnx]'."
        ) from None
    program = torch.onnx.export(
        LogitsOnly(backbone.model).eval(), (x,), dynamo=True, input_names=["pixels"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
    )  # fmt: skip
    assert program is not None
    found = program.model_proto
    onnx.helper.set_model_props(
        found,
        {
            "classes": json.dumps(task.classes),
            "preprocessing": json.dumps(task.preprocessing.to_dict()),
            "temperature": str(task.temperature),
            "multi_label": json.dumps(task.multi_label),
        },
    )
    onnx.save(found, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, len(x)):
        (got,) = session.run(None, {"pixels": x[:count].numpy()})
        worst = max(worst, float((torch.from_numpy(got) - wanted[:count]).abs().max()))
    return worst


WRITERS: dict[str, Callable[..., float]] = {
    "timm": to_timm, "transformers": to_transformers, "state-dict": to_state_dict, "onnx": to_onnx,
}  # fmt: skip
"""Those that write the whole model: what they wrote is opened again, and the largest difference of a logit returned."""
