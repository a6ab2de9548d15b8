"""From the settings of a run to those of its adapter and its loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from visionlora.config import OPTIMIZERS, TrainingConfig, budget_of, given_names
from visionlora.config.choices import WHOLE, WITHOUT
from visionlora.errors import ConfigError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.rank import Part, RankChoice, choose_ranks, narrowest, numbers_at, uniform_rank
from visionlora.training.loop import LoopConfig, Task, process_state
from visionlora.training.order import generator_at, positions_at
from visionlora.training.schedules import warmup_of

C = TypeVar("C", bound=TrainingConfig)
CALIBRATION_BATCHES = 16
"""Batches on which rank auto measures the layers."""


def targets_of(config: TrainingConfig) -> str:
    """What trains, in words: the targets, those of the file that the run learns on from, or all that a method trains."""
    return WHOLE.get(config.method) or (f"those of {config.start_from}" if config.start_from else config.targets)


OF_OTHERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "rank_budget": ("of rank auto", lambda c: c.rank == "auto"),
    "schedule_cycles": ("of schedule cosine-restarts", lambda c: c.schedule == "cosine-restarts"),
    "schedule_power": ("of schedule polynomial", lambda c: c.schedule == "polynomial"),
    "keep_tags": ("of shuffle_tags and tag_dropout", lambda c: c.shuffle_tags or c.tag_dropout),
    "picture_variants": ("of random_crop and colour_jitter", lambda c: c.random_crop or c.colour_jitter),
    "bucket_step": ("of buckets", lambda c: c.buckets),
    "upscale": ("of buckets", lambda c: c.buckets),
    "prior_weight": ("of prior_prompt", lambda c: c.prior_prompt is not None),
    "prior_count": ("of prior_images", lambda c: c.prior_images is not None),
    "sample_prompts": ("of the sample grid", lambda c: c.sample_columns),
    "sample_steps": ("of the sample grid", lambda c: c.sample_columns),
}
"""Settings that are for others alone: what they are of, and whether that is so. None of them is filled in by a run."""


def left_aside(config: TrainingConfig) -> tuple[str, ...]:
    """Lines about settings that were given and change nothing, to tell before the run."""
    usual = {f.name: f.default for f in dataclasses.fields(config)}
    given = {name: value for name in usual if (value := getattr(config, name)) != usual[name]}
    lines = []
    if of_layers := [f"{name}={given[name]}" for name in WITHOUT.get(config.method, ()) if name in given]:
        why = f"trains {WHOLE[config.method]}" if config.method in WHOLE else "has none of its own"
        lines.append(f"Method {config.method} {why}, so this is left aside: {', '.join(of_layers)}.")
    if idle := [f"{name} is {of}" for name, (of, so) in OF_OTHERS.items() if name in given and not so(config)]:
        lines.append(f"Without effect in this run: {', '.join(idle)}.")
    return tuple(lines)


def cut_warmup(config: TrainingConfig) -> str:
    """A line about a warm-up that was given and is longer than runs of these steps have; nothing where it is not."""
    least = warmup_of(loop_config(config))
    if "warmup_steps" not in given_names(config) or least == config.warmup_steps:
        return ""
    return (
        f"The warm-up takes a tenth of a run at most: {least} of these {config.steps} steps, not {config.warmup_steps}."
    )


def adapter_config(config: TrainingConfig, **more: Any) -> AdapterConfig:
    """The adapter's share; with rank auto, the mean rank that competes for the budget."""
    shared = ("method", "alpha", "targets", "dropout", "init", "basis_index")
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    rank = config.rank if config.rank != "auto" else amount if kind == "rank" else 8
    own = {name: getattr(config, name) for name in shared}
    return AdapterConfig(rank=rank, save_memory=config.save_memory is not False, **own, **more)


def text_adapter_config(config: TrainingConfig, unread: tuple[str, ...]) -> AdapterConfig:
    """The same on a CLIP text encoder, as far as it has such layers.

    Args:
        config: of the run.
        unread: patterns of the layers that the UNet does not read.
    """
    adapter = adapter_config(config)
    if adapter.method == "tlora":  # no timestep reaches a text encoder
        adapter = dataclasses.replace(adapter, method="lora")
    wide = {"mlp", "all"} & set(adapter.target_list)
    return dataclasses.replace(adapter, targets=("attn", "mlp") if wide else "attn", exclude=unread)


