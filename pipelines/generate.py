"""Prompts and adapter files -> pictures that carry their recipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from visionlora.pipelines.drawing import Drawn, Opened, Progress, draw_all, scheduler_of, telling_how_far, with_others

from visionlora.config import PRECISIONS, GenerateConfig, check_kind
from visionlora.diffusion.given import PICTURES, check_given, check_regions, named, shape_of, sized
from visionlora.diffusion.prompts import read_as_words
from visionlora.diffusion.recipe import LoraUse, Recipe, take_tags
from visionlora.diffusion.settings import BASE_DTYPES
from visionlora.diffusion.uses import check_once, names_of, uses_of
from visionlora.errors import ConfigError, nearest
from visionlora.loaders import check_base, check_draws, ends_in_noise, load_adapter, open_for, words_elsewhere
from visionlora.lora.adapter import Adapter
from visionlora.mixing.compose import composition
from visionlora.models.base import EMBEDDED, BaseModel, open_controlnet, quiet
from visionlora.models.devices import process_of, usable_device
from visionlora.models.fingerprint import weights_fingerprint
from visionlora.report.runfolder import check_place
from visionlora.training.loop import resolve_precision


def generate(
    config: GenerateConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> list[Drawn]:
    """Draws pictures, each a file that says how it came to be.

    A picture whose file is there already is not drawn again, so an interrupted run goes on where it stopped. Under
    `accelerate launch` the processes share the pictures, and the first alone returns all of them.

    Raises:
        ConfigError: when a setting is out of range or a prompt names an unknown adapter.
        AdapterFileError: when an adapter cannot be read or was made for another base.
        ModelError: when the base cannot be opened or the size does not fit it.
        DataError: when the picture to start from, its mask or the one to follow cannot be read.
        RunFolderError: when the output cannot be a folder.
    """
    check_kind(config, GenerateConfig, "generate", "['a dog']")
    started = time.time()
    if config.num_images < 1:
        raise ConfigError(f"num_images is {config.num_images}; it must be at least 1.")
    ready = opened(config, say)
    plans = [(prompt, uses_of(prompt, config)) for prompt in config.prompts]
    recipes = settled(recipes_of(config, ready, plans), ready, config, say)
    rank, processes = process_of()
    share = slice(rank, None, processes)
    with telling_how_far(recipes, config.output, say):
        own = draw_all(recipes, ready, config, say, progress, share)
        drawn: list[Drawn] = with_others(own, recipes, config.output, share, started, say, progress)
    return drawn


def opened(config: GenerateConfig, say: Callable[[str], None]) -> Opened:
    """The base model, the ControlNet, and every adapter that the prompts name, checked against each other.

    Raises:
        ConfigError, AdapterFileError, ModelError, RunFolderError: see `generate`.
    """
    if not config.prompts:
        raise ConfigError("There is no prompt: --prompt TEXT, or --prompts FILE with one per line.")
    if config.batch_size < 1:
        raise ConfigError(f"batch_size is {config.batch_size}; it must be at least 1.")
    check_pictures(config)
    check_numbers(config)
    check_once(config.loras)
    composition(config.compose, **dict(config.compose_options))  # raises also where there is nothing to compose
    check_place(config.output)
    device, precision = place_of(config)
    paths = dict.fromkeys(use.path for prompt in config.prompts for use in uses_of(prompt, config))
    adapters = {path: loaded(path, config) for path in paths}
    base = open_for(adapters.values(), config.model)
    say(base.why)
    base.weights_hash  # noqa: B018  before the cast, after which it would be another
    with quiet("diffusers", "transformers"):
        base.pipe.to(device=device, dtype=BASE_DTYPES[precision])
    for adapter in adapters.values():
        make_fit(adapter, base, config)
    for line in words_left_behind(adapters, config.prompts, base):
        say(line)
    if strange := read_as_words([*config.prompts, config.negative_prompt]):
        say(
            f"Read as words, where other programs have commands: {', '.join(strange)}. Known here are (word:1.2) and \\(."
        )
    return Opened(base, adapters, None if config.controlnet is None else open_controlnet(config.controlnet, base))


def words_left_behind(adapters: Mapping[str, Adapter], prompts: Sequence[str], base: BaseModel) -> Iterator[str]:
    """A line for each adapter whose learned word is in a prompt and in no file: some formats keep it in one of its own."""
    for path, word in words_elsewhere(adapters, base.pipe):
        if any(word in prompt for prompt in prompts):
            yield (
                f"{path} was trained with the word {word}, whose vectors are not in it: give the file that has them too "
                "(--lora FILE), which whoever converted it got beside it. The word means nothing without."
            )


def clip_skip_of(config: GenerateConfig, adapters: Mapping[str, Adapter]) -> int:
    """How many layers from the end the text is read.

    Raises:
        ConfigError: when adapters were trained otherwise than each other, and it was not said how to draw.
    """
    if config.clip_skip is not None:
        return config.clip_skip
    found = {path: a.clip_skip for path, a in adapters.items() if says_clip_skip(a)}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{value} ({path})" for path, value in found.items())
        raise ConfigError(f"These adapters were trained with clip_skip {said}: choose with --clip-skip.")
    return next(iter(found.values()), 1)


def says_clip_skip(adapter: Adapter) -> bool:
    """Whether an adapter says how far its text was read: ours do, but one that was merged of different ones does not."""
    training = adapter.info.get("training") or {}
    return bool(training) and ("clip_skip" in training or "merged" not in adapter.info)


def place_of(config: GenerateConfig) -> tuple[torch.device, str]:
    """The device that pictures are drawn on, and the precision.

    Raises:
        ConfigError: when there is no such device or precision, or they do not go together.
    """
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision is {config.precision!r}. {nearest(config.precision, PRECISIONS)}")
    device = usable_device(config.device)
    if device.type == "cpu" and config.precision == "fp16":
        raise ConfigError("precision is 'fp16', which a CPU has no fast kernels for: --precision bf16 or fp32.")
    if config.precision != "auto":
        return device, config.precision
    return device, {"no": "fp32"}.get(found := resolve_precision("auto", device), found)


def loaded(path: str, config: GenerateConfig) -> Adapter:
    """An adapter that can draw.

    Raises:
        AdapterFileError: when it cannot be read, or is a classifier's.
    """
    adapter = load_adapter(path, config.allow_partial)
    check_draws(adapter, path)
    return adapter


def make_fit(adapter: Adapter, base: BaseModel, config: GenerateConfig) -> None:
    """Checks an adapter against the base."""
    check_base(adapter, base, config.force, config.allow_partial)


def lacking(config: GenerateConfig) -> dict[str, str]:
    """Settings that mean nothing, and the option whose picture or model they lack."""
    needed = {"strength": ("--init-image", config.init_image), "control_scale": ("--controlnet", config.controlnet)}
    return {name: option for name, (option, there) in needed.items() if there is None}


def check_pictures(config: GenerateConfig) -> None:
    """Raises ConfigError when one of the pictures lacks what it goes with, DataError when one cannot be read."""
    if config.mask is not None and config.init_image is None:
        raise ConfigError("A mask says what of a picture is drawn anew: give the picture with --init-image.")
    if config.control is not None and config.controlnet is None:
        raise ConfigError("A picture to follow needs a ControlNet: --controlnet FOLDER or a Hub id.")
    if config.controlnet is not None and config.control is None:
        raise ConfigError("A ControlNet needs a picture to follow: --control FILE.")
    for name, option in lacking(config).items():
        if (value := getattr(config, name)) != getattr(GenerateConfig, name):
            raise ConfigError(
                f"{name} is {value:g}, which means nothing without {option}: give it, or leave {name} out."
            )
    for field, what in PICTURES.items():
        named(getattr(config, field), what)


def check_numbers(config: GenerateConfig) -> None:
    """Raises ConfigError, before a model is opened, when no recipe could have these settings."""
    width, height = (1 if side is None else side for side in (config.width, config.height))
    guidance = 1.0 if config.guidance_scale is None else config.guidance_scale
    Recipe(
        "", "", width, height, seed=config.seed, steps=config.steps, guidance_scale=guidance, scheduler=config.scheduler,
        init_image=str(config.init_image or ""), strength=config.strength, control_scale=config.control_scale,
    )  # fmt: skip


def recipes_of(config: GenerateConfig, ready: Opened, plans: Sequence[tuple[str, list[LoraUse]]]) -> list[Recipe]:
    """Every picture of the run, in order."""
    base, net = ready.base, ready.controlnet
    shape = shape_of(config.init_image, config.control)
    width, height = sized(shape, config.width, config.height, base.resolution, base.multiple)
    for size in {width, height}:
        base.check_resolution(size)
    guidance = base.suggested["guidance_scale"] if config.guidance_scale is None else config.guidance_scale
    (start, start_hash), (mask, mask_hash), (control, control_hash) = (
        named(getattr(config, field), what) for field, what in PICTURES.items()
    )
    regions = dict(dict(config.compose_options).get("regions", {}))
    masks = {n: named(Path(r), f"region of {n!r}")[1] for n, r in regions.items() if isinstance(r, (str, Path))}
    _, precision = place_of(config)
    return [
        Recipe(
            take_tags(prompt)[0], base.id, width, height, config.negative_prompt, tuple(uses), config.compose,
            dict(config.compose_options),
            config.seed + k, config.steps, guidance, config.scheduler, start, start_hash, config.strength, mask, mask_hash,
            config.controlnet or "", control, control_hash, config.control_scale, masks, precision,
            "" if base.id == EMBEDDED else base.weights_hash, "" if net is None else weights_fingerprint(net),
            force=config.force, allow_partial=config.allow_partial,
        )
        for prompt, uses in plans
        for k in range(config.num_images)
    ]  # fmt: skip


def settled(
    recipes: Iterable[Recipe],
    ready: Opened,
    config: GenerateConfig,
    say: Callable[[str], None],
    own_clip_skip: bool = False,
) -> list[Recipe]:
    """Recipes with what follows from their own adapters, so that each is the same in every run: the names of these, how far
    the text is read, and where the noise levels end.

    Args:
        recipes: to settle.
        ready: what is opened.
        config: of the run.
        say: told what is unusual.
        own_clip_skip: whether recipes say themselves how far the text is read.

    Raises:
        ConfigError: when adapters of one picture were trained otherwise than each other, or its scheduler cannot draw so.
        ModelError: when the text cannot be read so.
        DataError: when a picture cannot be read, a mask has another size than its picture, or that of a region another shape.
    """
    found = [
        settled_one(recipe, ready, replace(config, clip_skip=recipe.clip_skip) if own_clip_skip else config)
        for recipe in recipes
    ]
    check_given(found)
    check_regions(found)
    if any(recipe.zero_terminal_snr for recipe in found):
        say("The noise levels end at nothing but noise, as an adapter was trained (zero_terminal_snr).")
    return found


def settled_one(recipe: Recipe, ready: Opened, config: GenerateConfig) -> Recipe:
    """See `settled`."""
    base, own = ready.base, {use.path: ready.adapters[use.path] for use in recipe.loras}
    # kohya writes clip_skip for SDXL too, where it is nothing.
    clip_skip = base.reading(clip_skip_of(config, {} if base.is_xl else own)).clip_skip
    now = names_of(use.path for use in recipe.loras)
    names = {use.name: name for use, name in zip(recipe.loras, now, strict=True)}
    options = dict(recipe.compose_options)
    if regions := options.get("regions"):
        options["regions"] = {names.get(name, name): region for name, region in regions.items()}
    found = replace(
        recipe,
        loras=tuple(replace(use, name=names[use.name]) for use in recipe.loras),
        compose_options=options,
        region_hashes={names.get(name, name): value for name, value in recipe.region_hashes.items()},
        clip_skip=clip_skip,
        zero_terminal_snr=ends_in_noise(base, own.values()),
    )
    if found.zero_terminal_snr:
        scheduler_of(base.pipe, found)  # raises before anything is drawn
    return found
