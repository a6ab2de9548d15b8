"""DARE, arXiv 2311.03099, §3: drop random values of each ΔW, divide the rest by the share that stays, add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionlora.lora.combine.types import Factors, Options
from visionlora.lora.functional import delta_weight
from visionlora.lora.products import factors as factors_of


def dare(factors: Sequence[Factors], options: Options) -> tuple[Tensor, Tensor]:
    """Drop at random, rescale, add; ΔW is dense afterwards."""
    generator = torch.Generator().manual_seed(options.seed)
    total = torch.zeros(())
    for a, b, s in factors:
        delta = delta_weight(a, b, s)
        kept = torch.rand(delta.shape, generator=generator) < options.density
        total = total + torch.where(kept, delta / options.density, 0)
    return factors_of("diff", {"diff": total})
