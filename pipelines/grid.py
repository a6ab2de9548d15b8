"""Axes over settings -> every combination drawn, as contact sheets and one page."""

from __future__ import annotations

import base64
import html
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from visionlora.pipelines.generate import (
    Drawn,
    GenerateConfig,
    Progress,
    draw_all,
    hashed,
    loaded,
    make_fit,
    one_or_more,
    opened,
    recipes_of,
    settled,
    uses_of,
)

from visionlora.atomic import replace_file
from visionlora.config import parse_composition
from visionlora.diffusion.recipe import LoraUse, Recipe, take_tags
from visionlora.errors import ConfigError, nearest
from visionlora.mixing.compose import composition
from visionlora.report.grid import draw_grid

NUMBERS: dict[str, type] = {
    "seed": int, "steps": int, "step": int, "width": int, "height": int, "guidance_scale": float, "strength": float,
    "control_scale": float,
}  # fmt: skip
WORDS = ("prompt", "negative_prompt", "scheduler", "compose")
PLAIN = {*NUMBERS, *WORDS} - {"step", "prompt", "compose"}
"""Axes that are fields of a recipe."""
LORA = re.compile(r"lora:(?P<name>.+)\.(?P<what>[a-z_0-9]+)")
"""An axis of an adapter; of one that is there what follows its name counts, dots and all."""
MOST_CELLS = 10_000


@dataclass(frozen=True)
class Axis:
    """One setting and the values that it takes."""

    name: str
    """`step` (of the training run that is the only adapter, as its checkpoints have it), `prompt`, `negative_prompt`, `seed`,
    `steps`, `guidance_scale`, `scheduler`, `compose`, `strength`, `control_scale`, `width`, `height`; `lora:NAME.scale`,
    `lora:NAME.BLOCK` (a factor of one block), `lora:NAME.file` (other files in its place) or `lora:NAME.step`."""
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """What stands beside a row or column."""
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if self.name == "prompt":
            return text
        if self.name.endswith(".file"):
            path = Path(text)
            text = path.parent.name if path.stem == "adapter" else path.stem
        name = self.name.removeprefix("lora:")
        return (
            f"{name.removesuffix('.scale')} at {text}"
            if name.endswith(".scale")
            else f"{name.removesuffix('.file')} {text}"
        )


def parse_axis(word: str) -> Axis:
    """`seed=1..4`, `lora:dog.scale=0,0.5,1`, `prompt=a dog|a cat, sitting` (with a bar, commas are text).

    Raises:
        ConfigError: when the setting is unknown or a value cannot be one of it.

    >>> parse_axis("seed=1..3").values, parse_axis("lora:dog.scale=0,0.5").values
    ((1, 2, 3), (0.0, 0.5))
    """
    name, equals, text = word.partition("=")
    name = name.strip().replace("-", "_") if not name.startswith("lora:") else name.strip()
    if not equals or not text.strip():
        raise ConfigError(f"An axis is written name=value,value…; this one is {word!r}.")
    lora = LORA.fullmatch(name)
    if name not in (*NUMBERS, *WORDS) and not lora:
        known = [*NUMBERS, *WORDS, "lora:NAME.scale", "lora:NAME.file"]
        raise ConfigError(f"There is no axis {name!r}. {nearest(name, known)}")
    parts = [p.strip() for p in text.split("|" if "|" in text else ",")]
    if "" in parts and name != "negative_prompt":
        raise ConfigError(f"Axis {name!r} has an empty value: {text!r}.")
    kind = NUMBERS.get(name, {"file": str, "step": int}.get(lora["what"], float) if lora else str)
    if kind is str:
        return Axis(name, tuple(parts))
    values: list[Any] = []
    for part in parts:
        try:
            found = numbers_of(part, kind)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"Axis {name!r} has the value {part!r}, which is not {what}.") from None
        if isinstance(found, range) and found.stop - found.start > MOST_CELLS:
            count = f"{found.stop - found.start:,}"
            raise ConfigError(f"Axis {name!r} has {count} values; a grid has at most {MOST_CELLS:,} pictures.")
        values += found
    if not values:
        raise ConfigError(f"Axis {name!r} has no value: {text!r}.")
    return Axis(name, tuple(kind(v) for v in values))


