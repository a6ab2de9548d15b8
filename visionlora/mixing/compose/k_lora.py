"""K-LoRA, arXiv 2502.18461, eq. 4 to 7: in each layer and step either the content's adapter acts or the style's.

Compared are the sums of the K largest |ΔW|, K being the product of the ranks; the style's is multiplied by
γ·(α·t/T + β), so that content leads early and style late; γ makes up for adapters of different strength.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import additive
from visionlora.mixing.compose.base import Composition, Weights
from visionlora.mixing.scales import is_number, plain


class KLoRA(Composition):
    """Chooses one of two adapters per layer and step; the first is the content, the second the style.

    Any others must be at scale 0; where one of the two is at 0, the other acts in every layer.

    Args:
        alpha: slope of the style's factor over the sampling, 1.5 in the paper.
        beta: the style's factor at the first step, 0.5 in the paper.
    """

    per_step: ClassVar[bool] = True
    skips_silent: ClassVar[bool] = True

    def __init__(self, alpha: float = 1.5, beta: float = 0.5) -> None:
        self.alpha, self.beta = plain(alpha), plain(beta)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not is_number(value):
                raise ConfigError(f"{name} is {value!r}; it must be a finite number.")
        self.sums: dict[str, tuple[float, float]] = {}
        self.gamma = 1.0

    def prepare(self, adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> dict[str, Adapter]:
        """Measures ΔW once.

        Raises:
            ConfigError: when there are fewer than two adapters, or more that are not at scale 0.
        """
        acting = [a for n, a in adapters.items() if scales[n]]
        if len(adapters) < 2 or len(acting) > 2:
            count = f"{len(acting)} that are not at scale 0" if len(acting) > 2 else len(adapters)
            raise ConfigError(f"K-LoRA chooses between two adapters, content and style; there are {count}.")
        self.sums, self.gamma = {}, 1.0
        if len(acting) < 2:
            return dict(adapters)
        content, style = acting
        totals = [0.0, 0.0]
        for name in content.modules.keys() & style.modules.keys():
            if "shift" in (content.modules[name].kind, style.modules[name].kind):
                continue
            pair = [additive(name, a.modules[name], "compared") for a in (content, style)]
            k = max(1, pair[0].rank) * max(1, pair[1].rank)
            sums = []
            for i, m in enumerate(pair):
                largest, total = top_sum(m, k)
                sums.append(largest)
                totals[i] += total
            self.sums[name] = (sums[0], sums[1])
        self.gamma = totals[0] / totals[1] if totals[1] else 1.0
        return dict(adapters)

    def weights(self, names: Sequence[str], step: int, steps: int) -> Weights:
        """1 or 0 per layer; layers that one adapter alone has are its own."""
        if len(names) < 2:
            return {}
        content, style = names
        factor = self.gamma * (self.alpha * step / max(1, steps) + self.beta)
        takes = {name: c >= s * factor for name, (c, s) in self.sums.items()}
        return {
            content: {n: float(t) for n, t in takes.items()},
            style: {n: float(not t) for n, t in takes.items()},
        }


def top_sum(module: AdapterModule, k: int) -> tuple[float, float]:
    """The sum of the k largest |ΔW| and of all."""
    values = module.delta_weight().abs().flatten()
    return float(values.topk(min(k, values.numel())).values.sum()), float(values.sum())
