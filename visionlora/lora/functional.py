"""Pure functions on LoRA factors; every other part of the project computes ΔW here.

Letters in shapes: o out features, i in features, r rank, g groups, *k kernel sizes (none for a linear layer).
Linear: lora_A (r, i), lora_B (o, r). Convolution: lora_A (r, i/g, *k), lora_B (o, r, 1, ...).
Source: LoRA, arXiv 2106.09685, eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """ΔW = scaling · B·A in fp32, in the shape of the base weight: (o, i) or (o, i/g, *k).

    >>> delta_weight(torch.ones(2, 3), torch.ones(4, 2), 0.5).shape
    torch.Size([4, 3])
    """
    product = lora_B.float().flatten(1) @ lora_A.float().flatten(1)
    return (product * scaling).reshape(lora_B.shape[0], *lora_A.shape[1:])


def stack_factors(factors: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Concatenates (lora_A, lora_B, scaling) of several adapters along the rank, in fp32, scalings folded into B.

    Exact: [s1·B1 … sk·Bk]·[A1; …; Ak] = Σ s·B·A, so k adapters cost one pair of matmuls.
    """
    down = torch.cat([a.float() for a, _, _ in factors], dim=0)
    up = torch.cat([b.float() * s for _, b, s in factors], dim=1)
    return down, up
