"""Settings of train-sd -> what the run would do, how long it would take and how much memory: nothing is written.

The estimate is measured, not computed: two steps on pictures of the largest size, one step of drawing, one batch of the VAE.
A step of very many pictures, or of more than fit in memory, is computed from one of fewer.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from visionlora.pipelines.sd_learning import Learning, Material, batch_in_memory, material_of, new_adapter, room_of
from visionlora.pipelines.sd_ready import Ready, one_pass, prepare
from visionlora.pipelines.timing import PROBED, cost_of_step, seconds_of_step, timed, with_rank
from visionlora.pipelines.train_sd import default_prompts

from visionlora.config import TrainSDConfig
from visionlora.data.buckets import Size
from visionlora.data.cache import TensorCache, default_cache_folder
from visionlora.data.images import decode
from visionlora.diffusion.encode import cache_bytes, encode_dataset, window_count
from visionlora.diffusion.prior import class_pictures
from visionlora.diffusion.recipe import Recipe
from visionlora.diffusion.sampling import SamplingConfig, draw, sampling_of
from visionlora.diffusion.settings import (
    attention_kernel,
    captions_of,
    plan_of,
    prepare_unet,
    release,
    validation_plan,
    whole_captions,
)
from visionlora.diffusion.validation import AT_ONCE, levels_in, losses_at
from visionlora.lora.rank import at_rank
from visionlora.models.base import BaseModel
from visionlora.models.evaluation import evaluating, in_one_pass
from visionlora.report.listener import Listener
from visionlora.report.resume import begin, holding
from visionlora.report.samples import sample_moments
from visionlora.report.sd_run import pictures_per_step
from visionlora.training.loop import Fit, LoopConfig, process_state
from visionlora.training.memory import peak_memory
from visionlora.training.settings import loop_config, targets_of


@dataclass(frozen=True)
class Estimate:
    """What a run would do."""

    model: str
    targets: str
    layers: int
    trained_parameters: int
    sizes: dict[Size, int]
    """(height, width) in px -> pictures."""
    steps: int
    pictures_per_step: int
    epochs: float
    step_seconds: float
    encoding_seconds: float
    """Of all pictures, those of the class and to judge by too, were none in the cache."""
    drawing_seconds: float
    """Of all sample pictures."""
    class_seconds: float
    """Of the class pictures that have to be drawn."""
    validation_seconds: float
    """Of all looks at the validation pictures."""
    beside: int
    """Pictures of the class and to judge by, which are encoded too."""
    peak_bytes: int
    """Of the process, or of the GPU where there is one."""
    too_large: str
    """What is said of a batch that does not fit in memory: its peak is computed then."""
    device: str
    captions: int
    """Different ones that are encoded."""
    latent_bytes: int
    """Of all pictures in the cache, were none there."""
    text_bytes: int
    """Of all captions, likewise."""
    free_bytes: float
    """Of the cache's disk."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        beside = self.encoding_seconds, self.drawing_seconds, self.class_seconds, self.validation_seconds
        return self.steps * self.step_seconds + sum(beside)

    def lines(self) -> list[str]:
        """For a person."""
        of_class = f", {self.class_seconds:.0f} s to draw class pictures" if self.class_seconds else ""
        judged = f", {self.validation_seconds:.0f} s on validation pictures" if self.validation_seconds else ""
        sizes = ", ".join(f"{w}x{h}: {n}" for (h, w), n in sorted(self.sizes.items(), key=lambda s: -s[1]))
        layers = f"{self.layers} layers, " if self.layers else ""
        return [
            f"Model       {self.model}",
            f"Targets     {self.targets}: {layers}{self.trained_parameters:,} parameters train",
            f"Pictures    {sum(self.sizes.values())}, width x height in px: {sizes}",
            f"Steps       {self.steps} of {self.pictures_per_step} pictures, {self.epochs:.1f} times over all pictures",
            f"Time        {self.seconds / 60:.1f} minutes: {self.step_seconds:.2f} s a step, "
            f"{self.encoding_seconds:.0f} s to encode, {self.drawing_seconds:.0f} s for samples{judged}{of_class}",
            f"Memory      {self.peak_bytes / 2**30:.2f} GiB at the peak, of the {self.device}{self.too_large}",
            f"Cache       {(self.latent_bytes + self.text_bytes) / 2**30:.2f} GiB: latents of "
            f"{sum(self.sizes.values()) + self.beside} pictures {self.latent_bytes / 2**30:.2f}, text of {self.captions} "
            f"captions {self.text_bytes / 2**30:.2f}; "
            f"its disk has {self.free_bytes / 2**30:.2f} GiB free",
        ]


