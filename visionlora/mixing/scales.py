"""How strongly an adapter acts: where in the model, when in the sampling, and on which picture of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionlora.errors import ConfigError, nearest
from visionlora.formats.names import flattened, to_sgm

WEBUI_26 = ("BASE", *(f"IN{k:02d}" for k in range(12)), "MID", *(f"OUT{k:02d}" for k in range(12)))
WEBUI_17 = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{k:02d}" for k in range(3, 12)))
WEBUI_20 = ("BASE", *(f"IN{k:02d}" for k in range(9)), "MID", *(f"OUT{k:02d}" for k in range(9)))
WEBUI_12 = ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{k:02d}" for k in range(6)))
WEBUI = {len(names): names for names in (WEBUI_12, WEBUI_17, WEBUI_20, WEBUI_26)}
"""Block-weight lists of A1111's extension sd-webui-lora-block-weight, 12 and 20 for SDXL. Blocks that a list lacks get 0, as
there, if none of their attention is adapted."""
LARGEST = 3.4028234663852886e38
"""In fp32, in which scales are multiplied."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
OUTSIDE = {"conv_in": "in", "time_embedding": "in", "add_embedding": "in", "conv_out": "out", "conv_norm_out": "out"}
"""Layers of a UNet outside its blocks, and the word for where they are."""

Steps = Callable[[float], float]
"""Progress of the sampling, 0 at the first step and 1 at the last -> factor."""


@dataclass(frozen=True)
class Window:
    """Full strength from one moment to another (0 to 1 of the sampling), 0 outside.

    Raises:
        ConfigError: when the moments are not in order, or not between 0 and 1.

    >>> Window(0.5, 1.0)(0.4), Window(0.5, 1.0)(0.6)
    (0.0, 1.0)
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        ends = (self.start, self.end)
        if not all(isinstance(end, (int, float)) for end in ends) or not 0 <= self.start <= self.end <= 1:
            first, last = (f"{end:g}" if isinstance(end, (int, float)) else repr(end) for end in ends)
            raise ConfigError(
                f"An adapter acts from {first} to {last} of the sampling; both must be between 0 and 1, and the first the "
                "smaller."
            )

    def __call__(self, progress: float) -> float:
        """1 or 0."""
        return 1.0 if self.start <= progress <= self.end else 0.0


@dataclass(frozen=True)
class Ramp:
    """From one factor to another, evenly.

    Raises:
        ConfigError: when one is no finite number.

    >>> Ramp(1.0, 0.0)(0.25)
    0.75
    """

    first: float
    last: float

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            object.__setattr__(self, name, plain(getattr(self, name)))
            if not is_number(getattr(self, name)):
                raise ConfigError(f"A ramp has {name} {getattr(self, name)!r}; it must be a finite number.")

    def __call__(self, progress: float) -> float:
        """The factor at this moment."""
        return self.first + (self.last - self.first) * progress


@dataclass(frozen=True)
class PerStep:
    """One factor per step, stretched over however many there are.

    >>> PerStep((1.0, 0.5, 0.0))(0.5)
    0.5
    """

    values: tuple[float, ...]

    def __call__(self, progress: float) -> float:
        """The factor of the step at this moment."""
        return self.values[min(len(self.values) - 1, int(progress * len(self.values)))]


@dataclass(frozen=True)
class Scale:
    """The strength of one adapter; the factors multiply.

    Raises:
        ConfigError: when a number is not finite, there is no picture or step, or `steps` is neither numbers nor a function.
    """

    strength: float = 1.0
    blocks: Mapping[str, float] | Sequence[float] = field(default_factory=dict)
    """Factors by part (`unet`, `text_encoder`), block (`down`, `mid`, `up`, `in`, `out`), single block (`down.1`, `up.0`), or
    any beginning of a layer's name (`down_blocks.1.attentions.0`, `blocks.7` of a ViT); the longest that fits counts, 1 where
    none does. Or a list of 12, 17, 20 or 26 numbers as A1111 has them."""
    steps: Steps | Sequence[float] | None = None
    """`Window(start, end)`, `Ramp(first, last)`, numbers, or a function of the progress (0 to 1). Text encoders, which run
    before the first step, have the strength throughout."""
    images: Sequence[float] | None = None
    """One factor per picture of a batch."""

    def __post_init__(self) -> None:
        for name in ("strength", "blocks", "steps", "images"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        check_kinds(self.blocks, self.images)
        numbers = [self.strength, *(self.blocks.values() if isinstance(self.blocks, Mapping) else self.blocks)]
        numbers += list(self.images or [])
        if not callable(self.steps) and self.steps is not None:
            given: Any = self.steps  # whatever its type promises
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise ConfigError(
                    f"steps is {self.steps!r}; give Window(0.5, 1.0), Ramp(1.0, 0.0), one number per step, or a function of "
                    "the progress (0 to 1)."
                )
            numbers += list(self.steps)
        for value in numbers:
            if not is_number(value):
                raise ConfigError(f"A scale is {value!r}; it must be a finite number.")
        if not callable(self.steps) and self.steps is not None:
            object.__setattr__(self, "steps", PerStep(tuple(float(v) for v in self.steps)))
        if self.images is not None and not len(self.images):
            raise ConfigError("images is empty: give one number per picture of the batch.")
        if isinstance(self.steps, PerStep) and not self.steps.values:
            raise ConfigError("steps is empty: give at least one number.")
        if not isinstance(self.blocks, Mapping) and len(self.blocks) not in WEBUI:
            raise ConfigError(
                f"A list of block weights has 12, 17, 20 or 26 numbers, as in A1111; this one has {len(self.blocks)}."
            )

    @property
    def of_all_images(self) -> float:
        """The factor of every picture, where all have the same; 1 where they differ."""
        return float(self.images[0]) if self.images is not None and len(set(self.images)) == 1 else 1.0

    @property
    def silent(self) -> bool:
        """Whether it is 0 whatever the adapter's layers: in strength, at every step, or on every picture."""
        of_steps = self.steps.values if isinstance(self.steps, PerStep) else None
        of_blocks = None if isinstance(self.blocks, Mapping) else self.blocks
        return not self.strength or any(f is not None and not any(f) for f in (of_steps, of_blocks, self.images))

    def at(self, progress: float) -> float:
        """The factor of this moment, the strength included."""
        factor = plain(self.steps(progress)) if callable(self.steps) else 1.0
        if not is_number(factor):
            raise ConfigError(
                f"steps gives {factor!r} at {progress:.0%} of the sampling; it must give a finite number for every progress "
                "from 0 to 1."
            )
        return self.strength * float(factor)


