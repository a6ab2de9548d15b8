"""From the settings of a run to those of its pictures, its objective and its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionlora.config import TrainSDConfig
from visionlora.config.choices import DTYPES
from visionlora.config.folders import ALPHA
from visionlora.data.augment import variants
from visionlora.data.buckets import check_step
from visionlora.data.files import suffix_of
from visionlora.data.folder import ImageItem
from visionlora.data.parquet import PARQUET
from visionlora.data.tags import caption_variants
from visionlora.diffusion.encode import Encoded, Plan
from visionlora.diffusion.objective import Objective, check_objective, zero_terminal
from visionlora.errors import ConfigError
from visionlora.lora.layers import heavy_by_matmul
from visionlora.lora.mapped import cast
from visionlora.lora.packed import CODES, pack, packed_layers
from visionlora.models.base import BaseModel, quiet
from visionlora.models.memory import give_back

USUAL_STEP = 64
"""Of the sides of buckets, px."""


def plan_of(config: TrainSDConfig, base: BaseModel, size: int) -> Plan:
    """How the pictures are made.

    Args:
        config: of the run.
        base: whose grid they must fit.
        size: resolution, px.

    Raises:
        ConfigError: when a bucket step that was given does not fit model and resolution.
    """
    made = variants(config.flip, config.random_crop, config.colour_jitter, config.picture_variants)
    if not config.buckets:
        return Plan(size, None, True, made)
    step = config.bucket_step or (max(base.multiple, USUAL_STEP) if size >= 4 * USUAL_STEP else base.multiple)
    if config.bucket_step is not None:
        check_step(step, base.multiple, size)
    return Plan(size, step, config.upscale, made)


def validation_plan(plan: Plan) -> Plan:
    """The same sizes, one plain variant."""
    return Plan(plan.resolution, plan.step, plan.upscale)


def whole_captions(config: TrainSDConfig, items: Sequence[ImageItem]) -> list[tuple[str, ...]]:
    """Of each picture one caption with all its tags in their order, the same for every seed: to judge by, and to draw."""
    plain = dataclasses.replace(config, shuffle_tags=False, tag_dropout=0.0, caption_variants=1, seed=0)
    return captions_of(plain, items)


def captions_of(config: TrainSDConfig, items: Sequence[ImageItem]) -> list[tuple[str, ...]]:
    """Of each picture the captions that are drawn from; of those with one caption the same."""
    found = {
        caption: caption_variants(
            caption,
            shuffle_tags=config.shuffle_tags,
            keep_tags=config.keep_tags,
            tag_dropout=config.tag_dropout,
            count=config.caption_variants,
            seed=config.seed,
        )
        for caption in dict.fromkeys(item.caption for item in items)
    }
    return [found[item.caption] for item in items]


def validation_masks(config: TrainSDConfig) -> str | None:
    """What masks the pictures of `validation`: their alpha channels, or the column of their table, as those to learn from.

    A folder of masks is for the pictures to learn from alone: one with the same name may be among the others.
    """
    if config.validation is None:
        return None
    every = {folder.masks for folder in config.folders} or {config.masks}
    if every == {ALPHA}:
        return ALPHA
    is_table = suffix_of(Path(config.validation).name) == PARQUET
    return None if config.masks is None or not is_table or Path(config.masks).expanduser().is_dir() else config.masks


def objective_of(config: TrainSDConfig) -> Objective:
    """What is learned."""
    return Objective(
        min_snr_gamma=config.min_snr_gamma,
        debiased=config.debiased,
        huber=config.huber,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
        timestep_range=config.timestep_range,
        logit_normal=(config.timestep_logit[0], config.timestep_logit[1]) if config.timestep_logit else None,
    )


def noise_scheduler_of(config: TrainSDConfig, base: BaseModel) -> Any:
    """The noise levels of a run.

    Raises:
        ConfigError: when the model cannot learn at such levels.
    """
    scheduler = zero_terminal(base.noise_scheduler) if config.zero_terminal_snr else base.noise_scheduler
    check_objective(objective_of(config), scheduler)
    return scheduler


BASE_DTYPES: dict[str, torch.dtype] = {word: getattr(torch, name) for word, name in DTYPES.items()}
COMPUTED_IN = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def base_dtype(config: TrainSDConfig, mixed_precision: str) -> torch.dtype:
    """Of the weights that adapters are put on; those that train themselves would lose small steps in half precision.

    Args:
        config: of the run.
        mixed_precision: of the computation, as accelerate calls it.
    """
    if config.method == "full":
        return torch.float32
    own = config.base_precision not in ("auto", *CODES)
    return BASE_DTYPES[config.base_precision if own else COMPUTED_IN[mixed_precision]]


def check_base_precision(config: TrainSDConfig, mixed_precision: str) -> None:
    """Raises ConfigError when the base would be kept in fewer bits than it computes in."""
    if config.base_precision in ("bf16", "fp16") and mixed_precision == "no":
        raise ConfigError(
            f"base_precision is {config.base_precision!r}, but the run computes in fp32, for which the base must be too: "
            f"--precision {config.base_precision}, or base_precision=int8 to save memory."
        )


def place(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves and casts a part at once: a GPU may not hold the whole in its own precision."""
    if device.type == "cpu":
        cast(part, dtype)
    with quiet("diffusers", "transformers"):
        part.to(device=device, dtype=dtype)


