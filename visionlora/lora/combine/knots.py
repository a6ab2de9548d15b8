"""KnOTS, arXiv 2410.19735, §4: one basis for all ΔW by an SVD of [ΔW_1 … ΔW_k] = U·Σ·[V_1 … V_k], then TIES on the V_i.

The SVD is that of the stacked factors: U comes from a QR of [B_1 … B_k] and the eigenvectors of a small Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionlora.lora.combine.ties import merged
from visionlora.lora.combine.types import Factors, Options


def knots(factors: Sequence[Factors], options: Options) -> tuple[Tensor, Tensor]:
    """Aligned in one basis before TIES; the rank is that of the sum."""
    downs = [a.double().flatten(1) for a, _, _ in factors]
    ups = [b.double().flatten(1) * s for _, b, s in factors]
    q, r = torch.linalg.qr(torch.cat(ups, dim=1))
    parts = torch.split(r, [len(a) for a in downs], dim=1)
    coordinates = [part @ a for part, a in zip(parts, downs, strict=True)]  # (R, n) each: ΔW_i in the basis q
    values, vectors = torch.linalg.eigh(torch.stack([c @ c.t() for c in coordinates]).sum(0))
    kept = values >= values.max() * 1e-12
    sigma, u = values[kept].clamp_min(0).sqrt(), vectors[:, kept]
    sides = torch.stack([torch.where(sigma > 0, 1 / sigma, 0)[:, None] * (u.t() @ c) for c in coordinates])
    down, up = merged(sides, options.density), q @ (u * sigma)
    shape, spatial = factors[0][0].shape, factors[0][1].shape[2:]
    return down.float().reshape(len(down), *shape[1:]), up.float().reshape(*up.shape, *spatial)