def scale_from(strength: float, words: Mapping[str, float]) -> Scale:
    """A scale from `name=number` words: factors of blocks, and over the steps either `start` and `end` (full strength from one
    moment to another, 0 to 1 of the sampling) or `first` and `last` (from one factor to another, evenly).

    Raises:
        ConfigError: when both are given, or the moments are not in order.

    >>> scale_from(0.8, {"up": 1.2, "start": 0.5}).steps
    Window(start=0.5, end=1.0)
    """
    window = {k: float(words[k]) for k in ("start", "end") if k in words}
    ramp = {k: float(words[k]) for k in ("first", "last") if k in words}
    if window and ramp:
        raise ConfigError("start and end cut the steps, first and last ramp over them: give one of both.")
    blocks = {k: v for k, v in words.items() if k not in (*window, *ramp)}
    steps: Window | Ramp | None = None
    if window:
        steps = Window(**window)
    elif ramp:
        steps = Ramp(ramp.get("first", 1.0), ramp.get("last", 1.0))
    return Scale(strength, blocks, steps)


def scale_in_file(path: str | Path, strength: float, words: Mapping[str, float]) -> Scale:
    """A scale from `name=number` words for what is written to a file, which has no steps.

    Raises:
        ConfigError: when the words are of steps, or a number is not finite.
    """
    if steps := [k for k in ("start", "end", "first", "last") if k in words]:
        raise ConfigError(
            f"{path}: {steps[0]} is of steps, which a file cannot hold: give factors of blocks alone, or draw with "
            "`visionlora generate --lora`."
        )
    return scale_from(strength, words)


def check_kinds(blocks: Any, images: Any) -> None:
    """Raises ConfigError when the factors of blocks or pictures are none, whatever their types promise."""
    by_name = isinstance(blocks, Mapping) and all(isinstance(word, str) for word in blocks)
    if not by_name and not isinstance(blocks, (list, tuple)):
        raise ConfigError(
            f"blocks is {blocks!r}; give factors by the names of blocks, such as {{'up': 1.2}}, or a list of A1111's."
        )
    if images is not None and not isinstance(images, (list, tuple)):
        raise ConfigError(f"images is {images!r}; give one number per picture of the batch, such as [1.0, 0.0].")


