"""Prompts and adapter files -> pictures that carry their recipes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionlora.atomic import replace_file
from visionlora.config import PRECISIONS, parse_lora_use
from visionlora.diffusion.given import PICTURES, Given, check_regions, named, shape_of, sized
from visionlora.diffusion.objective import zero_terminal
from visionlora.diffusion.prompts import in_words, prompt_arguments
from visionlora.diffusion.recipe import LoraUse, Recipe, png_bytes, read_recipe, take_tags
from visionlora.diffusion.sampling import pictures_of, sampling_scheduler
from visionlora.diffusion.settings import BASE_DTYPES
from visionlora.errors import AdapterFileError, ConfigError, DataError, nearest
from visionlora.formats.container import SUFFIXES, file_hashes
from visionlora.formats.inspection import settings_beside, weights_file
from visionlora.loaders import check_base, check_draws, ends_in_noise, load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.mixing.batches import adapters_of, batches_of
from visionlora.mixing.compose import composition
from visionlora.mixing.mix import Mix, attach
from visionlora.mixing.scales import Scale
from visionlora.models.base import EMBEDDED, BaseModel, open_base, open_controlnet, quiet
from visionlora.models.devices import usable_device
from visionlora.models.fingerprint import weights_fingerprint
from visionlora.report.runfolder import check_place
from visionlora.training.loop import resolve_precision

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerateConfig:
    """What to draw: every prompt with every seed. One prompt, one adapter and paths may be given as plain texts."""

    prompts: Sequence[str]
    loras: Sequence[tuple[str, float, dict[str, float]]] = ()
    """(path, scale, factors by block); also a path, (path, scale), or as `--lora` has it: path:scale@block=factor."""
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
    """To draw on; auto takes a GPU where there is one."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: half precision on a GPU, fp32 on a CPU."""
    output: Path = Path("pictures")
    force: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        for name in ("output", "lora_folder", "init_image", "mask", "control"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given).expanduser())
        object.__setattr__(self, "prompts", one_or_more(self.prompts))
        object.__setattr__(self, "loras", tuple(use_from(given) for given in one_or_more(self.loras)))


def one_or_more(given: Any) -> Sequence[Any]:
    """A text or path alone as a list of one."""
    found: Sequence[Any] = (given,) if isinstance(given, (str, Path)) else given
    return found


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
    """Draws pictures, each a file that says how it came to be.

    A picture whose file is there already is not drawn again, so an interrupted run goes on where it stopped. Under
    `accelerate launch` the processes share the pictures.

    Raises:
        ConfigError: when a setting is out of range or a prompt names an unknown adapter.
        AdapterFileError: when an adapter cannot be read or was made for another base.
        ModelError: when the base cannot be opened or the size does not fit it.
        DataError: when the picture to start from, its mask or the one to follow cannot be read.
        RunFolderError: when the output cannot be a folder.
    """
    if config.num_images < 1:
        raise ConfigError(f"num_images is {config.num_images}; it must be at least 1.")
    ready = opened(config, say)
    plans = [(prompt, uses_of(prompt, config)) for prompt in config.prompts]
    recipes = settled(recipes_of(config, ready, plans), ready, config, say)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return draw_all(recipes[rank::processes], ready, config, say, progress)


@dataclass(frozen=True)
class Opened:
    """What a run draws with, on its device and in its precision."""

    base: BaseModel
    adapters: dict[str, Adapter]
    """By path, checked against the base; more may be added."""
    controlnet: Any = None


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
    composition(config.compose, **dict(config.compose_options))  # raises also where there is nothing to compose
    check_place(config.output)
    device, precision = place_of(config)
    paths = dict.fromkeys(use.path for prompt in config.prompts for use in uses_of(prompt, config))
    adapters = {path: loaded(path, config) for path in paths}
    model = config.model
    if model == "auto" and adapters:
        model = str(next(iter(adapters.values())).info.get("base", {}).get("id", "auto"))
    base = open_base(model)
    say(base.why if model == config.model else f"Base model: {base.id}, which the adapter names. Choose with --model.")
    base.weights_hash  # noqa: B018  before the cast, after which it would be another
    with quiet("diffusers", "transformers"):
        base.pipe.to(device=device, dtype=BASE_DTYPES[precision])
    for adapter in adapters.values():
        make_fit(adapter, base, config)
    return Opened(base, adapters, None if config.controlnet is None else open_controlnet(config.controlnet, base))


