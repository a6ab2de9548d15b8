"""visionlora: fine-tunes image models with LoRA-family adapters and applies several of them at once.

Names are loaded when they are first used, so that importing visionlora loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "visionlora.lora.adapter",
    "AdapterConfig": "visionlora.lora.config",
    "AdapterPool": "visionlora.mixing.pool",
    "Axis": "visionlora.diffusion.axes",
    "Classifier": "visionlora.classifier",
    "ClassifyConfig": "visionlora.config",
    "GenerateConfig": "visionlora.config",
    "Handle": "visionlora.lora.handle",
    "Options": "visionlora.lora.combine",
    "PairOverlap": "visionlora.lora.overlap",
    "Prediction": "visionlora.classifier",
    "Result": "visionlora.lora.arithmetic",
    "Shown": "visionlora.pipelines.show",
    "TrainSDConfig": "visionlora.config",
    "VisionLoRAError": "visionlora.errors",
    "attach": "visionlora.mixing.entry",
    "Mix": "visionlora.mixing.mix",
    "Ramp": "visionlora.mixing.scales",
    "Scale": "visionlora.mixing.scales",
    "Window": "visionlora.mixing.scales",
    "Size": "visionlora.lora.arithmetic",
    "bake": "visionlora.pipelines.bake",
    "convert": "visionlora.pipelines.convert",
    "detach": "visionlora.mixing.entry",
    "classify": "visionlora.pipelines.classify",
    "choose_ranks": "visionlora.lora.rank",
    "export": "visionlora.pipelines.export",
    "extract_adapter": "visionlora.lora.arithmetic",
    "generate": "visionlora.pipelines.generate",
    "grid": "visionlora.pipelines.grid",
    "inject": "visionlora.lora.inject",
    "input_spectra": "visionlora.lora.rank",
    "inspect_file": "visionlora.formats.inspection",
    "load_adapter": "visionlora.loaders",
    "load_classifier": "visionlora.classifier",
    "load_pipeline": "visionlora.loaders",
    "merge_adapters": "visionlora.loaders",
    "overlap": "visionlora.pipelines.overlap",
    "pack": "visionlora.lora.packed",
    "merge_together": "visionlora.lora.merge",
    "predict": "visionlora.pipelines.predict",
    "resize_adapter": "visionlora.loaders",
    "save_adapter": "visionlora.loaders",
    "show": "visionlora.pipelines.show",
    "train_sd": "visionlora.pipelines.train_sd",
}

if TYPE_CHECKING:
    from visionlora.classifier import Classifier as Classifier
    from visionlora.classifier import Prediction as Prediction
    from visionlora.classifier import load_classifier as load_classifier
    from visionlora.config import ClassifyConfig as ClassifyConfig
    from visionlora.config import GenerateConfig as GenerateConfig
    from visionlora.config import TrainSDConfig as TrainSDConfig
    from visionlora.diffusion.axes import Axis as Axis
    from visionlora.errors import VisionLoRAError as VisionLoRAError
    from visionlora.formats.inspection import inspect_file as inspect_file
    from visionlora.loaders import load_adapter as load_adapter
    from visionlora.loaders import load_pipeline as load_pipeline
    from visionlora.loaders import merge_adapters as merge_adapters
    from visionlora.loaders import resize_adapter as resize_adapter
    from visionlora.loaders import save_adapter as save_adapter
    from visionlora.lora.adapter import Adapter as Adapter
    from visionlora.lora.arithmetic import Result as Result
    from visionlora.lora.arithmetic import Size as Size
    from visionlora.lora.arithmetic import extract_adapter as extract_adapter
    from visionlora.lora.combine import Options as Options
    from visionlora.lora.config import AdapterConfig as AdapterConfig
    from visionlora.lora.handle import Handle as Handle
    from visionlora.lora.inject import inject as inject
    from visionlora.lora.merge import merge_together as merge_together
    from visionlora.lora.overlap import PairOverlap as PairOverlap
    from visionlora.lora.packed import pack as pack
    from visionlora.lora.rank import choose_ranks as choose_ranks
    from visionlora.lora.rank import input_spectra as input_spectra
    from visionlora.mixing.entry import attach as attach
    from visionlora.mixing.entry import detach as detach
    from visionlora.mixing.mix import Mix as Mix
    from visionlora.mixing.pool import AdapterPool as AdapterPool
    from visionlora.mixing.scales import Ramp as Ramp
    from visionlora.mixing.scales import Scale as Scale
    from visionlora.mixing.scales import Window as Window
    from visionlora.pipelines.bake import bake as bake
    from visionlora.pipelines.classify import classify as classify
    from visionlora.pipelines.convert import convert as convert
    from visionlora.pipelines.export import export as export
    from visionlora.pipelines.generate import generate as generate
    from visionlora.pipelines.grid import grid as grid
    from visionlora.pipelines.overlap import overlap as overlap
    from visionlora.pipelines.predict import predict as predict
    from visionlora.pipelines.show import Shown as Shown
    from visionlora.pipelines.show import show as show
    from visionlora.pipelines.train_sd import train_sd as train_sd

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'visionlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