def loop_config(config: TrainingConfig) -> LoopConfig:
    """The loop's share."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoopConfig)}
    return LoopConfig(**{**values, "schedule": config.schedule or OPTIMIZERS[config.optimizer].schedule})


def in_steps(config: C, pictures: int, processes: int) -> C:
    """The configuration with steps instead of epochs, where it has some.

    Args:
        config: with a batch.
        pictures: that one pass sees.
        processes: that share the steps, each with a batch of its own.
    """
    if config.epochs is None:
        return config
    per_step = (config.batch_size or 1) * config.gradient_accumulation * processes
    return dataclasses.replace(config, steps=max(1, round(config.epochs * pictures / per_step)), epochs=None)


def suited_rate(rate: float, optimizer: str) -> float:
    """A learning rate that suits an optimizer where `rate` suits AdamW.

    >>> suited_rate(1e-4, "adamw"), suited_rate(1e-4, "prodigy")
    (0.0001, 1.0)
    """
    word = OPTIMIZERS[optimizer]
    return 1.0 if word.finds_rate else rate * word.rate


def suited(config: C, suggested: Mapping[str, Any]) -> tuple[C, tuple[str, ...]]:
    """The configuration with what was left open filled in.

    Args:
        config: of the run.
        suggested: settings that suit the base model, with rates for AdamW; they are turned into those of the optimizer.

    Returns:
        The configuration, and lines to tell.
    """
    word = OPTIMIZERS[config.optimizer]
    rates = {k: suited_rate(v, config.optimizer) for k, v in suggested.items() if k.endswith("learning_rate")}
    suits = {**suggested, **rates, "schedule": word.schedule}
    filled = {k: v for k, v in suits.items() if getattr(config, k) is None}
    chosen = dataclasses.replace(config, **filled)
    if config.optimizer == "adamw":
        return chosen, ()
    parts = [f"Optimizer {config.optimizer}", f"schedule {chosen.schedule}"]
    if "learning_rate" in filled:
        share = "what" if word.rate == 1 else f"{word.rate:g} of what"
        why = "a factor on the rate that it finds itself" if word.finds_rate else f"{share} suits adamw"
        parts.append(f"learning_rate {chosen.learning_rate:g} ({why})")
    return chosen, (", ".join(parts) + ".",)


def ranks_state(adapter: AdapterConfig, text_rank: int | None = None) -> dict[str, Any]:
    """The ranks that were chosen, for a checkpoint: measured again, on another batch or device, they may be others.

    Args:
        adapter: with ranks by layer.
        text_rank: of text encoders, where a model has them.
    """
    patterns = {"rank_pattern": dict(adapter.rank_pattern), "alpha_pattern": dict(adapter.alpha_pattern)}
    return {"ranks": {**patterns, "exclude": list(adapter.exclude_list), "text_rank": text_rank}}


def with_kept_ranks(adapter: AdapterConfig, state: Mapping[str, Any] | None) -> AdapterConfig | None:
    """The configuration with the ranks of a checkpoint; None when there are none to keep."""
    if state is None or "ranks" not in state:  # a new run, or an older checkpoint
        return None
    kept = state["ranks"]
    alphas = dict(kept.get("alpha_pattern", {}))  # older ones had one alpha for all
    return dataclasses.replace(
        adapter, rank_pattern=dict(kept["rank_pattern"]), alpha_pattern=alphas, exclude=tuple(kept["exclude"])
    )


def automatic_ranks(
    model: nn.Module,
    adapter: AdapterConfig,
    task: Task,
    config: TrainingConfig,
    on_batch: Callable[[int, int], None],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    taken: int = 0,
) -> RankChoice:
    """Ranks by layer, measured on the training pictures before the first step; processes share those of each batch.

    Args:
        model: the base model.
        adapter: its targets compete.
        task: gives the losses.
        config: the budget, batch and seed.
        on_batch: called with (batches done, batches in all).
        autocast: what the model runs under, where its weights need it.
        taken: of a budget that is no mean rank, by other parts of the model.
    """
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    state, own = process_state(), config.batch_size or 1
    batch, first = own * state.num_processes, own * state.process_index

    def loss_of(number: int) -> Tensor:
        on_batch(number + 1, CALIBRATION_BATCHES)
        index = positions_at(config.seed, number * batch, batch, batch, task.groups)
        generator = generator_at(config.seed, number * batch, "calibration")
        with autocast():
            return task.losses(model, index, generator, slice(first, first + own)).mean()

    def shared(found: Tensor) -> Tensor:
        from accelerate.utils import reduce

        mean: Tensor = reduce(found, "mean") if state.num_processes > 1 else found
        return mean

    budget = None if kind == "rank" else amount - taken
    return choose_ranks(model, adapter, loss_of, CALIBRATION_BATCHES, budget, stored=kind == "numbers", shared=shared)


def rank_alike(config: TrainingConfig, parts: Sequence[Part]) -> int:
    """The rank that the budget gives to all layers alike, as far as all can have it."""
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    return amount if kind == "rank" else min(uniform_rank(parts, amount, kind == "numbers"), narrowest(parts))


def text_share(config: TrainingConfig, unet: Part, texts: Mapping[str, Part]) -> tuple[int, int]:
    """The rank that text encoders have within a budget that is no mean rank, and how much of it they take.

    They are not measured: their rank is what the budget would give to all layers alike, as far as theirs can have it.

    Args:
        config: of the run.
        unet: the model and its adapter.
        texts: the same of text encoders, by name.

    Raises:
        ConfigError: when nothing is left for the UNet.
    """
    kind, amount = budget_of(config.rank_budget) or ("rank", 8)
    if kind == "rank" or not texts:
        return unet[1].rank, 0
    stored = kind == "numbers"
    rank = min(uniform_rank([unet, *texts.values()], amount, stored), narrowest(texts.values()))
    taken = numbers_at(texts.values(), rank, stored)
    if taken >= amount:
        raise ConfigError(
            f"rank_budget is {config.rank_budget!r}, and the text encoders alone take {taken:,} of it at rank 1: raise "
            "it, or leave train_text_encoder out."
        )
    return rank, taken
