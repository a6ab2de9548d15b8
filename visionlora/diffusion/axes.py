"""Axes over settings -> the recipes of every combination, sheet by sheet."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from visionlora.config import parse_composition
from visionlora.diffusion.given import PICTURES, named
from visionlora.diffusion.recipe import LoraUse, Recipe, take_tags
from visionlora.diffusion.uses import hashed
from visionlora.errors import ConfigError, nearest
from visionlora.formats.called import names_of

NUMBERS: dict[str, type] = {
    "seed": int, "steps": int, "step": int, "width": int, "height": int, "guidance_scale": float, "strength": float,
    "control_scale": float, "clip_skip": int,
}  # fmt: skip
OPENED = ("model", "precision")
"""Axes whose values need the base model opened anew."""
WORDS = ("prompt", "negative_prompt", "scheduler", "compose", *OPENED, *PICTURES)
TEXTS = ("prompt", "negative_prompt")
"""Axes whose values have commas: a bar alone parts them."""
PLAIN = {*NUMBERS, *WORDS} - {"step", "prompt", "compose", *OPENED, *PICTURES}
"""Axes that are fields of a recipe."""
LORA = re.compile(r"lora:(?P<name>.+)\.(?P<what>[a-z_0-9]+)")
"""An axis of an adapter; of one that is there what follows its name counts, dots and all."""
OF_FILES = ("scale", "file", "step")
"""What follows the name of an adapter, where it is not a block."""
MOST_CELLS = 10_000


@dataclass(frozen=True)
class Axis:
    """One setting and the values that it takes.

    Raises:
        ConfigError: when there is no such setting, or a value cannot be one of it.

    >>> Axis("guidance-scale", [1, 2]), Axis("prompt", "a dog").values
    (Axis(name='guidance_scale', values=(1.0, 2.0)), ('a dog',))
    """

    name: str
    """`step` (of the training run that is the only adapter, as its checkpoints have it), `prompt`, `negative_prompt`, `seed`,
    `steps`, `guidance_scale`, `scheduler`, `compose`, `strength`, `control_scale`, `clip_skip`, `width`, `height`, `model`,
    `precision`, `init_image`, `mask`, `control` (files of pictures); `lora:NAME.scale`, `lora:NAME.BLOCK` (a factor of one
    block), `lora:NAME.file` (other files in its place) or `lora:NAME.step`."""
    values: Sequence[Any]
    """One by itself, or several; kept as a tuple."""

    def __post_init__(self) -> None:
        name = axis_name(self.name)
        given = (
            [self.values]
            if isinstance(self.values, (str, Path)) or not hasattr(self.values, "__iter__")
            else self.values
        )
        values = tuple(value_of(name, value) for value in given)
        if not values:
            raise ConfigError(f"Axis {name!r} has no value.")
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise ConfigError(f"Axis {name!r} has the value {value!r} more than once.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    def label(self, value: Any) -> str:
        """What stands beside a row or column."""
        text = f"{value:g}" if isinstance(value, float) else str(value) or "(none)"
        if self.name == "prompt":
            return text
        if self.name.endswith(".file") or self.name in PICTURES:
            text = dict(zip(self.values, names_of(self.values), strict=True))[value]
        if self.name == "model":
            text = Path(text).name
        name = self.name.removeprefix("lora:")
        return (
            f"{name.removesuffix('.scale')} at {text}"
            if name.endswith(".scale")
            else f"{name.removesuffix('.file')} {text}"
        )


def parse_axis(word: str) -> Axis:
    """`seed=1..4`, `lora:dog.scale=0,0.5,1`, `prompt=a dog|a cat, sitting` (a bar parts texts with commas).

    Raises:
        ConfigError: when the setting is unknown or a value cannot be one of it.

    >>> parse_axis("seed=1..3").values, parse_axis("lora:dog.scale=0,0.5").values
    ((1, 2, 3), (0.0, 0.5))
    """
    name, equals, text = word.partition("=")
    if not equals or not text.strip():
        raise ConfigError(f"An axis is written name=value,value…; this one is {word!r}.")
    name = axis_name(name)
    parts = [p.strip() for p in text.split("|" if "|" in text or name in TEXTS else ",")]
    if "" in parts and name != "negative_prompt":
        raise ConfigError(f"Axis {name!r} has an empty value: {text!r}.")
    values: list[Any] = []
    for part in parts:
        if kind_of(name) is str or not (ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", part)):
            values.append(part)
            continue
        found = range(int(ends[1]), int(ends[2]) + 1)
        if found.stop - found.start > MOST_CELLS:
            count = f"{found.stop - found.start:,}"
            raise ConfigError(f"Axis {name!r} has {count} values; a grid has at most {MOST_CELLS:,} pictures.")
        values += found
    if not values:
        raise ConfigError(f"Axis {name!r} has no value: {text!r}.")
    return Axis(name, tuple(values))


def axis_name(given: str) -> str:
    """The name of an axis as it is kept.

    Raises:
        ConfigError: when there is none of it.
    """
    name = given.strip()
    if LORA.fullmatch(name):
        return name
    name = name.replace("-", "_")
    if name not in (*NUMBERS, *WORDS):
        known = [*NUMBERS, *WORDS, "lora:NAME.scale", "lora:NAME.file"]
        raise ConfigError(f"There is no axis {name!r}. {nearest(name, known)}")
    return name


def kind_of(name: str) -> type:
    """What the values of an axis are."""
    lora = LORA.fullmatch(name)
    return NUMBERS.get(name, {"file": str, "step": int}.get(lora["what"], float) if lora else str)


def value_of(name: str, given: Any) -> Any:
    """A value of an axis: a text, or a number from its text or from that of any library.

    Raises:
        ConfigError: when it is none.
    """
    kind = kind_of(name)
    if kind is str and isinstance(given, (str, Path)):
        return str(Path(given).expanduser()) if name in PICTURES else str(given)
    try:
        plain = given if isinstance(given, str) else float(given) if kind is float else operator.index(whole(given))
        number = kind(plain)
        if kind is not str and not isinstance(given, bool) and math.isfinite(number):
            return number
    except (TypeError, ValueError):
        pass
    what = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ConfigError(f"Axis {name!r} has the value {given!r}, which is not {what}.")


def whole(given: Any) -> Any:
    """A number without a part after the point as an integer."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def axis_from(given: Axis | str) -> Axis:
    """An axis, or its words."""
    return parse_axis(given) if isinstance(given, str) else given


