"""How much adapters get into each other's way, told from their factors alone.

Letters in shapes: o out features, n inputs, r rank.
Per layer and pair:
    outputs   mean cos² of the principal angles between the column spaces of B: 1 when both write to the same directions
    inputs    the same for the row spaces of A: 1 when both react to the same directions
    cosine    ⟨ΔW_1, ΔW_2⟩ / (‖ΔW_1‖·‖ΔW_2‖): above 0 they push the same way, below 0 against each other
    shared    the part of ‖ΔW_2‖² that lies in the output directions of the first, and the other way round: their mean
All by QR of the factors and products of r x r matrices; of a ΔW as wide as its layer, which has all directions if ever so
little, the spaces are those of 99 % of its energy. Principal angles: Björck and Golub, 1973.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule, in_one_spelling
from visionlora.lora.arithmetic import additive
from visionlora.lora.functional import directions

STRONGER = 2.0
"""Ratio of ‖ΔW‖ from which one adapter drowns the other in a plain sum."""
MUCH, SOME = 0.5, 0.2
"""Shares of energy in common output directions from which advice changes."""
KEEP_BOTH = "compose=orthogonal at about 0.5 each, or switch or composite at about 0.7 each"
"""What left most of the less seen style, on the mean of the pairs of benchmarks/mixing.py; a plain sum and `balanced` lost it
in two of three. Nothing that is measured here tells which of these pairs lose it, or which composition suits one best."""


@dataclass(frozen=True)
class LayerOverlap:
    """One layer that both adapters change."""

    name: str
    outputs: float
    inputs: float
    cosine: float
    shared: float
    first_norm: float
    second_norm: float

    @property
    def weight(self) -> float:
        """How much it counts in means."""
        return self.first_norm * self.second_norm


@dataclass(frozen=True)
class PairOverlap:
    """Two adapters."""

    first: str
    second: str
    layers: tuple[LayerOverlap, ...]
    first_norm: float
    """‖ΔW‖ over all layers of the adapter, also those that the other has not."""
    second_norm: float

    def mean(self, what: str) -> float:
        """The mean of a column over the common layers, by how strong both are there; 0 where they have none."""
        total = sum(layer.weight for layer in self.layers)
        return sum(getattr(layer, what) * layer.weight for layer in self.layers) / total if total else 0.0

    @property
    def interference(self) -> float:
        """Predicted share of what both do together that neither does alone: |2⟨ΔW_1, ΔW_2⟩| over the energy of both."""
        cross = abs(sum(2 * layer.cosine * layer.weight for layer in self.layers))
        energy = self.first_norm**2 + self.second_norm**2
        return cross / energy if energy else 0.0

    @property
    def advice(self) -> str:
        """Which composition to try first, and with which scales."""
        parts = []
        strong, weak = (self.first, self.second) if self.first_norm >= self.second_norm else (self.second, self.first)
        low, high = sorted((self.first_norm, self.second_norm))
        if low > 0 and high / low > STRONGER:
            parts.append(
                f"{strong} is {high / low:.1f} times as strong as {weak}: compose=balanced, or {strong} at {low / high:.2f}"
            )
        shared = self.mean("shared")
        if shared > SOME:
            where = "write to the same directions" if shared > MUCH else "share some directions"
            parts.append(f"they {where}, and in a plain sum one may drown the other: {KEEP_BOTH}")
        else:
            parts.append("they hardly meet: a plain sum will do")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        means = {what: self.mean(what) for what in ("outputs", "inputs", "cosine", "shared")}
        return {**asdict(self), **means, "interference": self.interference, "advice": self.advice}


def overlap(adapters: Mapping[str, Adapter], progress: Callable[[int, int], None] | None = None) -> list[PairOverlap]:
    """Every pair of adapters.

    Args:
        adapters: by name, at least two; of kinds whose ΔW does not depend on the base.
        progress: called with (pairs done, pairs).

    Raises:
        ConfigError: when there are fewer than two.
        AdapterFileError: for kinds whose ΔW depends on the base model.
    """
    if len(adapters) < 2:
        raise ConfigError("Overlap is between adapters: give at least two.")
    adapters = dict(zip(adapters, in_one_spelling(list(adapters.values())), strict=True))
    pairs, found = list(combinations(adapters, 2)), []
    factors = {
        name: {layer: factors_of(layer, m) for layer, m in adapter.modules.items() if m.kind != "shift"}
        for name, adapter in adapters.items()
    }
    norms = {name: math.sqrt(sum(energy(*f) for f in own.values())) for name, own in factors.items()}
    for done, (one, two) in enumerate(pairs, 1):
        common = [layer for layer in factors[one] if layer in factors[two]]
        layers = tuple(layer_overlap(layer, factors[one][layer], factors[two][layer]) for layer in common)
        found.append(PairOverlap(one, two, layers, norms[one], norms[two]))
        if progress is not None:
            progress(done, len(pairs))
    return found


def factors_of(name: str, module: AdapterModule) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (o, r) in fp64, the scaling in B."""
    own = additive(name, module, "compared")
    down, up = own.lora_factors()
    return down.double().flatten(1), up.double().flatten(1) * own.scaling


def energy(down: Tensor, up: Tensor) -> float:
    """‖B·A‖²."""
    return max(0.0, float(((down @ down.t()) * (up.t() @ up)).sum()))


def layer_overlap(name: str, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> LayerOverlap:
    """One layer.

    Raises:
        ConfigError: when the adapters' layers differ in size.
    """
    (a1, b1), (a2, b2) = first, second
    if a1.shape[1] != a2.shape[1] or len(b1) != len(b2):
        raise ConfigError(f"The adapters change {name} of different sizes: they were made for different base models.")
    norms = [math.sqrt(energy(a, b)) for a, b in (first, second)]
    inner = float(((a1 @ a2.t()) * (b1.t() @ b2)).sum())
    if min(norms) == 0:
        return LayerOverlap(name, 0.0, 0.0, 0.0, 0.0, *norms)
    (q1, p1), (q2, p2) = (directions(a, b) or (basis(b), basis(a.t())) for a, b in (first, second))
    in_first, in_second = energy(a2, q1.t() @ b2) / norms[1] ** 2, energy(a1, q2.t() @ b1) / norms[0] ** 2
    outputs, inputs = angles(q1, q2), angles(p1, p2)
    return LayerOverlap(name, outputs, inputs, inner / (norms[0] * norms[1]), (in_first + in_second) / 2, *norms)


def basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns that matter."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    kept: Tensor = u[:, s > s.max().clamp_min(1e-300) * 1e-7]
    return kept


def angles(one: Tensor, two: Tensor) -> float:
    """Mean cos² of the principal angles between two spaces, given by orthonormal bases."""
    cosines = torch.linalg.svdvals(one.t() @ two)
    return float(cosines.square().clamp(max=1).mean()) if len(cosines) else 0.0
