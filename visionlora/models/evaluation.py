"""Models that are looked at while they learn: their modules' mode, and how many pictures at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


def forget_biases(model: nn.Module) -> None:
    """Clears the biases of attention that timm's LeViT, TinyViT and EfficientFormer keep from evaluation to evaluation.

    They are of the weights as they were then, and timm clears them in `train()` alone.
    """
    for m in model.modules():
        if kept := getattr(m, "attention_bias_cache", None):
            cast(dict[str, Tensor], kept).clear()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and back; without `train()`, which some models use to change their weights."""
    forget_biases(model)
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def in_one_pass(batch_size: int, most: int) -> int:
    """Pictures to look at in one forward pass, where a batch fits in memory to learn from: four take no more than one.

    Measured by `benchmarks/core.py looking`; without gradient checkpointing they take less.

    Args:
        batch_size: pictures that are learned from at once.
        most: more would save no time.

    >>> in_one_pass(1, 32), in_one_pass(16, 32)
    (4, 32)
    """
    return min(most, 4 * batch_size)