def plain(value: Any) -> Any:
    """Numbers of numpy and torch, and what holds them, as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else value


def is_number(value: Any) -> bool:
    """Whether it is a finite number, of Python's own."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def as_scale(value: Any) -> Scale:
    """A number, factors by block, an A1111 list or a `Scale` as a `Scale`."""
    value = plain(value)
    if isinstance(value, Scale):
        return value
    if isinstance(value, Mapping):
        return Scale(blocks=dict(value))
    if isinstance(value, (list, tuple)):
        return Scale(blocks=tuple(value))
    return Scale(strength=value)


def block_words(component: str, layer: str) -> list[str]:
    """The words that reach a layer, from the widest to the narrowest.

    >>> block_words("unet", "down_blocks.1.attentions.0.proj_in")[:4]
    ['unet', 'down', 'down.1', 'down_blocks']
    """
    found = [component]
    if component == "unet":
        if match := re.match(r"(down|up)_blocks\.(\d+)", layer):
            found += [match[1], f"{match[1]}.{match[2]}"]
        elif layer.startswith("mid_block"):
            found.append("mid")
        else:
            found += [word for start, word in OUTSIDE.items() if layer.startswith(start)]
    parts = layer.split(".")
    return found + [".".join(parts[: k + 1]) for k in range(len(parts))]


def webui_block(component: str, layer: str) -> str:
    """The name of a layer's block in A1111's lists."""
    if component != "unet":
        return "BASE"
    name = to_sgm(flattened(layer))
    if match := re.match(r"(input|output)_blocks_(\d+)_", name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    return "MID" if name.startswith("middle_block") else "BASE"


def check_listed(length: int, layers: Iterable[tuple[str, str]]) -> None:
    """Raises ConfigError for a list of the wrong family: one that lacks blocks of which attention is adapted."""
    blocks = {webui_block(*layer) for layer in layers if "attentions." in layer[1]}
    if lacking := sorted(blocks - {*WEBUI[length]}):
        fitting = " or ".join(str(n) for n, names in WEBUI.items() if blocks <= {*names})
        raise ConfigError(
            f"A list of {length} block weights has no number for {', '.join(lacking)}, where this adapter has layers: those of "
            f"12 and 20 are for SDXL, of 17 and 26 for Stable Diffusion 1.x and 2.x. Give {fitting} numbers."
        )


def block_factors(scale: Scale, layers: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The factor of every layer.

    Args:
        scale: whose blocks count.
        layers: pairs of component and name.

    Raises:
        ConfigError: when a word reaches none of the layers, unless it is one of those of a pipeline's parts.
    """
    layers = list(layers)
    on_pipeline = not layers or any(component in COMPONENTS for component, _ in layers)
    if not isinstance(scale.blocks, Mapping):
        if not on_pipeline:
            raise ConfigError(
                "A list of block weights is for the UNet of Stable Diffusion, which this model is not: give factors by the "
                f"beginnings of layers' names, such as {{{layers[0][1]!r}: 0.5}}."
            )
        check_listed(len(scale.blocks), layers)
        by_name = dict(zip(WEBUI[len(scale.blocks)], scale.blocks, strict=True))
        return {layer: float(by_name.get(webui_block(*layer), 0.0)) for layer in layers}
    if not scale.blocks:
        return dict.fromkeys(layers, 1.0)
    found, reached = {}, set()
    known: set[str] = set()
    for layer in layers:
        words = block_words(*layer)
        known.update(words)
        fitting = [word for word in words if word in scale.blocks]
        reached.update(fitting)
        found[layer] = float(scale.blocks[fitting[-1]]) if fitting else 1.0
    for word in scale.blocks:
        of_pipeline = on_pipeline and word in (*COMPONENTS, "down", "mid", "up", "in", "out")
        if word not in reached and not of_pipeline:
            short = {w for w in known if w.count(".") <= word.count(".")} or known
            raise ConfigError(f"No adapted layer is in block {word!r}. {nearest(word, short)}")
    return found
