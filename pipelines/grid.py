"""Axes over settings -> every combination drawn, as contact sheets and one page."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from visionlora.pipelines.drawing import Drawn, Progress, draw_all, recipe_at, telling_how_far, with_others
from visionlora.pipelines.generate import loaded, make_fit, opened, recipes_of, settled

from visionlora.atomic import replace_file
from visionlora.config import GenerateConfig, parse_composition
from visionlora.config.generate import one_or_more
from visionlora.diffusion.axes import Axis, axis_from, sheets_of
from visionlora.diffusion.recipe import take_tags
from visionlora.diffusion.uses import uses_of
from visionlora.errors import ConfigError
from visionlora.mixing.compose import composition
from visionlora.models.devices import process_of
from visionlora.report.grid import draw_grid
from visionlora.report.grid_page import caption_of, page_of


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
    check_axes(config, axes)
    start = replace(config, prompts=list(config.prompts) or prompts[:1], num_images=1, output=config.output / "cells")
    ready = opened(start, say)
    base, adapters = ready.base, ready.adapters
    tags = {p: [use for use in uses_of(p, config) if use.name in dict(take_tags(p)[1])] for p in prompts}
    # The tags of a prompt on an axis act in its own cells alone.
    first = "" if prompts else start.prompts[0]
    (recipe,) = recipes_of(start, ready, [(first, uses_of(first, start))])
    sheets = sheets_of(recipe, across, down, more, tags)
    cells = [r for sheet in sheets for row in sheet.recipes for r in row]
    for path in dict.fromkeys(use.path for r in cells for use in r.loras):
        if path not in adapters:
            adapters[path] = loaded(path, config)
            make_fit(adapters[path], base, config)
    cells = settled(cells, ready, start, say, own_clip_skip="clip_skip" in [a.name for a in axes])
    for r in cells:
        for size in {r.width, r.height}:
            base.check_resolution(size)
    # Drawn in an order in which adapters change as seldom as can be.
    order = sorted(range(len(cells)), key=lambda k: (repr(cells[k].loras), cells[k].compose, k))
    rank, processes = process_of()
    share = slice(*(len(cells) * k // processes for k in (rank, rank + 1)))
    recipes = [cells[k] for k in order]
    with telling_how_far(recipes, start.output, say):
        own = draw_all(recipes, ready, start, say, progress, share)
        done = with_others(own, recipes, start.output, share, started, say, progress)
    page = config.output / "index.html"
    if rank:
        return GridResult(page, (), tuple(done))
    drawn = [d for _, d in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]
    pictures = [Image.open(d.path).convert("RGB") for d in drawn]
    paths, at = [], 0
    for number, sheet in enumerate(sheets):
        rows = [
            pictures[at + k * len(sheet.columns) : at + (k + 1) * len(sheet.columns)] for k in range(len(sheet.rows))
        ]
        at += len(sheet.rows) * len(sheet.columns)
        place = config.output / ("grid.png" if len(sheets) == 1 else f"grid-{number + 1}.png")
        save_sheet(
            draw_grid(rows, sheet.rows, sheet.columns, title=sheet.title, caption=caption_of(recipe, axes)), place
        )
        paths.append(place)
    cells_drawn = [(d.path, recipe_at(d.path) or d.recipe) for d in drawn]  # with the batches that they were drawn in
    replace_file(page, page_of(sheets, cells_drawn, caption_of(recipe, axes)).encode())
    return GridResult(page, tuple(paths), tuple(drawn))


def check_axes(config: GenerateConfig, axes: Sequence[Axis]) -> None:
    """Raises ConfigError when an axis would change nothing, or there is no such composition."""
    needed = {"strength": (config.init_image, "--init-image"), "control_scale": (config.controlnet, "--controlnet")}
    for axis in axes:
        there, option = needed.get(axis.name, (True, ""))
        if there is None:
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
