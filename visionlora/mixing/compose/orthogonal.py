"""Orthogonalised sum: each adapter loses the output directions that the ones before it use, layer by layer.

ΔW_k ← (I - Q·Qᵀ)·ΔW_k, with Q an orthonormal basis of the columns of all earlier B: afterwards ⟨ΔW_j, ΔW_k⟩ = 0, so what the
first adapter does is left alone. The order of the adapters is their priority; those at scale 0 have none. Of a ΔW as wide as
its layer the directions of 99 % of its energy count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import additive
from visionlora.lora.functional import directions, wide
from visionlora.mixing.compose.base import Composition

NEGLIGIBLE = 1e-5
"""Share of the largest singular value below which a direction counts as unused."""


class Orthogonal(Composition):
    """The sum of adapters of which the later ones keep clear of the earlier ones' output directions."""

    skips_silent: ClassVar[bool] = True

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """Later adapters projected."""
        used: dict[str, Tensor] = {}
        found = {}
        for name, adapter in adapters.items():
            if not scales[name]:
                found[name] = adapter
                continue
            modules = {}
            for layer, m in adapter.modules.items():
                if m.kind == "shift":
                    modules[layer] = m
                    continue
                own = additive(layer, m, "orthogonalised")
                down, up = own.lora_factors()
                columns = wide(up).flatten(1)
                if layer in used:
                    basis = used[layer]
                    columns = columns - basis @ (basis.t() @ columns)
                # Not `rank · scaling`: a structured ΔW has more columns as a LoRA than its own rank says.
                modules[layer] = AdapterModule.lora(down, columns.view(up.shape) * own.scaling, float(len(down)))
                before, wide_ones = used.get(layer), directions(wide(down), columns)
                columns = columns if wide_ones is None else wide_ones[0]
                used[layer] = basis_of(columns if before is None else torch.cat([before, columns], dim=1))
            found[name] = Adapter(modules, adapter.info, adapter.embeddings)
        return found


def basis_of(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, (o, r')."""
    unit = columns / columns.norm(dim=0, keepdim=True).clamp_min(1e-30)
    u, s, _ = torch.linalg.svd(unit, full_matrices=False)
    basis: Tensor = u[:, s > NEGLIGIBLE * s.max().clamp_min(1e-30)]
    return basis