def prepare_encoders(base: BaseModel, config: TrainSDConfig, device: torch.device, mixed_precision: str) -> None:
    """Puts VAE and text encoders where and how they are needed. The weights of the VAE stay in fp32.

    Args:
        base: its weights have been fingerprinted already.
        config: of the run.
        device: where to.
        mixed_precision: of the computation, as accelerate calls it.
    """
    for _, _, encoder in base.text_parts():
        place(encoder, device, base_dtype(config, mixed_precision))
        if config.gradient_checkpointing and (config.train_text_encoder or config.token):
            encoder.gradient_checkpointing_enable()
    base.pipe.vae.to(device)
    if config.channels_last or device.type == "cpu":  # faster on a CPU
        base.pipe.vae.to(memory_format=torch.channels_last)


def prepare_unet(base: BaseModel, config: TrainSDConfig, device: torch.device, mixed_precision: str) -> None:
    """Puts the UNet where and how it is needed; once more changes nothing. Until then it takes no memory beside its file.

    Args:
        base: without adapters; its weights have been fingerprinted already.
        config: of the run.
        device: where to.
        mixed_precision: of the computation, as accelerate calls it.
    """
    unet, dtype = base.pipe.unet, base_dtype(config, mixed_precision)
    if config.base_precision in CODES and not packed_layers(unet):
        pack(unet, config.base_precision, device, dtype)
    place(unet, device, dtype)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        heavy_by_matmul(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()


def release(base: BaseModel, data: Sequence[Encoded], text_is_cached: bool) -> None:
    """Gives back the memory of the parts that a run without samples has no more use for.

    What was encoded and is on disk alone may be taken away there: its part waits on the processor, to encode it again.

    Args:
        base: it can no longer draw.
        data: what it has encoded.
        text_is_cached: whether the text encoders have said all they have to say.
    """
    base.pipe.vae.to("meta" if all(e.latents.in_memory for e in data) else "cpu")
    for _, _, encoder in base.text_parts() if text_is_cached else ():
        encoder.to("meta" if all(e.texts.in_memory for e in data) else "cpu")
    give_back()


def check_attention(attention: str, device: torch.device, mixed_precision: str) -> None:
    """Raises ConfigError when a kernel of attention needs a GPU, a precision, or a package, that is not there."""
    if attention == "sdpa":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"attention is {attention!r}, which needs a GPU, and there is none. Take sdpa: it runs everywhere."
        )
    if attention == "flash" and mixed_precision == "no":
        raise ConfigError(
            "attention is 'flash', which computes in half precision alone: --precision bf16, or take sdpa."
        )
    if attention == "xformers":
        from importlib.util import find_spec

        if find_spec("xformers") is None:
            raise ConfigError("attention is 'xformers', which is not installed: pip install 'visionlora[xformers]'.")


@contextmanager
def attention_kernel(attention: str) -> Iterator[None]:
    """Meanwhile torch takes its flash kernel alone, where that was asked for."""
    if attention != "flash":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
