"""Recipes -> pictures in a folder, each drawn once, in batches that share their adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionlora.atomic import replace_file
from visionlora.config import GenerateConfig
from visionlora.diffusion.given import Given, files_of
from visionlora.diffusion.objective import zero_terminal
from visionlora.diffusion.prompts import in_words, prompt_arguments
from visionlora.diffusion.recipe import Recipe, png_bytes, read_recipe
from visionlora.diffusion.sampling import pictures_of, sampling_scheduler
from visionlora.errors import DataError
from visionlora.lora.adapter import Adapter
from visionlora.mixing.batches import adapters_of, batches_of
from visionlora.mixing.entry import attach
from visionlora.mixing.mix import Mix
from visionlora.mixing.scales import Scale
from visionlora.models.base import BaseModel
from visionlora.models.devices import process_of
from visionlora.models.memory import out_of_memory

Progress = Callable[[int, int], None]
SILENT = 10.0
"""Seconds that the first process waits for others before it says so."""


@dataclass(frozen=True)
class Opened:
    """What a run draws with, on its device and in its precision."""

    base: BaseModel
    adapters: dict[str, Adapter]
    """By path, checked against the base; more may be added."""
    controlnet: Any = None


@dataclass(frozen=True)
class Drawn:
    """One picture of a run."""

    path: Path
    recipe: Recipe
    new: bool
    """Whether it was drawn now; otherwise it was there already."""


def draw_all(
    recipes: Sequence[Recipe],
    ready: Opened,
    config: GenerateConfig,
    say: Callable[[str], None],
    progress: Progress,
    share: slice,
) -> list[Drawn]:
    """Draws what is not there yet, changing adapters only where the next pictures want others.

    Args:
        recipes: of the whole run, whose pictures are told apart by their names.
        ready: what to draw with.
        config: the settings that are not in recipes.
        say: told what is used.
        progress: called with (pictures done, pictures).
        share: of this process.

    Returns:
        The pictures of the share.
    """
    pipe, adapters = pipeline_for(ready, config.init_image is not None), ready.adapters
    paths, recipes = places_of(recipes, config.output)[share], recipes[share]
    place = {recipe.digest: path for path, recipe in zip(paths, recipes, strict=True)}
    missing = {path: recipe for path, recipe in zip(paths, recipes, strict=True) if not path.exists()}
    done = len(recipes) - len(missing)
    progress(done, len(recipes))
    batches = batches_of(list(missing.values()), config.batch_size, lambda prompt: in_words(pipe, prompt), adapters)
    mix, current = None, None
    given, held = Given(), ("", "", "")
    told: set[str] = set()
    while batches:
        batch = batches.pop(0)
        uses = adapters_of(batch)
        wanted = (uses, batch[0].compose, batch[0].compose_options)
        if wanted != current:
            if mix is not None:
                mix.detach()
            mix, current = mixed(pipe, uses, batch[0], adapters, config.allow_partial), wanted
            for name, pairs in mix.handles.items() if mix is not None else ():
                line = f"Adapter {name}: " + "; ".join(str(handle.report) for _, handle in pairs) + "."
                if line not in told:  # once, however often it comes and goes
                    told.add(line)
                    say(line)
        if held != (own := files_of(batch[0])):  # one at a time, as they may be large
            given, held = Given.of(*own), own
        try:
            pictures = draw_batch(pipe, batch, given)
        except RuntimeError as e:
            if len(batch) == 1 or not out_of_memory(e):
                raise
            half = len(batch) // 2
            batches = [batch[:half], batch[half:], *batches]
            say(f"A batch of {len(batch)} pictures does not fit into memory: drawing {half} at a time.")
            continue
        config.output.mkdir(parents=True, exist_ok=True)  # not before: what is refused leaves nothing behind
        for recipe, picture in zip(batch, pictures, strict=True):
            replace_file(place[recipe.digest], png_bytes(picture, replace(recipe, batch_size=len(batch))))
        done += len(batch)
        progress(done, len(recipes))
    if mix is not None:
        mix.detach()
    return [
        Drawn(path, recipe, missing.pop(path, None) is not None) for path, recipe in zip(paths, recipes, strict=True)
    ]


@contextmanager
def telling_how_far(recipes: Sequence[Recipe], folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """After Ctrl-C says how many pictures of the whole run are there, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        there = sum(path.exists() for path in places_of(recipes, folder))
        say(f"Interrupted with {there} of {len(recipes)} pictures drawn. The same command goes on with the others.")
        raise


