"""Norm-balanced sum: adapters trained elsewhere differ several-fold in ‖ΔW‖; each is brought to their geometric mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from visionlora.formats.inspection import norm_of
from visionlora.lora.adapter import Adapter
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
    """The adapter with ΔW times a factor, or each module's times its own.

    Raises:
        AdapterFileError: for modules whose ΔW depends on the base model, of which no factor of a tensor is one of ΔW.
    """
    modules = dict(adapter.modules)
    factors = factor if isinstance(factor, Mapping) else dict.fromkeys(modules, factor)
    for name, m in adapter.modules.items():
        if factors[name] == 1:
            continue
        if m.kind != "shift":
            additive(name, m, "scaled")
        if m.rank:
            modules[name] = dataclasses.replace(m, alpha=m.alpha * factors[name])
        else:
            first = next(iter(m.tensors))
            modules[name] = dataclasses.replace(m, tensors={**m.tensors, first: m.tensors[first] * factors[name]})
    return dataclasses.replace(adapter, modules=modules)
