"""Prompts and adapter files -> pictures that carry their recipes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionlora.atomic import replace_file
from visionlora.diffusion.prompts import prompt_arguments
from visionlora.diffusion.recipe import SCHEDULERS, LoraUse, Recipe, png_bytes, take_tags
from visionlora.diffusion.sampling import pictures_of
from visionlora.errors import AdapterFileError, ConfigError, DataError, nearest
from visionlora.formats.container import file_hashes
from visionlora.formats.inspection import weights_file
from visionlora.loaders import add_tokens, check_base, load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.mixing.mix import Mix, attach
from visionlora.mixing.scales import scale_from
from visionlora.models.base import BaseModel, open_base

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw: every prompt with every seed."""

    prompts: Sequence[str]
    loras: Sequence[tuple[str, float, dict[str, float]]] = ()
    """(path, scale, factors by block)."""
    lora_folder: Path = Path()
    """Where `<lora:name>` tags look for files that are not among `loras`."""
    model: str = "auto"
    negative_prompt: str = ""
    num_images: int = 1
    """Pictures of each prompt, with seeds one after the other."""
    seed: int = 0
    steps: int = 25
    guidance_scale: float | None = None
    scheduler: str = "dpm++"
    width: int | None = None
    height: int | None = None
    compose: str = "sum"
    compose_options: tuple[tuple[str, Any], ...] = ()
    init_image: Path | None = None
    strength: float = 0.6
    output: Path = Path("pictures")
    force: bool = False
    allow_partial: bool = False


@dataclass(frozen=True)
class Drawn:
    """One picture of a run."""

    path: Path
    recipe: Recipe
    new: bool
    """Whether it was drawn now; otherwise it was there already."""


