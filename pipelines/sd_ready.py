"""What a run of train-sd starts from: pictures, base model and settings, each checked against the others.

In: the settings. Out: `Ready`; nothing has been computed or written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.pipelines.further import check_first, learned_before, named_base, read_first

from visionlora.config import TrainSDConfig, given_names
from visionlora.config.train_sd import TOKEN_LENGTHS
from visionlora.data.augment import check_masks
from visionlora.data.folder import ImageFolder, ImageItem, read_image_folder, read_pictures
from visionlora.data.learned import Learned
from visionlora.data.source_captions import trigger_caption
from visionlora.data.wording import count_of
from visionlora.diffusion.denoiser import LearnedWord
from visionlora.diffusion.encode import cut_captions, unread_letters
from visionlora.diffusion.prior import check_class_folder
from visionlora.diffusion.prompts import read_otherwise
from visionlora.diffusion.settings import (
    captions_of,
    check_attention,
    check_base_precision,
    noise_scheduler_of,
    plan_of,
    prepare_encoders,
    validation_masks,
    validation_plan,
)
from visionlora.diffusion.validation import MOST, hold_out, judges
from visionlora.errors import ConfigError, DataError
from visionlora.loaders import check_family
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.further import further_config, method_for
from visionlora.lora.inject import check_targets
from visionlora.models.base import BaseModel, open_base
from visionlora.models.kinds import check_trains
from visionlora.models.memory import free_at_once
from visionlora.report.listener import Listener
from visionlora.report.resume import Start
from visionlora.training.loop import new_accelerator
from visionlora.training.settings import (
    adapter_config,
    cut_warmup,
    in_steps,
    left_aside,
    suited,
    text_adapter_config,
)

SHOWN, WIDTH = 3, 80
"""Captions that are too long: how many are shown, and how many letters of each."""
MOST_LETTERS = 20
"""Letters without tokens that are shown."""


@dataclass(frozen=True)
class Ready:
    """Pictures and base model, checked; nothing has been computed or written."""

    config: TrainSDConfig
    """With every default filled in."""
    folder: ImageFolder
    """The pictures to train on."""
    captions: list[tuple[str, ...]]
    """Of each of them, those that are drawn from."""
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
    for note in left_aside(config):
        tell.say(note)
    folder, apart = pictures_of(config, first, tell)
    model, _, named_by = named_base(config, first)
    base = open_base(model, named_by=named_by)
    check_trains(base.id, base.pipe)
    config = trained_alike(config, first, base)
    base = base.reading(config.clip_skip, config.windows)
    tell.say(base.why)
    if first is not None:
        first = as_far_as_read(first, base, str(config.start_from), tell)
    suggested = {name: value for name, value in base.suggested.items() if name != "steps" or config.epochs is None}
    config, notes = suited(config, suggested)
    for note in notes:
        tell.say(note)
    size = config.resolution or base.resolution
    base.check_resolution(size)
    plan = plan_of(config, base, size)
    for items, made in ((folder.items, plan), (apart, validation_plan(plan))):
        check_masks(items, [made.framing(item) for item in items], made.variants)
    fingerprints = base.fingerprints()
    noise_scheduler = noise_scheduler_of(config, base)
    if first is not None:
        check_parts(first, base, config)
        check_first(first, start.config, base.id, base.fingerprints_for(first), tell)
        method = method_for(first.component("unet"), config.method, str(config.start_from))
        config = with_word_of(dataclasses.replace(config, method=method), given_names(start.config), first, base)
    adapter, text_adapters = adapters_for(config, base, first)
    accelerator = new_accelerator(
        config.precision,
        config.trackers,
        start.folder,
        parts_stop=config.train_text_encoder and config.text_encoder_stop < 1,
    )
    if accelerator.device.type == "cpu":
        free_at_once()
    if config.epochs is not None:
        epochs, pass_ = config.epochs, one_pass(config, folder.items)
        config = in_steps(config, pass_, accelerator.num_processes)
        tell.say(f"{epochs:g} epochs of {pass_} pictures are {config.steps} steps.")
    if line := cut_warmup(config):
        tell.say(line)
    check_attention(config.attention, accelerator.device, accelerator.mixed_precision)
    check_base_precision(config, accelerator.mixed_precision)
    prepare_encoders(base, config, accelerator.device, accelerator.mixed_precision)
    word = new_word(config, base, folder, first)
    captions = captions_of(config, folder.items)
    say_how_read(base, captions, config, tell)
    return Ready(
        config,
        folder,
        captions,
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


def pictures_of(
    config: TrainSDConfig, first: Adapter | None, tell: Listener
) -> tuple[ImageFolder, tuple[ImageItem, ...]]:
    """The pictures to train on, and those apart by which it is seen whether the run learned."""
    folder = read_pictures(config, progress=tell.progress)
    for note in folder.notes:
        tell.say(note)
    tell.say(folder.caption_source)
    before, not_known = learned_before(first, config)
    folder, apart, unseen = held_out(folder, config, before)
    if apart and not_known:
        tell.say(not_known)
    if unseen:
        tell.say(unseen)
    if apart:
        tell.say(f"{len(folder.items)} pictures to train on, {len(apart)} apart to see whether it learned.")
    if any(item.mask for item in folder.items) and not any(item.mask for item in apart) and config.validation:
        tell.say(
            f"The masks are for the pictures to train on alone; those of {config.validation} are judged whole. val_share, "
            "instead, keeps pictures apart with their masks."
        )
    if config.prior_images is not None:
        check_class_folder(Path(config.prior_images), [config.images, *(f.path for f in config.folders)])
    return folder, apart


def say_how_read(base: BaseModel, captions: Sequence[Sequence[str]], config: TrainSDConfig, tell: Listener) -> None:
    """Names captions that are longer than the model reads, or are learned otherwise than they read as prompts."""
    longest = [max(variants, key=len) for variants in captions]
    if marked := [caption for caption in dict.fromkeys(longest) if read_otherwise(caption)]:
        shown = marked[0] if len(marked[0]) <= WIDTH else f"{marked[0][:WIDTH]}…"
        tell.say(
            f"{count_of(len(marked), 'caption')} with weights or backslashes, the first {shown!r}: they are learned to the "
            "letter, while `generate` reads (word:1.2) as a weight and \\( as a bracket. Write the words alone."
        )
    if letters := unread_letters(base, longest):
        more = f" and {len(letters) - MOST_LETTERS} more" if len(letters) > MOST_LETTERS else ""
        tell.say(
            f"{base.id} has no tokens for {' '.join(letters[:MOST_LETTERS])}{more}: captions that differ in these alone "
            "are the same to it. Write numbers as words, and words in letters that it knows."
        )
    cut = cut_captions(base, longest)
    for caption, lost in cut[:SHOWN]:
        caption, lost = (text if len(text) <= WIDTH else f"{text[:WIDTH]}…" for text in (caption, lost))
        tell.say(f"The caption {caption!r} is longer than the model reads; it never sees: {lost}")
    if len(cut) > SHOWN:
        tell.say(f"So are {len(cut) - SHOWN} captions more.")
    if cut and (longer := [n for n in TOKEN_LENGTHS if n > config.max_token_length]):
        tell.say(
            f"max_token_length={' or '.join(map(str, longer))} learns more of them, read as `generate` reads long prompts."
        )


def one_pass(config: TrainSDConfig, items: Sequence[ImageItem]) -> int:
    """How many pictures training sees until it has seen all of these as often as they repeat: half are the class's, if any."""
    return sum(item.repeats for item in items) * (1 if config.prior_images is None else 2)


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
        own = text_adapter_config(config, base.unread_layers(name))
        if first is not None and (modules := first.component(name)):
            method_for(modules, own.method, f"The part of {config.start_from} for {name}")
            own = further_config(own, modules, {})
        else:
            check_targets(parts[name], own)
        text_adapters[name] = own
    return adapter, text_adapters


