"""Pure functions on LoRA factors; every other part of the project computes ΔW here.

Letters in shapes: o out features, i in features, r rank, g groups, *k kernel sizes (none for a linear layer).
Linear: lora_A (r, i), lora_B (o, r). Convolution: lora_A (r, i/g, *k), lora_B (o, r, 1, ...).
Source: LoRA, arXiv 2106.09685, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 0.99
"""Share of ‖ΔW‖² that the directions of a wide ΔW hold."""


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """ΔW = scaling · B·A in fp32, in the shape of the base weight: (o, i) or (o, i/g, *k).

    >>> delta_weight(torch.ones(2, 3), torch.ones(4, 2), 0.5).shape
    torch.Size([4, 3])
    """
    product = lora_B.float().flatten(1) @ lora_A.float().flatten(1)
    return (product * scaling).reshape(lora_B.shape[0], *lora_A.shape[1:])


def stack_factors(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Concatenates (lora_A, lora_B, scaling) of several adapters along the rank, in fp32 or wider, scalings folded into B.

    Exact: [s1·B1 … sk·Bk]·[A1; …; Ak] = Σ s·B·A, so k adapters cost one pair of matmuls.
    """
    down = torch.cat([wide(a) for a, _, _ in factors], dim=0)
    up = torch.cat([wide(b) * s for _, b, s in factors], dim=1)
    return down, up


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or as it is when it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sum_row_norms(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms of W + scaling·B·A, (o,), without the dense product: ‖w‖² + 2s·(B∘WAᵀ)·1 + s²·(B·AAᵀ∘B)·1.

    Args:
        weight: W, (o, i) or (o, i/g, *k).
        squares: ‖w‖² of each row, (o,), computed once.
        lora_A: (r, i) or (r, i/g, *k).
        lora_B: (o, r) or (o, r, 1, ...).
        scaling: s.
    """
    w, a, b = weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1)
    cross = (b * (w @ a.t())).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()


def decompose(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of B·A by QR of the factors: no dense ΔW is built.

    Returns:
        u (o, r), s (r,) from the largest down, v (r, i·*k), in fp32 or wider, with B·A = u · diag(s) · v.
    """
    up, down = wide(lora_B).flatten(1), wide(lora_A).flatten(1)
    qb, rb = torch.linalg.qr(up)
    qa, ra = torch.linalg.qr(down.t())
    u, s, v = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return qb @ u, s, v @ qa.t()


def directions(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor] | None:
    """The output and input directions of a ΔW as wide as its layer, (o, k) and (n, k), that hold most of ‖ΔW‖².

    Its factors say nothing of them: one may be the identity. None for a narrower one, whose factors do.
    """
    down, up = lora_A.flatten(1), lora_B.flatten(1)
    if len(down) < min(len(up), down.shape[1]):
        return None
    u, s, v = decompose(down, up)
    k = rank_for_energy(s, MOST) if bool(s.any()) else 0
    return u[:, :k], v[:k].t()


def resize(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a smaller (or equal) rank for the same ΔW (Eckart-Young); singular values are shared evenly."""
    return truncate(*decompose(lora_A, lora_B), rank, (lora_B.shape[0], *lora_A.shape[1:]))


def truncate(u: Tensor, s: Tensor, v: Tensor, rank: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B from the first `rank` singular directions, for a weight of this shape."""
    root = s[:rank].sqrt()
    return _shaped(root[:, None] * v[:rank], u[:, :rank] * root, shape)


def rank_for_energy(s: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest rank that keeps this share of ‖ΔW‖² (0 to 1), at least 1.

    >>> rank_for_energy(torch.tensor([3.0, 1.0, 0.1]), 0.9)
    2
    """
    squares = s.cpu().double().square()
    whole = float(squares.sum()) if total is None else total
    if whole <= 0:
        return 1
    enough = (squares.cumsum(0) >= energy * whole * (1 - 1e-12)).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(s)


def _shaped(down: Tensor, up: Tensor, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Factors (r, i·*k) and (o, r) in the shapes of the layer's kind."""
    kernel = weight_shape[2:]
    return down.reshape(len(down), *weight_shape[1:]), up.reshape(*up.shape, *(1 for _ in kernel))