def with_others(
    own: list[Drawn], recipes: Sequence[Recipe], folder: Path, share: slice, started: float, say: Callable[[str], None],
    progress: Progress,
) -> list[Drawn]:  # fmt: skip
    """Every picture, in the first process of a launch, which waits until the others' are there; its own in another.

    Args:
        own: pictures of this process.
        recipes: of the whole run.
        folder: of the pictures.
        share: of this process.
        started: when the run began, seconds since 1970: what others have drawn since then is new.
        say: told for what is waited.
        progress: called with (pictures done, pictures).
    """
    rank, processes = process_of()
    if rank or processes == 1:
        return own
    paths = places_of(recipes, folder)
    waits_from = time.monotonic()
    while missing := sum(not path.exists() for path in paths):
        progress(len(paths) - missing, len(paths))
        if waits_from and time.monotonic() - waits_from > SILENT:
            say(f"Waiting for {missing} pictures of the other processes: WORLD_SIZE says that there are {processes}.")
            waits_from = 0.0
        time.sleep(0.1)
    found = [Drawn(path, recipe, path.stat().st_mtime >= started) for path, recipe in zip(paths, recipes, strict=True)]
    found[share] = own
    return found


def places_of(recipes: Iterable[Recipe], folder: Path) -> list[Path]:
    """Where the pictures lie or will lie; a key that is another's too, in this run or in the folder, is made longer."""
    found: dict[Path, str] = {}
    paths = []
    for recipe in recipes:
        digest = recipe.digest
        choices = (folder / recipe.named(digits) for digits in (8, 16, len(digest)))
        path = next(p for p in choices if (found.get(p) or digest_at(p)) in (None, digest) or p.stem.endswith(digest))
        found[path] = digest
        paths.append(path)
    return paths


def digest_at(path: Path) -> str | None:
    """Of the recipe of a picture; None where there is none."""
    recipe = recipe_at(path)
    return None if recipe is None else recipe.digest


def recipe_at(path: Path) -> Recipe | None:
    """Of a picture; None where there is no picture, or it has lost its recipe."""
    try:
        return read_recipe(path) if path.exists() else None
    except DataError:
        return None


def pipeline_for(ready: Opened, from_picture: bool) -> Any:
    """The base's pipeline, or one of the same parts that starts from a picture or follows one."""
    base, controlnet = ready.base, ready.controlnet
    if not from_picture and controlnet is None:
        return base.pipe
    import diffusers

    more = {} if base.is_xl else {"requires_safety_checker": False}
    if controlnet is not None:
        more["controlnet"] = controlnet
    task = "Img2Img" if from_picture else ""
    with_net = "" if controlnet is None else "ControlNet"
    kind = f"StableDiffusion{'XL' if base.is_xl else ''}{with_net}{task}Pipeline"
    pipe = getattr(diffusers, kind)(**base.pipe.components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixed(
    pipe: Any, uses: dict[str, tuple[str, Scale]], recipe: Recipe, adapters: dict[str, Adapter], allow_partial: bool
) -> Mix | None:
    """The adapters of a batch on the pipeline, composed as its recipes say."""
    if not uses:
        return None
    found: Mix = attach(
        pipe,
        {name: adapters[path] for name, (path, _) in uses.items()},
        allow_partial=allow_partial,
        scales={name: scale for name, (_, scale) in uses.items()},
        compose=recipe.compose,
        **recipe.compose_options,
    )
    return found


def draw_batch(pipe: Any, batch: Sequence[Recipe], given: Given) -> list[Image.Image]:
    """The pictures of a batch; the same batch gives the same pixels on the same machine."""
    first, original = batch[0], pipe.scheduler
    pipe.scheduler = scheduler_of(pipe, first)
    try:
        with torch.no_grad():
            latents = pipe(
                **prompt_arguments(pipe, [recipe.prompt for recipe in batch], first.negative_prompt, first.clip_skip),
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                generator=[torch.Generator().manual_seed(recipe.seed) for recipe in batch],
                output_type="latent",
                **given.arguments(batch),
                **given.held(pipe, batch),
            ).images
    finally:
        pipe.scheduler = original
    return [given.finished(picture) for picture in pictures_of(pipe, latents)]


def scheduler_of(pipe: Any, recipe: Recipe) -> Any:
    """The way to draw of a recipe, at the noise levels that its adapters were trained at.

    Raises:
        ConfigError: when it cannot start from nothing but noise.
    """
    own = zero_terminal(pipe.scheduler) if recipe.zero_terminal_snr else pipe.scheduler
    return sampling_scheduler(own, recipe.scheduler)
