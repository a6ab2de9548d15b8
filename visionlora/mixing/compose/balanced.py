"""Norm-balanced sum: adapters trained elsewhere differ several-fold in ‖ΔW‖; each is brought to their geometric mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from visionlora.formats.inspection import norm_of
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import additive
from visionlora.mixing.compose.base import Composition


class Balanced(Composition):
    """The sum of adapters of equal strength; their scales then say how they relate. Those at scale 0 do not count."""

    skips_silent: ClassVar[bool] = True

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """ΔW of each adapter times one factor."""
        norms = {n: whole_norm(a) if scales[n] else 0.0 for n, a in adapters.items()}
        present = [v for v in norms.values() if v > 0]
        target = math.exp(sum(map(math.log, present)) / len(present)) if present else 1.0
        return {n: scaled(a, target / norms[n] if norms[n] else 1.0) for n, a in adapters.items()}


def whole_norm(adapter: Adapter) -> float:
    """‖ΔW‖ over all layers.

    Raises:
        AdapterFileError: when it depends on the base model.
    """
    weights = {n: m for n, m in adapter.modules.items() if m.kind != "shift"}
    return math.sqrt(sum((norm_of(additive(n, m, "balanced")) or 0.0) ** 2 for n, m in weights.items()))


def scaled(adapter: Adapter, factor: float | Mapping[str, float]) -> Adapter:
    """The adapter with ΔW times a factor, or each module's times its own."""
    modules = {}
    factors = factor if isinstance(factor, Mapping) else dict.fromkeys(adapter.modules, factor)
    for name, m in adapter.modules.items():
        if m.rank:
            modules[name] = AdapterModule(m.kind, m.tensors, m.alpha * factors[name], m.options)
        else:
            first = next(iter(m.tensors))
            modules[name] = AdapterModule(
                m.kind, {**m.tensors, first: m.tensors[first] * factors[name]}, m.alpha, m.options
            )
    return dataclasses.replace(adapter, modules=modules)
