"""One word -> an optimizer over the groups of a learner, each group with a rate of its own.

word            what
adamw           torch's AdamW (arXiv 1711.05101)
adamw8bit       the same with 8-bit states (arXiv 2110.02861), on a GPU
adafactor       second moments by row and column (arXiv 1804.04235)
prodigy         finds the rate (arXiv 2306.06101)
lion            the sign of a momentum (arXiv 2302.06675)
schedulefree    AdamW that averages instead of a schedule (arXiv 2405.15682)
sgd             with momentum

That the package of a word is installed was checked by `visionlora.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visionlora.training.ema import write

if TYPE_CHECKING:
    from visionlora.training.loop import LoopConfig

Groups = list[dict[str, Any]]
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "prodigy": 16, "lion": 4, "schedulefree": 8, "sgd": 4}
"""What each remembers of a parameter; adafactor keeps sums of rows and columns alone."""
MOMENTUM = 0.9
"""Of sgd."""


def build_optimizer(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, ready for the first step.

    Args:
        groups: of parameters, each with its rate at the peak of the schedule and its decay.
        config: word, rate, decay and betas.

    Returns:
        An optimizer whose groups have the rates to multiply by the schedule. What needs them (schedulefree) has `train()`
        and `eval()`, see `as_evaluated`.
    """
    return BUILDERS[config.optimizer](groups, config)


def options(config: LoopConfig) -> dict[str, Any]:
    """What nearly all of them are told in the same words."""
    own = {"betas": config.betas} if config.betas else {}
    return {"lr": config.learning_rate, "weight_decay": config.weight_decay, **own}


def adamw(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of torch, as one kernel for each parameter or for all where torch has one."""
    devices = {p.device.type for group in groups for p in group["params"]}
    kernels: dict[str, Any] = {"fused": True} if devices <= {"cuda", "cpu"} else {"foreach": True}
    return torch.optim.AdamW(groups, **options(config), **kernels)


def adamw8bit(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of bitsandbytes; tensors of fewer than 4,096 numbers keep full states."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options(config))
    return optimizer


def adafactor(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of transformers.

    torch's own is not used: it always multiplies the rate by the size of the parameter, and an adapter's B starts at zero, so
    it would hardly move. Here that is off, and rates mean what they mean for AdamW.
    """
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        beta1=config.betas[0] if config.betas else None,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    return optimizer


def prodigy(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of prodigyopt, with one estimate for all groups.

    It refuses groups of different rates. A rate f times as high is the same as training p / f at the common rate: the
    gradient of that is f times as large, Adam's step does not change with the size of the gradient, and p moves by f times
    the step. So the parameters and gradients of such groups are rescaled around each step, and its estimate
    (arXiv 2306.06101, algorithm 4) is the exact one of the rescaled problem.
    """
    from prodigyopt import Prodigy

    factors = [
        (p, group["lr"] / config.learning_rate)
        for group in groups
        for p in group["params"]
        if group["lr"] != config.learning_rate
    ]
    common = [{**group, "lr": config.learning_rate} for group in groups]
    # Both are what its authors advise for diffusion models; without the second a warm-up inflates the estimate. The decay is
    # given by group alone: otherwise it prints.
    own = {"betas": config.betas} if config.betas else {}
    optimizer: torch.optim.Optimizer = Prodigy(
        common, lr=config.learning_rate, use_bias_correction=True, safeguard_warmup=True, **own
    )

    @torch.no_grad()
    def before(*_: Any) -> None:
        for p, factor in factors:
            p.div_(factor)
            if p.grad is not None:
                p.grad.mul_(factor)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for p, factor in factors:
            p.mul_(factor)
            if p.grad is not None:
                p.grad.div_(factor)

    if factors:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
    return optimizer


def lion(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of lion-pytorch."""
    from lion_pytorch import Lion

    optimizer: torch.optim.Optimizer = Lion(groups, **options(config))
    return optimizer


def schedulefree(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of schedulefree. Its own warm-up is left alone: ours reaches it through the rates of the groups."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, **options(config))
    optimizer.train()
    found: torch.optim.Optimizer = optimizer
    return found


def sgd(groups: Groups, config: LoopConfig) -> torch.optim.Optimizer:
    """Of torch, with momentum."""
    momentum = config.betas[0] if config.betas else MOMENTUM
    return torch.optim.SGD(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=momentum, foreach=True
    )


BUILDERS: dict[str, Callable[[Groups, LoopConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "adafactor": adafactor,
    "prodigy": prodigy,
    "lion": lion,
    "schedulefree": schedulefree,
    "sgd": sgd,
}
"""By the words of `visionlora.config.OPTIMIZERS`."""


@contextmanager
def as_evaluated(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What an optimizer with `eval()` has learned stands in the parameters meanwhile; then they are as before, bit for bit.

    Args:
        optimizer: schedulefree; it trains at other values than those that it has learned.
        parameters: what it trains.
    """
    kept = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        write(parameters, kept)  # its own way there and back rounds, and a run must not depend on who looked at it