def generate(
    config: GenerateConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> list[Drawn]:
    """Draws pictures one by one, each a file that says how it came to be.

    A picture whose file is there already is not drawn again, so an interrupted run goes on where it stopped. Under
    `accelerate launch` the processes share the pictures.

    Raises:
        ConfigError: when a setting is out of range or a prompt names an unknown adapter.
        AdapterFileError: when an adapter cannot be read or was made for another base.
        ModelError: when the base cannot be opened or the size does not fit it.
        DataError: when the picture to start from cannot be read.
    """
    if config.num_images < 1:
        raise ConfigError(f"num_images is {config.num_images}; it must be at least 1.")
    base, adapters = adapters_and_base(config, say)
    plans = [(prompt, uses_of(prompt, config)) for prompt in config.prompts]
    recipes = recipes_of(config, base, plans)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return draw_all(recipes[rank::processes], base, adapters, config, say, progress)


def adapters_and_base(config: GenerateConfig, say: Callable[[str], None]) -> tuple[BaseModel, dict[str, Adapter]]:
    """The base model, and every adapter that the prompts name, by path, checked against it.

    Raises:
        ConfigError, AdapterFileError, ModelError: see `generate`.
    """
    if not config.prompts:
        raise ConfigError("There is no prompt: --prompt TEXT, or --prompts FILE with one per line.")
    paths = dict.fromkeys(use.path for prompt in config.prompts for use in uses_of(prompt, config))
    adapters = {path: load_adapter(path, config.allow_partial) for path in paths}
    model = config.model
    if model == "auto" and adapters:
        model = str(next(iter(adapters.values())).info.get("base", {}).get("id", "auto"))
    base = open_base(model)
    say(base.why)
    for adapter in adapters.values():
        make_fit(adapter, base, config)
    return base, adapters


def make_fit(adapter: Adapter, base: BaseModel, config: GenerateConfig) -> None:
    """Checks an adapter against the base and gives the base its tokens."""
    check_base(adapter, base, config.force, config.allow_partial)
    add_tokens(base, adapter)


def uses_of(prompt: str, config: GenerateConfig) -> list[LoraUse]:
    """The adapters of one prompt: those of the command, and those that its tags name, whose scale counts.

    Raises:
        ConfigError: when a tag names no adapter.
    """
    uses = {}
    for path, scale, blocks in config.loras:
        name = name_of(path)
        if name in uses:
            name = f"{Path(path).parent.name}/{name}"
        uses[name] = LoraUse(name, path, scale, blocks)
    for name, scale in take_tags(prompt)[1]:
        if name in uses:
            uses[name] = replace(uses[name], scale=scale)
            continue
        found = next(
            (p for p in (config.lora_folder / f"{name}.safetensors", config.lora_folder / name) if p.exists()), None
        )
        if found is None:
            there = [*uses, *(p.stem for p in config.lora_folder.glob("*.safetensors"))]
            hint = nearest(name, there) if there else "Give it with --lora, or name its folder with --lora-folder."
            raise ConfigError(f"The prompt names an adapter {name!r}, which is not there. {hint}")
        uses[name] = LoraUse(name, str(found), scale)
    return [replace(use, hash=hash_of(use.path)) for use in uses.values()]


def name_of(path: str) -> str:
    """How prompts and recipes call a file: of a run folder the folder's name."""
    given = Path(path)
    return given.parent.name if given.stem == "adapter" and given.parent.name else given.stem


def hash_of(path: str) -> str:
    """AutoV3 of an adapter; a file is read again only when it has changed.

    Raises:
        AdapterFileError: when there is none.
    """
    file = weights_file(Path(path).expanduser())
    if not file.is_file():
        raise AdapterFileError(f"There is no adapter file at {path}.")
    state = file.stat()
    return hash_in_state(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def hash_in_state(file: Path, size: int, changed: int) -> str:
    """The hash of a file that has this size and this time of change."""
    hashes = file_hashes(file)
    return hashes.get("AutoV3", hashes["sha256"])


def recipes_of(config: GenerateConfig, base: BaseModel, plans: Sequence[tuple[str, list[LoraUse]]]) -> list[Recipe]:
    """Every picture of the run, in order."""
    width, height = config.width or config.height or base.resolution, config.height or config.width or base.resolution
    for size in {width, height}:
        base.check_resolution(size)
    guidance = base.suggested["guidance_scale"] if config.guidance_scale is None else config.guidance_scale
    init_hash = ""
    if config.init_image is not None:
        try:
            init_hash = hashlib.sha256(config.init_image.read_bytes()).hexdigest()
        except OSError as e:
            raise DataError(
                f"The picture to start from cannot be read: {config.init_image}: {e.strerror or e}."
            ) from None
    return [
        Recipe(
            prompt, base.id, width, height, config.negative_prompt, tuple(uses), config.compose, dict(config.compose_options),
            config.seed + k, config.steps, guidance, config.scheduler,
            "" if config.init_image is None else str(config.init_image), init_hash, config.strength,
        )
        for prompt, uses in plans
        for k in range(config.num_images)
    ]  # fmt: skip


def draw_all(
    recipes: Sequence[Recipe], base: BaseModel, adapters: dict[str, Adapter], config: GenerateConfig,
    say: Callable[[str], None], progress: Progress,
) -> list[Drawn]:  # fmt: skip
    """Draws what is not there yet, changing adapters only where the next picture wants others."""
    config.output.mkdir(parents=True, exist_ok=True)
    drawn: list[Drawn] = []
    pipe, mix, current = pipeline_for(base, bool(config.init_image)), None, None
    start = None if config.init_image is None else opened(config.init_image)
    for done, recipe in enumerate(recipes, 1):
        path = config.output / recipe.file_name
        if path.exists():
            drawn.append(Drawn(path, recipe, False))
            progress(done, len(recipes))
            continue
        wanted = (recipe.loras, recipe.compose, tuple(sorted(recipe.compose_options.items())))
        if wanted != current:
            if mix is not None:
                mix.detach()
            mix, current = mixed(pipe, recipe, adapters, config.allow_partial), wanted
            for name, pairs in mix.handles.items() if mix is not None else ():
                say(f"Adapter {name}: " + "; ".join(str(handle.report) for _, handle in pairs) + ".")
        replace_file(path, png_bytes(draw_one(pipe, recipe, start), recipe))
        drawn.append(Drawn(path, recipe, True))
        progress(done, len(recipes))
    if mix is not None:
        mix.detach()
    return drawn


def pipeline_for(base: BaseModel, from_picture: bool) -> Any:
    """The base's pipeline, or one of the same parts that starts from a picture."""
    if not from_picture:
        return base.pipe
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    plain = {} if base.is_xl else {"requires_safety_checker": False}
    kind = StableDiffusionXLImg2ImgPipeline if base.is_xl else StableDiffusionImg2ImgPipeline
    pipe = kind(**base.pipe.components, **plain)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixed(pipe: Any, recipe: Recipe, adapters: dict[str, Adapter], allow_partial: bool) -> Mix | None:
    """The adapters of a recipe on the pipeline."""
    if not recipe.loras:
        return None
    found: Mix = attach(
        pipe,
        {use.name: adapters[use.path] for use in recipe.loras},
        allow_partial=allow_partial,
        scales={use.name: scale_from(use.scale, use.blocks) for use in recipe.loras},
        compose=recipe.compose,
        **recipe.compose_options,
    )
    return found


def draw_one(pipe: Any, recipe: Recipe, start: Image.Image | None) -> Image.Image:
    """One picture; the same recipe gives the same pixels on the same machine."""
    import diffusers

    original = pipe.scheduler
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2} if recipe.scheduler == "dpm++" else {}
    pipe.scheduler = getattr(diffusers, SCHEDULERS[recipe.scheduler][0]).from_config(original.config, **options)
    size: dict[str, Any] = {"width": recipe.width, "height": recipe.height}
    if start is not None:
        size = {
            "image": start.resize((recipe.width, recipe.height), Image.Resampling.LANCZOS),
            "strength": recipe.strength,
        }
    try:
        with torch.no_grad():
            latents = pipe(
                **prompt_arguments(pipe, take_tags(recipe.prompt)[0], recipe.negative_prompt),
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                generator=torch.Generator().manual_seed(recipe.seed),
                output_type="latent",
                **size,
            ).images
    finally:
        pipe.scheduler = original
    (picture,) = pictures_of(pipe, latents)
    return picture


def opened(path: Path) -> Image.Image:
    """The picture to start from, in RGB.

    Raises:
        DataError: when it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:
        raise DataError(f"The picture to start from cannot be read: {path}: {e}.") from None