def axis_from(given: Axis | str) -> Axis:
    """An axis, or its words."""
    return parse_axis(given) if isinstance(given, str) else given


def numbers_of(text: str, kind: type) -> Sequence[float]:
    """`7`, or `1..4`.

    Raises:
        ValueError: when it is neither.
    """
    if ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        return range(int(ends[1]), int(ends[2]) + 1)
    number = kind(text)
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(text)
    return [number]


Tags = Mapping[str, Sequence[LoraUse]]
"""By prompt: the adapters that its tags name, at the tags' scales."""


def changed(recipe: Recipe, axis: Axis, value: Any, tags: Tags | None = None) -> Recipe:
    """The recipe with one setting at one value.

    Args:
        recipe: to change.
        axis: the setting.
        value: its value.
        tags: of prompts.

    Raises:
        ConfigError: when the axis is of an adapter that the recipe has not.
    """
    if axis.name == "compose":
        name, options = parse_composition(value)
        return replace(recipe, compose=name, compose_options=options)
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


def sheets_of(base: Recipe, x: Axis, y: Axis | None, others: Sequence[Axis], tags: Tags | None = None) -> list[Sheet]:
    """All sheets, one for each combination of the other axes.

    Args:
        base: the recipe that the axes change.
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
                tuple(tuple(cell_of(base, [*row, (x, v)], tags) for v in x.values) for row in rows),
            )
        )
    return found


def cell_of(base: Recipe, settings: Sequence[tuple[Axis, Any]], tags: Tags | None) -> Recipe:
    """The recipe of one cell. The prompt comes first, as its tags may bring the adapters of other axes."""
    plain = {axis.name: value for axis, value in settings if axis.name in PLAIN}
    base = replace(base, **plain)  # at once: steps and strength may suit each other alone
    for axis, value in sorted(settings, key=lambda pair: pair[0].name != "prompt"):
        if axis.name not in plain:
            base = changed(base, axis, value, tags)
    return base


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

    Raises:
        ConfigError: when an axis or setting cannot be used.
        AdapterFileError, ModelError, DataError, RunFolderError: see `visionlora.pipelines.generate.generate`.
    """
    across, down = axis_from(x), None if y is None else axis_from(y)
    more = [axis_from(a) for a in one_or_more(others)]
    axes = [a for a in (across, down, *more) if a is not None]
    prompts = [str(v) for a in axes if a.name == "prompt" for v in a.values]
    if len(config.prompts) > 1 or (config.prompts and prompts):
        raise ConfigError(
            f"A grid starts from one prompt, and there are {len(config.prompts) + len(prompts)}: give several as an axis, --y "
            "'prompt=a dog|a cat', and leave --prompt out."
        )
    for word in (v for a in axes if a.name == "compose" for v in a.values):
        name, options = parse_composition(word)
        composition(name, **options)
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
    cells = settled(cells, ready, start, say)
    for r in cells:
        for size in {r.width, r.height}:
            base.check_resolution(size)
    # Drawn in an order in which adapters change as seldom as can be.
    order = sorted(range(len(cells)), key=lambda k: (repr(cells[k].loras), cells[k].compose, k))
    done = draw_all([cells[k] for k in order], ready, start, lambda line: None, progress)
    drawn = [d for _, d in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]
    pictures = [Image.open(d.path).convert("RGB") for d in drawn]
    paths, at = [], 0
    for number, sheet in enumerate(sheets):
        rows = [
            pictures[at + k * len(sheet.columns) : at + (k + 1) * len(sheet.columns)] for k in range(len(sheet.rows))
        ]
        at += len(sheet.rows) * len(sheet.columns)
        path = config.output / ("grid.png" if len(sheets) == 1 else f"grid-{number + 1}.png")
        save_sheet(
            draw_grid(rows, sheet.rows, sheet.columns, title=sheet.title, caption=caption_of(recipe, axes)), path
        )
        paths.append(path)
    page = config.output / "index.html"
    replace_file(page, page_of(sheets, drawn, caption_of(recipe, axes)).encode())
    return GridResult(page, tuple(paths), tuple(drawn))