@holding
def dry_run(config: TrainSDConfig, listener: Listener | None = None) -> Estimate:
    """Checks everything that `train_sd` checks, and measures a little.

    Raises:
        VisionLoRAError: as `train_sd` would.
    """
    tell = (listener or Listener()) if process_state().is_main_process else Listener()
    ready = prepare(begin(config, "sd", tell), tell)
    ready = of_one_rank(ready, tell)
    config, items = ready.config, ready.folder.items
    plan = plan_of(config, ready.base, ready.size)
    framings = [plan.framing(item) for item in items]
    sizes: dict[Size, int] = {}
    for framing in framings:
        sizes[framing.bucket] = sizes.get(framing.bucket, 0) + 1
    largest = max(sizes, key=lambda s: s[0] * s[1])
    loop = loop_config(config)
    some = [item for item, f in zip(items, framings, strict=True) if f.bucket == largest][: max(4, loop.batch_size)]
    captions = captions_of(config, some)
    there, missing = class_sizes(config, ready.base)
    of_class = [plan.framing_of(s) for s in (*there, *[(ready.size, ready.size)] * missing)]
    apart = [validation_plan(plan).framing(item) for item in ready.apart]
    texts = {"", config.held_caption or "", *(c for each in ready.captions for c in each)}
    texts |= {variants[0] for variants in whole_captions(config, ready.apart)}
    if of_class and config.prior_prompt is not None:
        texts.add(config.prior_prompt)
    latents, text_bytes = cache_bytes(
        ready.base, [*framings, *of_class], len(plan.variants), window_count(ready.base, sorted(texts))
    )
    latents += cache_bytes(ready.base, apart, 1, 0)[0]
    class_seconds = missing * class_picture_seconds(ready) if missing else 0.0
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        data = encode_dataset(
            ready.base, some, plan, TensorCache(Path(folder)), captions=captions,
            more_captions=[config.held_caption] if config.held_caption else [], in_bf16=ready.in_bf16,
        )  # fmt: skip
        encoding = (time.monotonic() - start) / len(some)
        material = material_of(ready, data, None)
        if not config.sample_columns:
            release(ready.base, material.encoded, text_is_cached=material.tokens is None)
        learning = new_adapter(ready, material, tell)
        if config.auto_batch:
            loop = loop_config(batch_in_memory(ready, material, learning, tell))
        learner, task = learning.learner, material.task(learning.learner)

        def seconds_with(batch: int) -> float:
            short = dataclasses.replace(loop, steps=PROBED + 1, batch_size=batch)
            seconds: float = seconds_of_step(Fit(ready.accelerator, learner, short, config.ema_decay), task)
            return seconds

        with attention_kernel(config.attention):
            step = cost_of_step(loop.batch_size, room_of(ready, material, learning), seconds_with)
            judging = validation_seconds(ready, material, learning, loop) if ready.apart else 0.0
        drawing = 0.0
        if config.sample_columns:
            prompts = config.sample_prompts or default_prompts(config, ready.folder)
            one = dataclasses.replace(sampling_of(config, loop.batch_size), steps=1)
            with evaluating(learner.model):
                drawing = timed(lambda: draw(ready.base, prompts, ready.size, one), ready.accelerator)
    columns = config.sample_columns + 1 if config.sample_columns else 0
    pictures = pictures_per_step(loop)
    return Estimate(
        model=ready.base.id,
        targets=targets_of(config),
        layers=len(learning.handle.report.hits) + sum(len(h.report.hits) for h in learning.others.values()),
        trained_parameters=sum(p.numel() for group in learner.parameter_groups(1.0, 0.0) for p in group["params"]),
        sizes=sizes,
        steps=loop.steps,
        pictures_per_step=pictures,
        epochs=loop.steps * pictures / one_pass(config, items),
        step_seconds=step.seconds,
        encoding_seconds=encoding * (len(items) + len(of_class) + len(apart) / len(plan.variants)),
        drawing_seconds=drawing * config.sample_steps * columns,
        class_seconds=class_seconds,
        validation_seconds=judging,
        beside=len(of_class) + len(apart),
        peak_bytes=peak_memory() + step.more_bytes,
        too_large=step.note(", or auto_batch=true"),
        device="GPU" if torch.cuda.is_available() else "process",
        captions=len(texts),
        latent_bytes=latents,
        text_bytes=text_bytes,
        free_bytes=TensorCache(default_cache_folder()).free,
    )


def of_one_rank(ready: Ready, tell: Listener) -> Ready:
    """With the budget's rank everywhere, where it is auto."""
    components = ready.base.components()
    parts = {"unet": ready.adapter, **ready.text_adapters}
    config = with_rank(ready.config, [(components[name], own) for name, own in parts.items()], tell)
    if config is ready.config or config.rank == "auto":
        return ready
    texts = {name: at_rank(own, config.rank) for name, own in ready.text_adapters.items()}
    return dataclasses.replace(ready, config=config, adapter=at_rank(ready.adapter, config.rank), text_adapters=texts)


def class_sizes(config: TrainSDConfig, base: BaseModel) -> tuple[list[Size], int]:
    """The sizes of the class pictures that are there, and how many have to be drawn."""
    if config.prior_images is None or config.prior_prompt is None:
        return [], 0
    items, _ = class_pictures(Path(config.prior_images).expanduser(), config.prior_prompt, config.skip_broken, base)
    return [item.size or decode(item.path).size[::-1] for item in items], max(0, config.prior_count - len(items))


def validation_seconds(ready: Ready, material: Material, learning: Learning, loop: LoopConfig) -> float:
    """What all looks at the validation pictures take, measured on training pictures of the largest size at one noise level."""
    config, model = ready.config, learning.learner.model
    levels = levels_in(config.timestep_range)
    with evaluating(model), torch.no_grad():
        one = timed(
            lambda: losses_at(
                model, ready.noise_scheduler, material.data, levels[:1], config.seed, material.tokens,
                config.unmasked_weight, in_one_pass(loop.batch_size, AT_ONCE),
            ),
            ready.accelerator,
        ) / len(material.data)  # fmt: skip
    looks = 1 + len(sample_moments(loop.steps, config.checkpoints))
    seconds: float = one * len(levels) * len(ready.apart) * looks / ready.accelerator.num_processes
    return seconds


def class_picture_seconds(ready: Ready) -> float:
    """What drawing a picture of the class takes, measured on one step."""
    config, base = ready.config, ready.base
    prepare_unet(base, config, ready.accelerator.device, ready.accelerator.mixed_precision)
    one = SamplingConfig(1, config.guidance_scale or 1.0, config.seed)
    step: float = timed(lambda: draw(base, [config.prior_prompt or ""], ready.size, one), ready.accelerator)
    return Recipe.steps * step