def new_word(config: TrainSDConfig, base: BaseModel, folder: ImageFolder, first: Adapter | None) -> LearnedWord | None:
    """The word that is learned, where one is, from where `first` has come with it.

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
    learned = None if first is None else first.embeddings.get(config.token)
    return LearnedWord(base, config.token, config.token_vectors, config.token_initializer, learned)


def trained_alike(config: TrainSDConfig, first: Adapter | None, base: BaseModel) -> TrainSDConfig:
    """The settings, text and noise levels as those of the adapter that it learns on from where nothing else is given."""
    given = given_names(config)
    if first is not None and "clip_skip" not in given and not base.is_xl:
        config = dataclasses.replace(config, clip_skip=first.clip_skip)
    if first is not None and "max_token_length" not in given and first.max_token_length in TOKEN_LENGTHS:
        config = dataclasses.replace(config, max_token_length=first.max_token_length)
    # A base that predicts the noise draws without such levels too: see `follow_noise`.
    if first is not None and "zero_terminal_snr" not in given and base.prediction_type != "epsilon":
        config = dataclasses.replace(config, zero_terminal_snr=first.zero_terminal_snr)
    return config


def with_word_of(config: TrainSDConfig, given: Collection[str], first: Adapter, base: BaseModel) -> TrainSDConfig:
    """The settings with the word of the adapter that it learns on from, where it has one; `given` names those of the user.

    Raises:
        ConfigError: when the run cannot learn on from it.
    """
    if not first.embeddings:
        return config
    where = config.start_from
    if len(first.embeddings) > 1:
        raise ConfigError(
            f"{where} holds the learned words {', '.join(first.embeddings)}; a run learns one word: start from the adapter "
            "of one of them."
        )
    ((word, parts),) = first.embeddings.items()
    if config.token not in (None, word):
        raise ConfigError(
            f"token is {config.token!r}, but {where} holds the learned word {word!r}, which this run would lose: leave token "
            f"out, and write {word} into the captions."
        )
    encoders = {name: encoder.get_input_embeddings().weight.shape[1] for name, _, encoder in base.text_parts()}
    counts = {len(vectors) for vectors in parts.values()}
    if (
        {name: vectors.shape[1] for name, vectors in parts.items()} != encoders
        or len(counts) != 1
        or word.split() != [word]
    ):
        raise ConfigError(
            f"{where} holds the learned word {word!r} for {', '.join(parts)}, which cannot be learned on with {base.id}: it "
            f"takes one word, with as many vectors for each of {', '.join(encoders)}."
        )
    (count,) = counts
    if "token_vectors" in given and config.token_vectors != count:
        raise ConfigError(
            f"token_vectors is {config.token_vectors}, but {word!r} in {where} has {count}: leave it out."
        )
    return dataclasses.replace(config, token=word, token_vectors=count)


def as_far_as_read(first: Adapter, base: BaseModel, where: str, tell: Listener) -> Adapter:
    """What the run learns on from, without layers that the UNet does not read, which files of other trainers have too."""
    starts = [
        re.compile(re.escape(name) + r"\." + pattern.removeprefix("re:"))
        for name, _, _ in base.text_parts()
        for pattern in base.unread_layers(name)
    ]
    unread = [n for n in first.modules if any(start.fullmatch(n) for start in starts)]
    if not unread:
        return first
    tell.say(
        f"{len(unread)} layers of {where} are left out, the first {unread[0]}: they are at the end of a text encoder, and its "
        "text is read before them."
    )
    return dataclasses.replace(first, modules={n: m for n, m in first.modules.items() if n not in set(unread)})


def check_parts(first: Adapter, base: BaseModel, config: TrainSDConfig) -> None:
    """Refuses to learn on from an adapter with a part that the run does not train.

    Raises:
        AdapterFileError: when it is for another family of base models.
        ConfigError: when it has such a part.
    """
    check_family(first, base)
    if "unet" not in first.components:
        raise ConfigError(f"{config.start_from} has no part for the UNet, so there is nothing to learn on from.")
    trained = {"unet", *(name for name, _, _ in base.text_parts() if config.train_text_encoder)}
    if extra := [name for name in first.components if name not in trained]:
        raise ConfigError(
            f"{config.start_from} also changes {', '.join(extra)}, which this run would lose: set train_text_encoder=true."
        )


def held_out(
    folder: ImageFolder, config: TrainSDConfig, before: Learned
) -> tuple[ImageFolder, tuple[ImageItem, ...], str]:
    """The pictures to train on, those by which the run is judged, and a line about those by which it could be and is not.

    None of those that judge was trained on before.
    """
    trained, _ = before.positions([item.sha256 for item in folder.items])
    if config.val_share:
        if len(trained) == len(folder.items):
            raise DataError(
                f"{config.start_from} has learned from all of these pictures, so that none of them can tell whether it learns "
                "more: leave val_share out, or name others with validation=FOLDER."
            )
        kept, apart = hold_out(folder, config.val_share, config.seed, trained)
        line, share = "", round(config.val_share * len(folder.items))
        if share > MOST:
            line = (
                f"val_share {config.val_share:g} of {len(folder.items)} pictures would be {share}: {MOST} tell as much, so the "
                "others are trained on."
            )
        return kept, judges(apart), line
    if config.validation is None:
        return folder, (), ""
    given = read_image_folder(
        Path(config.validation), config.prompt, captions=config.captions, masks=validation_masks(config),
        skip_broken=config.skip_broken,
    )  # fmt: skip
    known = {item.sha256: item.path for item in folder.items}
    if doubles := [item.path.name for item in given.items if item.sha256 in known]:
        raise DataError(
            f"{len(doubles)} pictures of {config.validation} are also among those to train on (first {doubles[0]}), so they "
            "cannot tell whether it learned. Take them out of one folder."
        )
    trained, _ = before.positions([item.sha256 for item in given.items])
    if trained:
        raise DataError(
            f"{config.start_from} has learned from {len(trained)} pictures of {config.validation} (first "
            f"{given.items[min(trained)].path.name}), so they cannot tell whether it learns more. Take them out."
        )
    apart = with_words_of(folder, given, str(config.validation))
    line = f"{MOST} of the {len(apart)} pictures of {config.validation} judge the run, chosen by their contents."
    return folder, judges(apart), line if len(apart) > MOST else ""


def with_words_of(folder: ImageFolder, apart: ImageFolder, validation: str) -> tuple[ImageItem, ...]:
    """The pictures kept apart; without captions of their own they are judged under the one that training has.

    Raises:
        DataError: when that has several.
    """
    invented = trigger_caption(apart.root)
    words = {item.caption for item in folder.items}
    if {item.caption for item in apart.items} != {invented} or words == {invented}:
        return apart.items
    if len(words) > 1:
        raise DataError(
            f"The pictures of {validation} have no captions, and those to train on have several, so it cannot be told how well "
            "they are learned. Write captions as there, or leave validation out and give val_share."
        )
    return tuple(dataclasses.replace(item, caption=next(iter(words))) for item in apart.items)