def clip_skip_of(config: GenerateConfig, adapters: Mapping[str, Adapter]) -> int:
    """How many layers from the end the text is read.

    Raises:
        ConfigError: when adapters were trained otherwise than each other, and it was not said how to draw.
    """
    if config.clip_skip is not None:
        return config.clip_skip
    found = {path: a.clip_skip for path, a in adapters.items() if a.info.get("training")}  # others say nothing
    if len(set(found.values())) > 1:
        said = ", ".join(f"{value} ({path})" for path, value in found.items())
        raise ConfigError(f"These adapters were trained with clip_skip {said}: choose with --clip-skip.")
    return next(iter(found.values()), 1)


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


def uses_of(prompt: str, config: GenerateConfig) -> list[LoraUse]:
    """The adapters of one prompt: those of the command, and those that its tags name, whose scale counts.

    Raises:
        ConfigError: when a tag names no adapter.
    """
    named_so = zip(names_of(path for path, _, _ in config.loras), config.loras, strict=True)
    uses = {name: LoraUse(name, *lora) for name, lora in named_so}
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
    return [hashed(use) for use in uses.values()]


def name_of(path: str) -> str:
    """How prompts and recipes call a file: of a run folder the folder's name."""
    given = Path(path)
    stem = given.stem if given.suffix in SUFFIXES else given.name
    return given.parent.name if stem == "adapter" and given.parent.name else stem


def names_of(paths: Iterable[str]) -> list[str]:
    """How prompts and recipes call files, each by another name."""
    found: list[str] = []
    for path in paths:
        stem = name = name_of(path)
        if name in found:
            stem = name = f"{Path(path).parent.name}/{stem}"
        number = 1
        while name in found:
            name, number = f"{stem}-{number + 1}", number + 1
        found.append(name)
    return found


def hashed(use: LoraUse) -> LoraUse:
    """With the hashes of its file, which is read again only when it has changed.

    Raises:
        AdapterFileError: when there is none.
    """
    file = weights_file(Path(use.path).expanduser())
    if not file.is_file():
        raise AdapterFileError(f"There is no adapter file at {use.path}.")
    states = ((f, f.stat()) for f in (file, *settings_beside(file)))
    tensors, whole = hashes_in_state(tuple((f, state.st_size, state.st_mtime_ns) for f, state in states))
    return replace(use, hash=tensors, file_hash=whole)


@lru_cache(maxsize=1024)
def hashes_in_state(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, str]:
    """AutoV3 of a file, and the hash of it and all that belongs to it; they have these sizes and times of change."""
    first, *others = (file_hashes(file) for file, _, _ in files)
    parts = [found["sha256"] for found in (first, *others)]
    whole = hashlib.sha256("".join(parts).encode()).hexdigest() if others else parts[0]
    return first.get("AutoV3", first["sha256"]), whole