Tags = Mapping[str, Sequence[LoraUse]]
"""By prompt: the adapters that its tags name, at the tags' scales."""
Bases = Mapping[tuple[Any, ...], Recipe]
"""By the values of the axes that need the model opened anew, as `OPENED` has them: the recipe that the other axes change."""


def changed(recipe: Recipe, axis: Axis, value: Any, tags: Tags | None = None) -> Recipe:
    """The recipe with one setting at one value.

    Args:
        recipe: to change.
        axis: the setting.
        value: its value.
        tags: of prompts.

    Raises:
        ConfigError: when the axis is of an adapter that the recipe has not.
        DataError: when a picture cannot be read.
    """
    if axis.name == "compose":
        name, options = parse_composition(value)
        regions = recipe.compose_options.get("regions") if name == "regional" else None
        if regions:
            return replace(recipe, compose=name, compose_options={**options, "regions": regions})
        return replace(recipe, compose=name, compose_options=options, region_hashes={})
    if axis.name in PICTURES:
        path, hash = named(Path(value), PICTURES[axis.name])
        hash_field = f"{axis.name.removesuffix('_image')}_hash"
        own: dict[str, Any] = {axis.name: path, hash_field: hash}
        return replace(recipe, **own)
    if axis.name == "step":
        if len(recipe.loras) != 1:
            raise ConfigError(f"Axis 'step' needs one adapter, there are {len(recipe.loras)}: write lora:NAME.step=….")
        name, what = recipe.loras[0].name, "step"
    elif axis.name == "prompt":
        tagged = (tags or {}).get(value, ())
        own = {use.name: use for use in recipe.loras} | {use.name: use for use in tagged}
        return replace(recipe, prompt=take_tags(value)[0], loras=tuple(own.values()))
    elif axis.name in PLAIN:
        return replace(recipe, **{axis.name: value})
    else:
        match = LORA.fullmatch(axis.name)
        assert match is not None
        word = axis.name.removeprefix("lora:")
        there = [use.name for use in recipe.loras if word.startswith(f"{use.name}.")]
        name = max(there, key=len, default=match["name"])
        what = word.removeprefix(f"{name}.") if there else match["what"]
    if name not in [use.name for use in recipe.loras]:
        there = [use.name for use in recipe.loras]
        hint = nearest(name, there) if there else "Give it with --lora."
        raise ConfigError(f"Axis {axis.name!r} is of an adapter that is not there. {hint}")
    if what not in OF_FILES and (meant := get_close_matches(what, OF_FILES, 1, cutoff=0.75)):
        raise ConfigError(f"There is no axis {axis.name!r}. Did you mean 'lora:{name}.{meant[0]}'?")
    uses = []
    for use in recipe.loras:
        if use.name == name:
            if what == "scale":
                use = replace(use, scale=value)
            elif what == "step":
                path = checkpoint_of(use.path, value)
                use = hashed(replace(use, path=path))
            elif what == "file":
                use = hashed(replace(use, path=value))
            else:
                use = replace(use, blocks={**use.blocks, what: value})
        uses.append(use)
    return replace(recipe, loras=tuple(uses))


