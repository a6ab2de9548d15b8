"""Draws pictures with a base model and whatever adapters are on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from visionlora.models.base import BaseModel


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are drawn."""

    steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0
    batch_size: int = 16


def sampling_scheduler(scheduler: Any) -> Any:
    """DPM-Solver++ with the model's own noise schedule: good pictures in few steps."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++", solver_order=2)


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
    try:
        for i in range(0, len(prompts), config.batch_size):
            part = list(prompts[i : i + config.batch_size])
            pictures += pipe(
                part,
                height=size,
                width=size,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance_scale,
                generator=[torch.Generator().manual_seed(config.seed) for _ in part],
            ).images
            if progress is not None:
                progress(len(part))
    finally:
        pipe.scheduler = original
    return pictures
