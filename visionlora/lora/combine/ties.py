"""TIES-Merging, arXiv 2306.01708, §4: trim each ΔW to its largest values, elect a sign per value, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionlora.lora.combine.types import Factors, Options
from visionlora.lora.functional import delta_weight
from visionlora.lora.products import factors as factors_of


def ties(factors: Sequence[Factors], options: Options) -> tuple[Tensor, Tensor]:
    """Trim, elect signs, mean of those that agree; ΔW is dense afterwards."""
    deltas = torch.stack([delta_weight(a, b, s) for a, b, s in factors])
    return factors_of("diff", {"diff": merged(deltas, options.density)})


def merged(deltas: Tensor, density: float) -> Tensor:
    """Trim, elect, disjoint mean over the first dimension."""
    trimmed = torch.stack([largest(d, density) for d in deltas])
    sign = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == sign) & (trimmed != 0)
    return torch.where(agreeing, trimmed, 0).sum(0) / agreeing.sum(0).clamp_min(1)


def largest(delta: Tensor, density: float) -> Tensor:
    """The share of largest values, the rest zero."""
    keep = max(1, round(density * delta.numel()))
    if keep == delta.numel():
        return delta
    threshold = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0)