def check_pictures(config: GenerateConfig) -> None:
    """Raises ConfigError when one of the pictures lacks what it goes with, DataError when one cannot be read."""
    if config.mask is not None and config.init_image is None:
        raise ConfigError("A mask says what of a picture is drawn anew: give the picture with --init-image.")
    if config.control is not None and config.controlnet is None:
        raise ConfigError("A picture to follow needs a ControlNet: --controlnet FOLDER or a Hub id.")
    if config.controlnet is not None and config.control is None:
        raise ConfigError("A ControlNet needs a picture to follow: --control FILE.")
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
    recipes: Iterable[Recipe], ready: Opened, config: GenerateConfig, say: Callable[[str], None]
) -> list[Recipe]:
    """Recipes with what follows from their own adapters, so that each is the same in every run: the names of these, how far
    the text is read, and where the noise levels end.

    Raises:
        ConfigError: when adapters of one picture were trained otherwise than each other, or its scheduler cannot draw so.
        ModelError: when the text cannot be read so.
        DataError: when the mask of a region has another shape than its picture.
    """
    found = [settled_one(recipe, ready, config) for recipe in recipes]
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


def scheduler_of(pipe: Any, recipe: Recipe) -> Any:
    """The way to draw of a recipe, at the noise levels that its adapters were trained at.

    Raises:
        ConfigError: when it cannot start from nothing but noise.
    """
    own = zero_terminal(pipe.scheduler) if recipe.zero_terminal_snr else pipe.scheduler
    return sampling_scheduler(own, recipe.scheduler)


def draw_all(
    recipes: Sequence[Recipe], ready: Opened, config: GenerateConfig, say: Callable[[str], None], progress: Progress
) -> list[Drawn]:
    """Draws what is not there yet, changing adapters only where the next pictures want others."""
    config.output.mkdir(parents=True, exist_ok=True)
    given = Given.of(config.init_image, config.mask, config.control)
    pipe, adapters = pipeline_for(ready, given), ready.adapters
    paths = places_of(recipes, config.output)
    place = {recipe.digest: path for path, recipe in zip(paths, recipes, strict=True)}
    missing = {path: recipe for path, recipe in zip(paths, recipes, strict=True) if not path.exists()}
    done = len(recipes) - len(missing)
    progress(done, len(recipes))
    batches = batches_of(list(missing.values()), config.batch_size, lambda prompt: in_words(pipe, prompt), adapters)
    mix, current = None, None
    while batches:
        batch = batches.pop(0)
        uses = adapters_of(batch)
        wanted = (uses, batch[0].compose, batch[0].compose_options)
        if wanted != current:
            if mix is not None:
                mix.detach()
            mix, current = mixed(pipe, uses, batch[0], adapters, config.allow_partial), wanted
            for name, pairs in mix.handles.items() if mix is not None else ():
                say(f"Adapter {name}: " + "; ".join(str(handle.report) for _, handle in pairs) + ".")
        try:
            pictures = draw_batch(pipe, batch, given)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            batches = [batch[:half], batch[half:], *batches]
            say(f"A batch of {len(batch)} pictures does not fit into memory: drawing {half} at a time.")
            continue
        for recipe, picture in zip(batch, pictures, strict=True):
            replace_file(place[recipe.digest], png_bytes(picture, replace(recipe, batch_size=len(batch))))
        done += len(batch)
        progress(done, len(recipes))
    if mix is not None:
        mix.detach()
    return [
        Drawn(path, recipe, missing.pop(path, None) is not None) for path, recipe in zip(paths, recipes, strict=True)
    ]


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
    """Of the recipe of a picture; None where there is no picture, or it has lost its recipe."""
    try:
        return read_recipe(path).digest if path.exists() else None
    except DataError:
        return None


def pipeline_for(ready: Opened, given: Given) -> Any:
    """The base's pipeline, or one of the same parts that takes these pictures."""
    base, controlnet = ready.base, ready.controlnet
    if given.start is None and controlnet is None:
        return base.pipe
    import diffusers

    more = {} if base.is_xl else {"requires_safety_checker": False}
    if controlnet is not None:
        more["controlnet"] = controlnet
    task = "" if given.start is None else "Img2Img"
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
    # Decoded one by one: this is where large pictures take most of the memory.
    return [given.finished(picture) for row in latents.split(1) for picture in pictures_of(pipe, row)]
