"""Pictures -> checked items -> latents and text -> training -> adapter file -> sample grid -> run folder.

The whole of `visionlora train-sd`, one stage after the other; each stage hands a small frozen object to the next.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from visionlora.pipelines.further import check_first, keep_first, learned_before, named_base, read_first

from visionlora.config import TrainSDConfig
from visionlora.data.buckets import described
from visionlora.data.cache import Share
from visionlora.data.folder import ImageFolder, ImageItem, read_image_folder, read_pictures
from visionlora.data.learned import Learned
from visionlora.diffusion.denoiser import Denoiser, LearnedWord, Tokens
from visionlora.diffusion.encode import Encoded, cut_captions, encode_dataset
from visionlora.diffusion.prior import check_class_folder, class_pictures, draw_missing
from visionlora.diffusion.sampling import SamplingConfig
from visionlora.diffusion.settings import (
    attention_kernel,
    captions_of,
    check_attention,
    check_base_precision,
    noise_scheduler_of,
    objective_of,
    plan_of,
    prepare_encoders,
    prepare_unet,
    release,
    validation_masks,
    validation_plan,
)
from visionlora.diffusion.task import DenoisingTask, Preservation
from visionlora.diffusion.validation import Validation, hold_out, verdict
from visionlora.errors import ConfigError, DataError
from visionlora.formats import native
from visionlora.loaders import check_family
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.further import further_config, method_for
from visionlora.lora.handle import Handle
from visionlora.lora.inject import check_targets, inject
from visionlora.models.base import BaseModel, open_base
from visionlora.models.memory import give_back
from visionlora.report.listener import Listener, bars
from visionlora.report.resume import Start, base_digest, begin, holding
from visionlora.report.runfolder import RunFolder
from visionlora.report.samples import SampleSheet
from visionlora.report.sd_fitting import Fitting
from visionlora.report.sd_run import header, learned_from, public_metadata, report
from visionlora.training.learner import JointLearner, Part
from visionlora.training.loop import new_accelerator, process_state, recent_loss
from visionlora.training.memory import at_once, bytes_kept, free_memory
from visionlora.training.order import generator_at
from visionlora.training.settings import (
    adapter_config,
    automatic_ranks,
    loop_config,
    ranks_state,
    suited,
    text_adapter_config,
    with_kept_ranks,
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    grid: Path | None
    """None when no samples were asked for."""
    first_loss: float
    last_loss: float
    seconds: float


@holding
def train_sd(config: TrainSDConfig, listener: Listener | None = None) -> RunResult:
    """Trains one adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after adapter and state were saved under `checkpoints/`, from which `resume` goes on.
    """
    started = time.monotonic()
    tell = (listener or Listener()) if process_state().is_main_process else Listener()
    start = begin(config, "sd", tell)
    ready = prepare(start, tell)
    config, base, accelerator = ready.config, ready.base, ready.accelerator

    # Latents and text, adapter; from here on the run leaves files
    material = encode(ready, tell)
    if not config.sample_columns and accelerator.num_processes == 1:  # others' latents may have to be made here
        release(base, text_is_cached=material.tokens is None)
    learning = new_adapter(ready, material, tell, start.state)
    if config.auto_batch and start.state is None:
        config = batch_in_memory(ready, material, learning, tell)
    loop = loop_config(config)
    run = start.open(config) if accelerator.is_main_process else RunFolder(start.folder)
    if accelerator.is_main_process:
        keep_first(ready.first, run, start)
    accelerator.wait_for_everyone()

    # Training
    prompts = config.sample_prompts or default_prompts(config, ready.folder)
    settings = SamplingConfig(config.sample_steps, config.guidance_scale or 1.0, config.seed)
    sheet = SampleSheet(base, learning.learner, prompts, ready.size, settings, run, tell)
    fitting = Fitting(
        config,
        learning.learner,
        learning.export,
        accelerator,
        run,
        sheet,
        tell,
        lambda step: header(
            config, learning.config, loop, base, ready.fingerprints, ready.folder, ready.size, step, ready.first
        ),
        learned_from(ready.folder, ready.apart, base_digest(ready.fingerprints)),
        start,
        material.validation,
        ranks_state(learning.config),
    )
    if start.state is not None:
        fitting.restore(start.state)
    if config.compile:
        base.pipe.unet.compile()
    with attention_kernel(config.attention):
        history = fitting.train(material.task(learning.learner))

    # Adapter, grid and report
    adapter_path = run.path / "adapter.safetensors"
    if accelerator.is_main_process:
        with fitting.fit.averaged():
            native.write(
                fitting.adapter(history[-1].step),
                adapter_path,
                public_metadata(config, learning.config, loop, base, ready.folder, ready.size, fitting.started),
            )
        seconds = time.monotonic() - started
        report(
            run, config, loop, base, ready.folder, learning.handle, sheet, history, fitting.evaluations, seconds,
            fitting.log.changes, material.data,
        )  # fmt: skip
        if fitting.evaluations:
            tell.say(verdict(fitting.evaluations))
    seconds = time.monotonic() - started
    grid = run.path / "grid.png" if config.sample_columns else None
    return RunResult(run.path, adapter_path, grid, history[0].loss, recent_loss(history), seconds)


# ----------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Ready:
    """Pictures and base model, checked; nothing has been computed or written."""

    config: TrainSDConfig
    """With every default filled in."""
    folder: ImageFolder
    """The pictures to train on."""
    apart: tuple[ImageItem, ...]
    """Those by which one sees whether it learned."""
    base: BaseModel
    fingerprints: dict[str, dict[str, str]]
    noise_scheduler: Any
    size: int
    """Resolution, px."""
    adapter: AdapterConfig
    """Of the UNet."""
    text_adapters: dict[str, AdapterConfig]
    """Of the text encoders that are adapted."""
    word: LearnedWord | None
    accelerator: Any
    first: Adapter | None
    """What the run learns on from."""

    @property
    def in_bf16(self) -> bool:
        """Whether the VAE multiplies in bf16, as the UNet does; not in fp16, which overflows in some."""
        return bool(self.accelerator.mixed_precision == "bf16")


def prepare(start: Start[TrainSDConfig], tell: Listener) -> Ready:
    """Reads the pictures, opens the model, and checks all settings against both."""
    config, first = start.config, read_first(start)
    folder = read_pictures(config, progress=lambda done, total: tell.progress("Checking pictures", done, total))
    for note in folder.notes:
        tell.say(note)
    tell.say(folder.caption_source)
    before, not_known = learned_before(first, config)
    folder, apart = held_out(folder, config, before)
    if apart and not_known:
        tell.say(not_known)
    if apart:
        tell.say(f"{len(folder.items)} pictures to train on, {len(apart)} apart to see whether it learned.")
    if any(item.mask for item in folder.items) and not any(item.mask for item in apart) and config.validation:
        tell.say(
            f"The masks are for the pictures to train on alone; those of {config.validation} are judged whole. val_share, "
            "instead, keeps pictures apart with their masks."
        )
    if config.prior_images is not None:
        check_class_folder(Path(config.prior_images), [config.images, *(f.path for f in config.folders)])

    base = open_base(named_base(config, first)[0])
    tell.say(base.why)
    config, notes = suited(config, base.suggested)
    for note in notes:
        tell.say(note)
    size = config.resolution or base.resolution
    base.check_resolution(size)
    plan_of(config, base, size)
    fingerprints = base.fingerprints()
    noise_scheduler = noise_scheduler_of(config, base)
    if first is not None:
        check_parts(first, base, config)
        check_first(first, start.config, base.id, fingerprints, tell)
        method = method_for(first.component("unet"), config.method, str(config.start_from))
        config = dataclasses.replace(config, method=method)
    adapter, text_adapters = adapters_for(config, base, first)
    accelerator = new_accelerator(
        config.precision,
        config.trackers,
        start.folder,
        parts_stop=config.train_text_encoder and config.text_encoder_stop < 1,
    )
    check_attention(config.attention, accelerator.device, accelerator.mixed_precision)
    check_base_precision(config, accelerator.mixed_precision)
    prepare_encoders(base, config, accelerator.device, accelerator.mixed_precision)
    word = new_word(config, base, folder)
    longest = [max(variants, key=len) for variants in captions_of(config, folder.items)]
    for caption, lost in cut_captions(base, longest):
        tell.say(f"The caption {caption!r} is longer than the model reads; it never sees: {lost}")
    return Ready(
        config,
        folder,
        apart,
        base,
        fingerprints,
        noise_scheduler,
        size,
        adapter,
        text_adapters,
        word,
        accelerator,
        first,
    )


def adapters_for(
    config: TrainSDConfig, base: BaseModel, first: Adapter | None
) -> tuple[AdapterConfig, dict[str, AdapterConfig]]:
    """Of the UNet, and of each text encoder that is adapted; checked against the model and what is learned on from."""
    adapter = adapter_config(config, min_rank=config.min_rank)
    if first is None:
        check_targets(base.pipe.unet, adapter)
    else:
        adapter = further_config(adapter, first.component("unet"), first.info)
    if not config.train_text_encoder:
        return adapter, {}
    text_adapters, parts = {}, base.components()
    for name, _, _ in base.text_parts():
        own = text_adapter_config(config, parts[name], last_is_read=not base.is_xl or name == "text_encoder_2")
        if first is not None and (modules := first.component(name)):
            method_for(modules, own.method, f"The part of {config.start_from} for {name}")
            own = further_config(own, modules, {})
        else:
            check_targets(parts[name], own)
        text_adapters[name] = own
    return adapter, text_adapters


def new_word(config: TrainSDConfig, base: BaseModel, folder: ImageFolder) -> LearnedWord | None:
    """The word that is learned, where one is.

    Raises:
        ConfigError: when no caption has it.
    """
    if config.token is None:
        return None
    if not any(config.token in item.caption for item in folder.items):
        example = folder.items[0].caption
        raise ConfigError(
            f"token is {config.token!r}, but no caption has it, so it could not be learned. Write it into the captions, or "
            f"give one for all: --prompt 'a photo of {config.token}' (a caption now: {example!r})."
        )
    return LearnedWord(base, config.token, config.token_vectors, config.token_initializer)


def check_parts(first: Adapter, base: BaseModel, config: TrainSDConfig) -> None:
    """Refuses to learn on from an adapter with a part that the run does not train.

    Raises:
        AdapterFileError: when it is for another family of base models.
        ConfigError: when it has such a part.
    """
    check_family(first, base)
    if "unet" not in first.components:
        raise ConfigError(f"{config.start_from} has no part for the UNet, so there is nothing to learn on from.")
    if first.embeddings:
        raise ConfigError(
            f"{config.start_from} holds the learned word {next(iter(first.embeddings))!r}: no run can learn on from a word."
        )
    trained = {"unet", *(name for name, _, _ in base.text_parts() if config.train_text_encoder)}
    if extra := [name for name in first.components if name not in trained]:
        raise ConfigError(
            f"{config.start_from} also changes {', '.join(extra)}, which this run would lose: set train_text_encoder=true."
        )


# ----------------------------------------------------------------------------------------------------------- material


@dataclass(frozen=True)
class Material:
    """Latents and text."""

    ready: Ready
    data: Encoded
    tokens: Tokens | None
    """The captions as token ids, where text encoders or a word learn too."""
    validation: Validation | None
    class_caption: int | None
    """Position of the class's caption, where the base's predictions keep the class."""

    def task(self, learner: JointLearner | None) -> DenoisingTask:
        """What is trained; without a learner what is learned on the UNet alone, for measuring."""
        config, kept = self.ready.config, None
        if learner is not None and config.prior_prompt is not None:
            kept = Preservation(config.prior_weight, self.class_caption, learner)
        return DenoisingTask(
            self.data,
            self.ready.noise_scheduler,
            config.caption_dropout,
            objective_of(config),
            config.unmasked_weight,
            kept,
            None if learner is None else self.tokens,
        )


def encode(ready: Ready, tell: Listener) -> Material:
    """Pictures and captions as the UNet sees them, from the cache where it has them."""
    config, base, accelerator = ready.config, ready.base, ready.accelerator
    plan = plan_of(config, base, ready.size)
    share = None
    if accelerator.num_processes > 1:
        share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    class_items: tuple[ImageItem, ...] = ()
    if config.prior_images is not None and config.prior_prompt is not None:
        where = Path(config.prior_images).expanduser()
        prepare_unet(base, config, accelerator.device, accelerator.mixed_precision)  # it draws
        if accelerator.is_main_process:
            drawn = draw_missing(
                base, where, config.prior_prompt, config.prior_count, ready.size, config.guidance_scale or 1.0, config.seed,
                lambda done, total: tell.progress("Drawing class pictures", done, total),
            )  # fmt: skip
            if drawn:
                tell.say(f"{drawn} pictures of {config.prior_prompt!r} were drawn to {where}.")
        accelerator.wait_for_everyone()
        class_items = class_pictures(where, config.prior_prompt, config.skip_broken)
    captions = captions_of(config, ready.folder.items)
    salt = "" if ready.word is None else f"{config.token} {config.token_vectors} {config.token_initializer}"
    data = encode_dataset(
        base, ready.folder.items, plan, None, tell.progress, captions=captions, class_items=class_items, share=share,
        more_captions=[config.held_caption] if config.held_caption else [], salt=salt, in_bf16=ready.in_bf16,
    )  # fmt: skip
    for line in described(
        [(item.name or item.path.name, f) for item, f in zip(data.items, data.framings, strict=True)]
    ):
        tell.say(line)
    if alone := lonely(data, config.batch_size or 1):
        tell.say(alone)
    kept = None
    if ready.apart:
        kept = encode_dataset(
            base, ready.apart, validation_plan(plan), None, tell.progress, share=share, salt=salt, in_bf16=ready.in_bf16,
            captions=[variants[:1] for variants in captions_of(config, ready.apart)],
        )  # fmt: skip
    return material_of(ready, data, kept)


def material_of(ready: Ready, data: Encoded, kept: Encoded | None) -> Material:
    """What was encoded, to train on and to judge by, with its captions in the form that the model reads."""
    config, base = ready.config, ready.base
    learns_text = ready.word is not None or bool(ready.text_adapters)
    validation = None
    if kept is not None:
        own_tokens = Tokens.of(base, kept) if learns_text else None
        validation = Validation(kept, ready.noise_scheduler, config.seed, own_tokens, config.unmasked_weight)
    class_caption = data.captions.index(config.held_caption) if config.held_caption else None
    return Material(ready, data, Tokens.of(base, data) if learns_text else None, validation, class_caption)


def lonely(data: Encoded, batch_size: int) -> str:
    """A line about sizes with fewer pictures than a batch: each is then several times in one batch."""
    few = [group for group in data.groups if len(set(group.positions)) < batch_size]
    if not few or len(data.groups) == 1:
        return ""
    count = sum(len(set(group.positions)) for group in few)
    return (
        f"{count} pictures are of sizes that have fewer pictures than a batch ({batch_size}), so a batch repeats them. "
        "A larger bucket_step puts more pictures together; buckets=false cuts all to one size."
    )


# ------------------------------------------------------------------------------------------------------------ adapter


@dataclass(frozen=True)
class Learning:
    """What is trained."""

    learner: JointLearner
    handle: Handle
    """Of the UNet."""
    others: dict[str, Handle]
    """Of the text encoders."""
    word: LearnedWord | None
    config: AdapterConfig
    """Of the UNet, with the ranks that were chosen."""

    def export(self) -> Adapter:
        """As it is now, for a file."""
        modules = self.handle.modules("unet")
        for name, handle in self.others.items():
            modules |= handle.modules(name)
        return Adapter(modules, embeddings={} if self.word is None else self.word.embeddings())


def new_adapter(ready: Ready, material: Material, tell: Listener, state: Mapping[str, Any] | None = None) -> Learning:
    """The adapters on their parts of the model, untrained or as far as the run learns on from."""
    config, base, adapter, accelerator = ready.config, ready.base, ready.adapter, ready.accelerator
    give_back()  # what encoding took, before the UNet is there
    prepare_unet(base, config, accelerator.device, accelerator.mixed_precision)
    if config.rank == "auto" and (kept := with_kept_ranks(adapter, state)) is not None:
        adapter = kept
    elif config.rank == "auto":
        choice = automatic_ranks(
            base.pipe.unet, adapter, material.task(None), config,
            lambda done, total: tell.progress("Measuring layers", done, total), accelerator.autocast,
        )  # fmt: skip
        tell.say("Mean rank by block:\n" + bars(choice.by_block()))
        adapter = choice.config
    first = ready.first

    def modules(name: str) -> dict[str, AdapterModule] | None:
        return None if first is None else first.component(name) or None

    handle = inject(base.pipe.unet, adapter, seed=config.seed, start_from=modules("unet"))
    tell.say(f"Adapter: {handle.report}.")
    rate = config.learning_rate or 1.0
    parts, others, components = [Part("unet", handle)], {}, base.components()
    for name, own in ready.text_adapters.items():
        others[name] = inject(components[name], own, seed=config.seed, start_from=modules(name))
        tell.say(f"Adapter of {name}: {others[name].report}.")
        factor = (config.text_encoder_learning_rate or rate / 2) / rate
        parts.append(Part(name, others[name], factor, config.text_encoder_stop))
    if ready.word is not None:
        parts.append(Part("token", ready.word, (config.token_learning_rate or 5 * rate) / rate))
    model = base.pipe.unet if material.tokens is None else Denoiser(base, ready.word)
    return Learning(JointLearner(model, parts), handle, others, ready.word, adapter)


def batch_in_memory(ready: Ready, material: Material, learning: Learning, tell: Listener) -> TrainSDConfig:
    """The settings with as many pictures at once as fit; a step has as many as before, so it learns the same."""
    config, model = ready.config, learning.learner.model
    task = material.task(learning.learner)
    largest = max(range(len(material.data)), key=lambda i: math.prod(material.data.framings[i].bucket))

    def one() -> Tensor:
        with ready.accelerator.autocast():
            return task.losses(model, torch.tensor([largest]), generator_at(config.seed, 0), slice(0, 1)).sum()

    kept, free = bytes_kept(model, one), free_memory(ready.accelerator.device)
    together = (config.batch_size or 1) * config.gradient_accumulation
    count = at_once(together, kept, free)
    room = "" if free is None else f" of {free / 2**30:.1f} GiB free"
    tell.say(f"A picture keeps {kept / 2**20:.0f} MiB{room}: {count} of the {together} pictures of a step at once.")
    return dataclasses.replace(config, batch_size=count, gradient_accumulation=together // count, auto_batch=False)


# ----------------------------------------------------------------------------------------------------------- pictures


def held_out(folder: ImageFolder, config: TrainSDConfig, before: Learned) -> tuple[ImageFolder, tuple[ImageItem, ...]]:
    """The pictures to train on, and those that are kept apart: none that was trained on before."""
    trained, _ = before.positions([item.sha256 for item in folder.items])
    if config.val_share:
        if len(trained) == len(folder.items):
            raise DataError(
                f"{config.start_from} has learned from all of these pictures, so that none of them can tell whether it learns "
                "more: leave val_share out, or name others with --validation."
            )
        return hold_out(folder, config.val_share, config.seed, trained)
    if config.validation is None:
        return folder, ()
    apart = read_image_folder(
        Path(config.validation), config.prompt, captions=config.captions, masks=validation_masks(config),
        skip_broken=config.skip_broken,
    )  # fmt: skip
    known = {item.sha256: item.path for item in folder.items}
    if doubles := [item.path.name for item in apart.items if item.sha256 in known]:
        raise DataError(
            f"{len(doubles)} pictures of {config.validation} are also among those to train on (first {doubles[0]}), so they "
            "cannot tell whether it learned. Take them out of one folder."
        )
    trained, _ = before.positions([item.sha256 for item in apart.items])
    if trained:
        raise DataError(
            f"{config.start_from} has learned from {len(trained)} pictures of {config.validation} (first "
            f"{apart.items[min(trained)].path.name}), so they cannot tell whether it learns more. Take them out."
        )
    return folder, apart.items


def default_prompts(config: TrainSDConfig, folder: ImageFolder) -> tuple[str, ...]:
    """Up to four different captions of the training pictures, as the model sees them."""
    different = list({item.caption: item for item in folder.items}.values())[:4]
    return tuple(variants[0] for variants in captions_of(config, different))