def checkpoint_of(run: str, step: int) -> str:
    """The adapter that a training run had at a step.

    Raises:
        ConfigError: when the run kept none at this step.
    """
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    file = folder / "checkpoints" / f"step-{step:06d}.safetensors"
    if not file.is_file():
        there = [
            str(int(p.stem.removeprefix("step-"))) for p in sorted((folder / "checkpoints").glob("step-*.safetensors"))
        ]
        kept = (
            f"It kept steps {', '.join(there)}."
            if there
            else "It kept no checkpoints: name the run folder of a training."
        )
        raise ConfigError(f"{folder} has no checkpoint of step {step}. {kept}")
    return str(file)


@dataclass(frozen=True)
class Sheet:
    """One contact sheet: rows and columns at fixed values of the other axes."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    recipes: tuple[tuple[Recipe, ...], ...]


def sheets_of(bases: Bases, x: Axis, y: Axis | None, others: Sequence[Axis], tags: Tags | None = None) -> list[Sheet]:
    """All sheets, one for each combination of the other axes.

    Args:
        bases: what the other axes change.
        x: across.
        y: down.
        others: one sheet for each combination of theirs.
        tags: of the prompts on an axis.

    Raises:
        ConfigError: when an axis comes twice, or there would be too many pictures.
    """
    axes = [a for a in (x, y, *others) if a is not None]
    names = [a.name for a in axes]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(f"Axis {twice!r} is there twice.")
    cells = 1
    for axis in axes:
        cells *= len(axis.values)
    if cells > MOST_CELLS:
        raise ConfigError(f"That is {cells:,} pictures; a grid has at most {MOST_CELLS:,}.")
    found = []
    down = [None] if y is None else [(y, v) for v in y.values]
    for values in itertools.product(*(a.values for a in others)):
        fixed = list(zip(others, values, strict=True))
        rows = [[*fixed, *([row] if row else [])] for row in down]
        found.append(
            Sheet(
                ", ".join(a.label(v) for a, v in fixed),
                tuple("" if row is None else row[0].label(row[1]) for row in down),
                tuple(x.label(v) for v in x.values),
                tuple(tuple(cell_of(bases, [*row, (x, v)], tags) for v in x.values) for row in rows),
            )
        )
    return found


def cell_of(bases: Bases, settings: Sequence[tuple[Axis, Any]], tags: Tags | None) -> Recipe:
    """The recipe of one cell. The prompt comes first, as its tags may bring the adapters of other axes."""
    anew = {axis.name: value for axis, value in settings if axis.name in OPENED}
    base = bases[tuple(anew[name] for name in OPENED if name in anew)]
    settings = [(axis, value) for axis, value in settings if axis.name not in OPENED]
    plain = {axis.name: value for axis, value in settings if axis.name in PLAIN}
    base = replace(base, **plain)  # at once: steps and strength may suit each other alone
    for axis, value in sorted(settings, key=lambda pair: pair[0].name != "prompt"):
        if axis.name not in plain:
            base = changed(base, axis, value, tags)
    return base
