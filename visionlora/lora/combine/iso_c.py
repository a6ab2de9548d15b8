"""Iso-C, arXiv 2502.04959, §4: the singular values of ΣΔW are replaced by their mean, so that no direction drowns another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visionlora.lora.combine.types import Factors, Options
from visionlora.lora.functional import decompose, stack_factors, truncate


def iso_c(factors: Sequence[Factors], options: Options) -> tuple[Tensor, Tensor]:
    """The sum with equal singular values over its rank."""
    down, up = stack_factors(factors)
    u, s, v = decompose(down, up)
    present = int((s > s.max() * 1e-6).sum()) or 1
    flat = s[:present].mean().expand(present)
    return truncate(u[:, :present], flat, v[:present], present, (len(up), *down.shape[1:]))