def save_sheet(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    import io

    data = io.BytesIO()
    picture.save(data, format="PNG")
    replace_file(path, data.getvalue())


def caption_of(recipe: Recipe, axes: Sequence[Axis]) -> str:
    """The settings that no axis changes."""
    moving = {a.name for a in axes}
    shown = {
        "prompt": recipe.prompt, "model": recipe.model, "seed": recipe.seed, "steps": recipe.steps,
        "guidance_scale": f"{recipe.guidance_scale:g}", "scheduler": recipe.scheduler,
        "compose": recipe.compose if len(recipe.loras) > 1 else "",
    }  # fmt: skip
    text = [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if name not in moving and value != ""]
    uses = [
        f"{u.name} {u.scale:g}" for u in recipe.loras if not any(m.startswith(f"lora:{u.name}.scale") for m in moving)
    ]
    return ", ".join([*text, *uses])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>visionlora grid</title><style>
body{{font:15px system-ui,sans-serif;color:#1c1e21;margin:24px;background:#fff}}
h2{{font-size:16px;margin:28px 0 8px}} p{{color:#6a6f76;margin:4px 0 12px;max-width:70em}}
.scroll{{overflow:auto;max-height:92vh}} table{{border-collapse:collapse}} td{{padding:2px}}
th{{font-weight:500;font-size:13px;padding:4px 8px;text-align:left;max-width:12em;background:#fff}}
thead th{{position:sticky;top:0}} tbody th{{position:sticky;left:0}}
img{{width:var(--s,128px);display:block;cursor:zoom-in}} img.small{{image-rendering:pixelated}}
dialog{{border:0;padding:16px;max-width:92vw}} dialog img{{width:min(80vh,88vw);cursor:zoom-out}}
dialog pre{{white-space:pre-wrap;font-size:12px;max-width:80vh}} ::backdrop{{background:#000a}}
label{{font-size:13px;color:#6a6f76}}
</style></head><body><p>{caption}</p>
<label>size <input type="range" min="48" max="512" value="128"
 oninput="document.body.style.setProperty('--s',this.value+'px')"></label>
{sheets}
<dialog onclick="this.close()"><img alt=""><pre></pre></dialog><script>
const d=document.querySelector('dialog');
document.querySelectorAll('td img').forEach(i=>{{
 const crisp=()=>{{if(i.naturalWidth<256)i.classList.add('small')}};
 i.complete?crisp():i.addEventListener('load',crisp);
 i.onclick=()=>{{const z=d.querySelector('img');z.src=i.src;z.className=i.className;
  d.querySelector('pre').textContent=i.title;d.showModal()}}}});
</script></body></html>
"""
TABLE = '<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def page_of(sheets: Sequence[Sheet], drawn: Sequence[Drawn], caption: str) -> str:
    """The page, with every picture in it."""
    blocks, pictures = [], iter(drawn)
    for sheet in sheets:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in sheet.columns)
        rows = []
        for label in sheet.rows:
            cells = []
            for _ in sheet.columns:
                one = next(pictures)
                data = base64.b64encode(one.path.read_bytes()).decode()
                about = html.escape(f"{one.recipe.parameters()}\n\n{one.recipe.command()}", quote=True)
                cells.append(
                    f'<td><img src="data:image/png;base64,{data}" title="{about}" alt="{html.escape(one.recipe.prompt)}"></td>'
                )
            rows.append(f"<tr><th>{html.escape(label)}</th>{''.join(cells)}</tr>")
        title = f"<h2>{html.escape(sheet.title)}</h2>" if sheet.title else ""
        blocks.append(title + TABLE.format(head=head, rows="".join(rows)))
    return PAGE.format(caption=html.escape(caption), sheets="\n".join(blocks))
