"""Axes over settings -> every combination drawn, as contact sheets and one page."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from visionlora.pipelines.drawing import Drawn, Opened, Progress, draw_all, recipe_at, telling_how_far, with_others
from visionlora.pipelines.generate import lacking, loaded, make_fit, opened, place_of, recipes_of, settled

from visionlora.atomic import replace_file
from visionlora.config import GenerateConfig, check_kind, parse_composition
from visionlora.config.generate import one_or_more
from visionlora.diffusion.axes import OPENED, Axis, axis_from, sheets_of
from visionlora.diffusion.given import PICTURES, shape_of, sized
from visionlora.diffusion.recipe import LoraUse, Recipe, take_tags
from visionlora.diffusion.uses import uses_of
from visionlora.errors import ConfigError
from visionlora.mixing.compose import composition
from visionlora.models.base import quiet
from visionlora.models.devices import process_of
from visionlora.report.grid import draw_grid
from visionlora.report.grid_page import caption_of, page_of

SHAPES = frozenset({"init_image", "control"})
"""Axes that decide of what shape pictures are, where that is not given."""


@dataclass(frozen=True)
class GridResult:
    """What was drawn."""

    page: Path
    sheets: tuple[Path, ...]
    cells: tuple[Drawn, ...]


def grid(
    config: GenerateConfig, x: Axis | str, y: Axis | str | None = None, others: Sequence[Axis | str] = (),
    say: Callable[[str], None] = lambda line: None, progress: Progress = lambda done, total: None,
) -> GridResult:  # fmt: skip
    """Draws every combination; pictures that are there already are taken as they are, so a grid can be resumed and grown.

    Args:
        config: the settings that no axis changes; its first prompt and seed are the start.
        x: across; as an axis or in words, as `parse_axis` reads them.
        y: down.
        others: one sheet for each combination of theirs.
        say: told what is used.
        progress: called with (pictures done, pictures).

    Returns:
        `index.html` (self-contained; a click enlarges, the title shows the recipe), `grid.png` (one per sheet), and `cells/`.
        Under `accelerate launch` the processes share the cells, and the first alone writes pages and sheets.

    Raises:
        ConfigError: when an axis or setting cannot be used.
        AdapterFileError, ModelError, DataError, RunFolderError: see `visionlora.pipelines.generate.generate`.
    """
    check_kind(config, GenerateConfig, "grid", "['a dog']")
    started = time.time()
    across, down = axis_from(x), None if y is None else axis_from(y)
    more = [axis_from(a) for a in one_or_more(others)]
    axes = [a for a in (across, down, *more) if a is not None]
    prompts = [str(v) for a in axes if a.name == "prompt" for v in a.values]
    if len(config.prompts) > 1 or (config.prompts and prompts):
        raise ConfigError(
            f"A grid starts from one prompt, and there are {len(config.prompts) + len(prompts)}: give several as an axis, --y "
            "'prompt=a dog|a cat', and leave --prompt out."
        )
    if not config.prompts and not prompts:
        raise ConfigError("There is no prompt: --prompt TEXT, or several as an axis, --y 'prompt=a dog|a cat'.")
    start = first_of(config, axes)
    check_axes(start, axes)
    start = replace(start, prompts=list(config.prompts) or prompts[:1], num_images=1, output=config.output / "cells")
    tags = {p: [use for use in uses_of(p, config) if use.name in dict(take_tags(p)[1])] for p in prompts}
    # The tags of a prompt on an axis act in its own cells alone.
    first = "" if prompts else start.prompts[0]
    plans = [(first, uses_of(first, start))]
    starts, bases = every_base(start, axes, plans, say)
    sheets = sheets_of(starts, across, down, more, tags)
    cells = [r for sheet in sheets for row in sheet.recipes for r in row]
    # Drawn in an order in which models and adapters change as seldom as can be.
    order: list[int] = []
    for which, ready in bases.items():
        own = [k for k, r in enumerate(cells) if base_of(r) == which]
        fitting = fitted([cells[k] for k in own], ready, start, say, {a.name for a in axes})
        for k, r in zip(own, fitting, strict=True):
            cells[k] = r
        order += sorted(own, key=lambda k: (repr(cells[k].loras), cells[k].compose, k))
    rank, processes = process_of()
    share = slice(*(len(cells) * k // processes for k in (rank, rank + 1)))
    recipes = [cells[k] for k in order]
    with telling_how_far(recipes, start.output, say):
        mine = drawn_by_base(recipes, bases, start, say, progress, share)
        done = with_others(mine, recipes, start.output, share, started, say, progress)
    page = config.output / "index.html"
    if rank:
        return GridResult(page, (), tuple(done))
    drawn = [d for _, d in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]
    pictures = [Image.open(d.path).convert("RGB") for d in drawn]
    paths, at, caption = [], 0, caption_of(next(iter(starts.values())).loras, cells, axes)
    for number, sheet in enumerate(sheets):
        rows = [
            pictures[at + k * len(sheet.columns) : at + (k + 1) * len(sheet.columns)] for k in range(len(sheet.rows))
        ]
        at += len(sheet.rows) * len(sheet.columns)
        place = config.output / ("grid.png" if len(sheets) == 1 else f"grid-{number + 1}.png")
        save_sheet(draw_grid(rows, sheet.rows, sheet.columns, title=sheet.title, caption=caption), place)
        paths.append(place)
    cells_drawn = [(d.path, recipe_at(d.path) or d.recipe) for d in drawn]  # with the batches that they were drawn in
    replace_file(page, page_of(sheets, cells_drawn, caption).encode())
    return GridResult(page, tuple(paths), tuple(drawn))


def every_base(
    start: GenerateConfig, axes: Sequence[Axis], plans: Sequence[tuple[str, list[LoraUse]]], say: Callable[[str], None]
) -> tuple[dict[tuple[Any, ...], Recipe], dict[tuple[str, str], Opened]]:
    """Base models in each precision, as axes have them or else the settings.

    Args:
        start: the settings.
        axes: of the grid.
        plans: the prompt that the other axes change, with its adapters.
        say: told what is used.

    Returns:
        The recipes to change, as `visionlora.diffusion.axes.Bases`, and what to draw with by `base_of` a recipe.

    Raises:
        ConfigError, AdapterFileError, ModelError, RunFolderError: see `visionlora.pipelines.generate.generate`.
    """
    chosen = [axis for name in OPENED for axis in axes if axis.name == name]
    starts: dict[tuple[Any, ...], Recipe] = {}
    bases: dict[tuple[str, str], Opened] = {}
    for values in itertools.product(*(axis.values for axis in chosen)):
        own: dict[str, Any] = {axis.name: value for axis, value in zip(chosen, values, strict=True)}
        config = replace(start, **own)
        ready = opened(config, say)
        (recipe,) = recipes_of(config, ready, plans)
        if before := next((v for v, r in starts.items() if base_of(r) == base_of(recipe)), None):
            axis, one, other = next(c for c in zip(chosen, before, values, strict=True) if c[1] != c[2])
            raise ConfigError(f"Axis {axis.name!r} has {one!r} and {other!r}, which are one: leave one of them out.")
        # A GPU may not hold them all.
        starts[values], bases[base_of(recipe)] = recipe, moved(ready, "cpu") if chosen else ready
    return starts, bases


def base_of(recipe: Recipe) -> tuple[str, str]:
    """Which base model draws a recipe, in which precision."""
    return recipe.model, recipe.precision


def fitted(
    cells: Sequence[Recipe],
    ready: Opened,
    config: GenerateConfig,
    say: Callable[[str], None],
    changing: Collection[str],
) -> list[Recipe]:
    """The cells of one base model, settled, with adapters and sizes that fit it.

    Args:
        cells: to settle.
        ready: what is opened.
        config: of the grid.
        say: told what is unusual.
        changing: names of the axes.
    """
    for path in dict.fromkeys(use.path for r in cells for use in r.loras):
        if path not in ready.adapters:
            ready.adapters[path] = loaded(path, config)
            make_fit(ready.adapters[path], ready.base, config)
    if not SHAPES.isdisjoint(changing):
        cells = in_their_shapes(cells, ready, config, changing)
    found: list[Recipe] = settled(cells, ready, config, say, "clip_skip" in changing)
    for size in {side for r in found for side in (r.width, r.height)}:
        ready.base.check_resolution(size)
    return found


def in_their_shapes(
    cells: Sequence[Recipe], ready: Opened, config: GenerateConfig, changing: Collection[str]
) -> list[Recipe]:
    """Each cell in the shape of its own picture, but for sides that were given."""
    shapes = {pair: shape_of(*pair) for pair in dict.fromkeys((r.init_image, r.control) for r in cells)}
    found = []
    for cell in cells:
        width = cell.width if "width" in changing else config.width
        height = cell.height if "height" in changing else config.height
        shape = shapes[cell.init_image, cell.control]
        width, height = sized(shape, width, height, ready.base.resolution, ready.base.multiple)
        found.append(replace(cell, width=width, height=height))
    return found


def drawn_by_base(
    recipes: Sequence[Recipe], bases: Mapping[tuple[str, str], Opened], config: GenerateConfig, say: Callable[[str], None],
    progress: Progress, share: slice,
) -> list[Drawn]:  # fmt: skip
    """The share of this process; the recipes of a base model follow each other."""
    device, _ = place_of(config)
    total, found = len(recipes[share]), list[Drawn]()
    for which, ready in bases.items():
        own = [k for k in range(len(recipes))[share] if base_of(recipes[k]) == which]
        if not own:  # in the share of another process
            continue
        moved(ready, device)
        before, part = len(found), slice(own[0], own[-1] + 1)
        found += draw_all(recipes, ready, config, say, lambda d, _, done=before: progress(done + d, total), part)
        if len(bases) > 1:
            moved(ready, "cpu")
    return found


def moved(ready: Opened, device: str | torch.device) -> Opened:
    """A base model on another device; diffusers warns of half precision on a CPU, where none is to be drawn."""
    with quiet("diffusers"):
        ready.base.pipe.to(device)
    return ready


def first_of(config: GenerateConfig, axes: Sequence[Axis]) -> GenerateConfig:
    """The settings with the first value of each axis that needs something opened.

    Raises:
        ConfigError: when it is given beside its axis.
    """
    firsts: dict[str, Any] = {}
    for axis in axes:
        if axis.name in (*OPENED, *PICTURES):
            if (given := getattr(config, axis.name)) != getattr(GenerateConfig, axis.name):
                raise ConfigError(
                    f"--{axis.name.replace('_', '-')} {given} and an axis {axis.name!r} do not go together: leave one of them "
                    "out."
                )
            firsts[axis.name] = axis.values[0]
    return replace(config, **firsts)


def check_axes(config: GenerateConfig, axes: Sequence[Axis]) -> None:
    """Raises ConfigError when an axis would change nothing, or there is no such composition."""
    for axis in axes:
        if option := lacking(config).get(axis.name):
            raise ConfigError(f"Axis {axis.name!r} changes nothing without {option}: give it, or leave the axis out.")
    found = [parse_composition(word) for axis in axes if axis.name == "compose" for word in axis.values]
    regions = dict(config.compose_options).get("regions")
    for name, options in found:
        composition(name, **(options | {"regions": regions} if regions and name == "regional" else options))
    if regions and found and "regional" not in dict(found):
        raise ConfigError(
            "Regions are for the composition regional, which axis 'compose' has not: add it, or leave --region out."
        )


def save_sheet(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    replace_file(path, data.getvalue())
