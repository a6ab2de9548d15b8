"""Settings of `visionlora generate` and `grid`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.config.reading import parse_lora_use, take
from visionlora.errors import ConfigError


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw: every prompt with every seed. One prompt, one adapter and paths may be given as plain texts.

    Raises:
        ConfigError: for values of the wrong type, all in one message.
    """

    prompts: Sequence[str]
    loras: Sequence[tuple[str, float, dict[str, float]]] = ()
    """(path, scale, factors by block); also a path, (path, scale), or as `--lora` has it: path:scale@block=factor. Of all of
    them also a mapping from path to scale."""
    lora_folder: Path = Path()
    """Where `<lora:name>` tags look for files that are not among `loras`."""
    model: str = "auto"
    negative_prompt: str = ""
    """None is none, as in diffusers."""
    num_images: int = 1
    """Pictures of each prompt, with seeds one after the other."""
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    scheduler: str = "dpm++"
    width: int | None = None
    height: int | None = None
    """In px; by default both together the model's own area, in the shape of the picture to start from or to follow."""
    clip_skip: int | None = None
    """Layers from the end that the text is read; by default as the adapters were trained, else 1."""
    compose: str = "sum"
    compose_options: tuple[tuple[str, Any], ...] = ()
    init_image: Path | None = None
    strength: float = 0.6
    mask: Path | None = None
    """What is drawn anew of `init_image`: a grey picture of its size, white where."""
    controlnet: str | None = None
    """A diffusers folder or Hub id of a ControlNet for the base's family."""
    control: Path | None = None
    """The picture that it follows: edges, a pose, depth, as it was trained on."""
    control_scale: float = 1.0
    batch_size: int = 1
    """Pictures drawn in one forward pass where they agree in all but prompt, seed and adapters."""
    device: str = "auto"
    """To draw on; auto takes a GPU where there is one: cuda, xpu of Intel, or mps on a Mac."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: half precision on cuda, fp32 on mps and on a CPU."""
    output: Path = Path("pictures")
    force: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", one_or_more(self.prompts))
        object.__setattr__(self, "negative_prompt", self.negative_prompt or "")
        if isinstance(self.loras, Mapping):
            object.__setattr__(self, "loras", tuple(self.loras.items()))
        object.__setattr__(self, "loras", tuple(use_from(given) for given in one_or_more(self.loras)))
        if isinstance(self.compose_options, Mapping):
            object.__setattr__(self, "compose_options", tuple(self.compose_options.items()))
        take(self)


def one_or_more(given: Any) -> Sequence[Any]:
    """A text, path or number alone as a list of one."""
    return (given,) if isinstance(given, (str, Path)) or not isinstance(given, Iterable) else tuple(given)


def use_from(given: Any) -> tuple[str, float, dict[str, float]]:
    """An adapter to draw with: path, scale and factors by block.

    Raises:
        ConfigError: when it is none.

    >>> use_from("dog.safetensors:0.8"), use_from(("dog.safetensors", 0.8))
    (('dog.safetensors', 0.8, {}), ('dog.safetensors', 0.8, {}))
    """
    if isinstance(given, str):
        return parse_lora_use(given)
    parts = given if isinstance(given, (tuple, list)) else (given,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], (str, Path)):
        raise ConfigError(
            f"loras has {given!r}, which is no adapter: write each as a path, (path, scale) or (path, scale, factors by block)."
        )
    return str(parts[0]), parts[1] if len(parts) > 1 else 1.0, parts[2] if len(parts) > 2 else {}
