"""Draws pictures with a base model and whatever adapters are on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from visionlora.config import TrainSDConfig
from visionlora.diffusion.conditioning import as_long, empty_is_zero, words_or_states
from visionlora.diffusion.encode import encode_text, window_count
from visionlora.diffusion.recipe import SCHEDULERS
from visionlora.diffusion.settings import BASE_DTYPES
from visionlora.errors import ConfigError, ModelError
from visionlora.lora.damage import damaged
from visionlora.models.base import BaseModel
from visionlora.models.evaluation import in_one_pass
from visionlora.models.memory import out_of_memory
from visionlora.models.parts import PARTS


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn."""

    steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0
    batch_size: int = 16
    """Pictures at once; half as many where these do not fit into memory."""


def sampling_of(config: TrainSDConfig, batch_size: int) -> SamplingConfig:
    """How the samples of a run are drawn, in no more memory than it takes to learn from a batch; guidance doubles them."""
    at_once = in_one_pass(batch_size, 2 * SamplingConfig.batch_size) // 2
    return SamplingConfig(config.sample_steps, config.guidance_scale or 1.0, config.seed, at_once)


def sampling_scheduler(scheduler: Any, word: str = "dpm++") -> Any:
    """A way to draw, see `SCHEDULERS`, with the model's own noise schedule; DPM-Solver++ gives good pictures in few steps.

    Raises:
        ConfigError: when the levels end at nothing but noise and it cannot start there.
    """
    import diffusers

    if scheduler.config.get("rescale_betas_zero_snr") and word not in (able := starts_from_noise()):
        raise ConfigError(
            f"scheduler is {word!r}, which cannot start from nothing but noise, as this model or adapter (zero_terminal_snr) "
            f"does: take {', '.join(able)}."
        )
    sampler = SCHEDULERS[word]
    return getattr(diffusers, sampler.kind).from_config(scheduler.config, **sampler.options)


def starts_from_noise() -> list[str]:
    """The ways to draw that can start where the signal is zero (arXiv 2305.08891)."""
    import diffusers

    kinds = {word: getattr(diffusers, sampler.kind) for word, sampler in SCHEDULERS.items()}
    return [word for word, kind in kinds.items() if "rescale_betas_zero_snr" in inspect.signature(kind).parameters]


@torch.no_grad()
def pictures_of(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Latents as a pipeline gives them with `output_type="latent"`, (b, c, h, w), as RGB pictures.

    They are decoded one by one: this is where large pictures take most of the memory.

    A VAE that gives NaN in half precision (SDXL's does) works in fp32 from then on.

    Raises:
        ModelError: when it gives NaN in fp32 too, or the latents are NaN.
    """
    if not torch.isfinite(latents).all():
        raise base_damaged(pipe) or not_finite(latents.dtype)
    vae = pipe.vae
    scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = torch.cat([vae.decode(row, return_dict=False)[0] for row in scaled.split(1)])
    if not torch.isfinite(pixels).all():
        if vae.dtype == torch.float32:
            raise base_damaged(pipe) or ModelError("The VAE gives NaN or infinite pixels: its weights are damaged.")
        vae.to(torch.float32)
        return pictures_of(pipe, latents)
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def base_damaged(pipe: Any) -> ModelError | None:
    """What is said of a pipeline whose weights themselves hold NaN or infinite values; None when all are finite."""
    return damaged("The weights of the base", {name: getattr(pipe, name, None) for name in (*PARTS, "controlnet")})


def not_finite(dtype: torch.dtype) -> ModelError:
    """What is said of a UNet that gives NaN in this dtype: none but a wider one can help."""
    word = next((word for word, known in BASE_DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))
    advice = {torch.float16: "--precision bf16 or fp32, or ", torch.bfloat16: "--precision fp32, or "}.get(dtype, "")
    return ModelError(
        f"The UNet gives NaN or infinite latents in {word}. Use {advice}a lower scale of the adapters or of the guidance; "
        "where none helps, the weights of the base or of an adapter are damaged."
    )


@torch.no_grad()
def draw(
    base: BaseModel,
    prompts: Sequence[str],
    size: int,
    config: SamplingConfig,
    progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One RGB picture of `size` px per prompt, all from the same seed: what differs comes from prompt and adapters."""
    pipe = base.pipe
    original = pipe.scheduler
    pipe.scheduler = sampling_scheduler(original)
    pictures: list[Image.Image] = []
    at_once = config.batch_size
    with any_kernel(), restored(pipe, original):
        while part := list(prompts[len(pictures) : len(pictures) + at_once]):
            try:
                latents = pipe(
                    **(long_states(base, part) or words_or_states(pipe, part, "", base.clip_skip)),
                    height=size,
                    width=size,
                    num_inference_steps=config.steps,
                    guidance_scale=config.guidance_scale,
                    generator=[torch.Generator().manual_seed(config.seed) for _ in part],
                    output_type="latent",
                ).images
            except RuntimeError as e:
                if len(part) == 1 or not out_of_memory(e):
                    raise
                at_once = len(part) // 2
                continue
            pictures += pictures_of(pipe, latents)
            if progress is not None:
                progress(len(part))
    return pictures


def long_states(base: BaseModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a pipeline is called with where a prompt is longer than a window and the model reads several; else nothing."""
    if base.windows == 1 or window_count(base, prompts) == len(prompts):
        return {}
    rows, device = encode_text(base, [*prompts, ""]), base.pipe.text_encoder.device
    *texts, without = (text.to(device) for text in as_long([row["text"] for row in rows]))
    if empty_is_zero(base):
        without = torch.zeros_like(without)
    found = {"prompt_embeds": torch.stack(texts), "negative_prompt_embeds": torch.stack([without] * len(prompts))}
    if base.is_xl:
        *pooled, last = (row["pooled"].to(device) for row in rows)
        last = torch.zeros_like(last) if empty_is_zero(base) else last
        found["pooled_prompt_embeds"] = torch.stack(pooled)
        found["negative_pooled_prompt_embeds"] = torch.stack([last] * len(prompts))
    return found


@contextmanager
def restored(pipe: Any, scheduler: Any) -> Iterator[None]:
    """A pipeline has this scheduler again in the end."""
    try:
        yield
    finally:
        pipe.scheduler = scheduler


def any_kernel() -> AbstractContextManager[None]:
    """Every kernel of attention may be used: a VAE in fp32 has heads that the flash kernel does not take."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    return cast("AbstractContextManager[None]", sdpa_kernel(list(kinds)))
