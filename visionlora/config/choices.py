"""Words for what trains and watches a run: optimizers, learning-rate schedules and trackers, and the packages they need."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from visionlora.errors import ConfigError, nearest

SCHEDULES = ("cosine", "constant", "linear", "cosine-restarts", "polynomial")


@dataclass(frozen=True)
class OptimizerWord:
    """What a configuration has to know of an optimizer; it is built in `visionlora.training.optimizers`."""

    package: str | None = None
    """Name by which it is imported; None for what visionlora needs anyway."""
    extra: str = "optimizers"
    """Extra of visionlora that installs the package."""
    betas: int = 2
    """How many numbers `betas` may hold."""
    schedule: str = "cosine"
    """Schedule that suits it."""
    rate: float = 1.0
    """Its learning rate as a share of one that suits AdamW."""
    finds_rate: bool = False
    """Whether the learning rate is a factor on what it finds itself; 1 suits it then."""
    averages: bool = False
    """Whether what it has learned is an average that it keeps itself."""


OPTIMIZERS = {
    "adamw": OptimizerWord(),
    "adamw8bit": OptimizerWord("bitsandbytes", "quantised"),
    "adafactor": OptimizerWord(betas=1),
    "prodigy": OptimizerWord("prodigyopt", schedule="constant", finds_rate=True),
    # Every step has the size of the rate, where Adam's are mostly smaller: a third to a tenth (arXiv 2302.06675, section 5).
    "lion": OptimizerWord("lion_pytorch", rate=0.2),
    "schedulefree": OptimizerWord("schedulefree", schedule="constant", averages=True),
    "sgd": OptimizerWord(betas=1),
}
RUN_INITS = ("kaiming", "gaussian", "orthogonal", "pissa")
"""Inits that need nothing but the base model; plug-ins add others."""
PISSA_METHODS = ("lora", "rslora", "lora+")
"""Methods that init pissa can start: both factors are its."""
WITHOUT_INIT = ("adalora", "vera", "ia3", "full", "linear-probe")
"""Methods that have a start of their own."""
WITHOUT_RANKS = ("vera", "ia3", "full", "linear-probe")
"""Methods whose parameters are not those of ranks that rank auto could spread."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precisions, and what torch calls them."""
EMBEDDED_SD = "emoji-64"
"""The Stable Diffusion that comes with visionlora."""
WHOLE = {"full": "every parameter", "linear-probe": "the head alone"}
"""What trains by the methods that adapt no layers."""
WITHOUT = {
    **dict.fromkeys(WHOLE, ("targets", "rank", "alpha", "dropout")),
    "ia3": ("rank", "alpha", "dropout"),
    "vera": ("alpha",),
}
"""Settings of adapters that methods have no use for."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Of files that may hold an adapter, or weights."""
TRACKERS = ("tensorboard", "trackio", "wandb")


def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    return importlib.util.find_spec(package) is not None


def optimizer_problem(word: str) -> str | None:
    """Why a known optimizer cannot be used on this machine, and what to do; None when it can be."""
    found = OPTIMIZERS[word]
    if word == "adamw8bit":
        import torch  # only for those who ask for a GPU

        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            return "its 8-bit states save memory of a GPU, and none is found here: take adamw, or adafactor"
    if found.package is None or installed(found.package):
        return None
    return f"it needs the package {found.package}, which is not installed: pip install 'visionlora[{found.extra}]'"


def tracker_problem(words: tuple[str, ...]) -> str | None:
    """The packages that known trackers need and that are missing, with what to do; None when all are there."""
    missing = [word for word in words if word in TRACKERS and not installed(word)]
    if not missing:
        return None
    return f"{' and '.join(missing)} must be installed first: pip install 'visionlora[tracking]'"


def dtype_name(word: str) -> str:
    """What torch calls a dtype that is written as torch does, or as a precision.

    Raises:
        ConfigError: when it is neither.

    >>> dtype_name("fp16"), dtype_name("bfloat16")
    ('float16', 'bfloat16')
    """
    found = DTYPES.get(word, word)
    if found not in DTYPES.values():
        raise ConfigError(f"dtype is {word!r}. {nearest(word, [*DTYPES, *DTYPES.values()])}")
    return found


def may_be_on_hub(model: str) -> bool:
    """Whether a model is named as the Hugging Face Hub does, owner/name; a folder may be too.

    >>> may_be_on_hub("stabilityai/sdxl"), may_be_on_hub("./model"), may_be_on_hub("emoji-64")
    (True, False, False)
    """
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def missing_beside(model: str) -> str:
    """What is said first of a model that may be on the Hub, where its folder is here and it is not; empty of others."""
    path = Path(model)
    if not may_be_on_hub(model) or path.exists() or not path.parent.is_dir():
        return ""
    return f"The folder {path.parent} is here, but has no {path.name}; perhaps it is a model of the Hub."
