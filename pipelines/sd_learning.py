"""What train-sd trains on and what it trains: latents and text, and the adapters on their parts of the model.

In: `Ready`. Out: `Material`, then `Learning`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from visionlora.pipelines.sd_ready import Ready

from visionlora.config import TrainSDConfig
from visionlora.data.buckets import described
from visionlora.data.cache import Share
from visionlora.data.folder import ImageItem
from visionlora.data.wording import count_of
from visionlora.diffusion.denoiser import Denoiser, LearnedWord, Tokens
from visionlora.diffusion.encode import Encoded, encode_dataset
from visionlora.diffusion.prior import class_pictures, draw_missing
from visionlora.diffusion.settings import (
    objective_of,
    plan_of,
    prepare_unet,
    validation_plan,
    whole_captions,
)
from visionlora.diffusion.task import DenoisingTask, Preservation
from visionlora.diffusion.validation import Validation, levels_in
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import inject
from visionlora.lora.rank import at_rank
from visionlora.models.memory import give_back
from visionlora.report.listener import Listener, bars
from visionlora.training.learner import JointLearner, Part
from visionlora.training.memory import Room, at_once, room_for
from visionlora.training.order import generator_at
from visionlora.training.settings import (
    automatic_ranks,
    text_share,
    with_kept_ranks,
)


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

    @property
    def encoded(self) -> tuple[Encoded, ...]:
        """All that the base has encoded."""
        return (self.data,) if self.validation is None else (self.data, self.validation.data)

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
        where, prompt = Path(config.prior_images).expanduser(), config.prior_prompt
        prepare_unet(base, config, accelerator.device, accelerator.mixed_precision)  # it draws
        class_items, others = class_pictures(where, prompt, config.skip_broken, base)
        accelerator.wait_for_everyone()
        if len(class_items) < config.prior_count:
            if accelerator.is_main_process:
                drawn = draw_missing(
                    base, where, prompt, len(class_items), config.prior_count, ready.size, config.guidance_scale or 1.0,
                    config.seed, lambda done, total: tell.progress("Drawing class pictures", done, total),
                )  # fmt: skip
                tell.say(f"{drawn} pictures of {prompt!r} were drawn to {where}.")
            accelerator.wait_for_everyone()
            class_items, others = class_pictures(where, prompt, config.skip_broken, base)
        if others:
            tell.say(
                f"{others} pictures of {where} were drawn for another caption than {prompt!r} or by another "
                "model: they are left aside."
            )
    if config.zero_terminal_snr:
        # Samples are drawn as is learned; class pictures were, above, as the base knows it.
        base.pipe.scheduler = ready.noise_scheduler
    salt = "" if ready.word is None else ready.word.start
    data = encode_dataset(
        base, ready.folder.items, plan, None, tell.progress, captions=ready.captions, class_items=class_items, share=share,
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
            captions=whole_captions(config, ready.apart),
        )  # fmt: skip
    cache = data.latents.cache
    if cache.problem:
        tell.say(
            f"The cache {cache.folder} cannot be written ({cache.problem}), so that every start encodes the pictures anew: "
            "name another place by VISIONLORA_CACHE."
        )
    return material_of(ready, data, kept)


def material_of(ready: Ready, data: Encoded, kept: Encoded | None) -> Material:
    """What was encoded, to train on and to judge by, with its captions in the form that the model reads."""
    config, base = ready.config, ready.base
    learns_text = ready.word is not None or bool(ready.text_adapters)
    validation = None
    if kept is not None:
        own_tokens = Tokens.of(base, kept) if learns_text else None
        validation = Validation(
            kept,
            ready.noise_scheduler,
            config.seed,
            own_tokens,
            config.unmasked_weight,
            levels_in(config.timestep_range),
        )
    class_caption = data.captions.index(config.held_caption) if config.held_caption else None
    return Material(ready, data, Tokens.of(base, data) if learns_text else None, validation, class_caption)


def lonely(data: Encoded, batch_size: int) -> str:
    """A line about sizes with fewer pictures than a batch: each is then several times in one batch."""
    lines = []
    for side, what in enumerate(("picture", "class picture")):
        own = [len(set(group.positions)) for group in data.groups if data.sides[group.positions[0]] == side]
        few = sum(count for count in own if count < batch_size)
        if few and len(own) > 1:
            lines.append(count_of(few, what))
    if not lines:
        return ""
    one = len(lines) == 1 and lines[0].startswith("1 ")
    are, them = ("is of a size that has", "it") if one else ("are of sizes that have", "them")
    return (
        f"{' and '.join(lines)} {are} fewer pictures than a batch ({batch_size}), so a batch repeats {them}. "
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
    text_rank: int
    """Of the text encoders, where they are not learned on from others."""

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
    components, text_rank = base.components(), adapter.rank
    if config.rank == "auto" and state is not None and (kept := with_kept_ranks(adapter, state)) is not None:
        adapter, text_rank = kept, state["ranks"].get("text_rank") or text_rank
    elif config.rank == "auto":
        texts = {name: (components[name], own) for name, own in ready.text_adapters.items()}
        text_rank, taken = text_share(config, (base.pipe.unet, adapter), texts)
        choice = automatic_ranks(
            base.pipe.unet, adapter, material.task(None), config,
            lambda done, total: tell.progress("Measuring layers", done, total), accelerator.autocast, taken,
        )  # fmt: skip
        tell.say("Mean rank by block:\n" + bars(choice.by_block()))
        adapter = choice.config
    first = ready.first

    def modules(name: str) -> dict[str, AdapterModule] | None:
        return None if first is None else first.component(name) or None

    handle = inject(base.pipe.unet, adapter, seed=config.seed, start_from=modules("unet"))
    tell.say(f"Adapter: {handle.report}.")
    rate = config.learning_rate or 1.0
    parts, others = [Part("unet", handle)], {}
    for name, own in ready.text_adapters.items():
        if config.rank == "auto":
            own = at_rank(own, text_rank)
        others[name] = inject(components[name], own, seed=config.seed, start_from=modules(name))
        tell.say(f"Adapter of {name}: {others[name].report}.")
        factor = (config.text_encoder_learning_rate or rate / 2) / rate
        parts.append(Part(name, others[name], factor, config.text_encoder_stop))
    if ready.word is not None:
        parts.append(Part("token", ready.word, (config.token_learning_rate or 5 * rate) / rate))
    model = base.pipe.unet if material.tokens is None else Denoiser(base, ready.word)
    return Learning(JointLearner(model, parts), handle, others, ready.word, adapter, text_rank)


def room_of(ready: Ready, material: Material, learning: Learning) -> Room:
    """What a picture of the largest size keeps, and the memory there is."""
    config, model = ready.config, learning.learner.model
    task = material.task(learning.learner)
    largest = max(range(len(material.data)), key=lambda i: math.prod(material.data.framings[i].bucket))

    def one() -> Tensor:
        with ready.accelerator.autocast():
            return task.losses(model, torch.tensor([largest]), generator_at(config.seed, 0), slice(0, 1)).sum()

    return room_for(model, one, config.optimizer, config.ema_decay is not None, ready.accelerator.device)


def batch_in_memory(ready: Ready, material: Material, learning: Learning, tell: Listener) -> TrainSDConfig:
    """The settings with as many pictures at once as fit; a step has as many as before, so it learns the same."""
    config: TrainSDConfig = ready.config
    found = room_of(ready, material, learning)
    together = (config.batch_size or 1) * config.gradient_accumulation
    count = at_once(together, found)
    # Each process may have found something else, and all must go through a step alike.
    count = int(ready.accelerator.gather(torch.tensor([count], device=ready.accelerator.device)).min())
    room = "" if found.free is None else f" of {found.free / 2**30:.1f} GiB free"
    tell.say(
        f"A picture keeps {found.per_picture / 2**20:.0f} MiB{room}: {count} of the {together} pictures of a step at once."
    )
    return dataclasses.replace(config, batch_size=count, gradient_accumulation=together // count, auto_batch=False)
