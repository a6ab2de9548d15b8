"""The in-memory form of an adapter, between every file format and every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from visionlora.lora.functional import delta_weight


@dataclass(frozen=True)
class AdapterModule:
    """Factors of one layer: lora_A (r, i), lora_B (o, r); for a convolution lora_A (r, i, *k), lora_B (o, r, 1, 1)."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.lora_A.shape[0]

    def delta_weight(self) -> Tensor:
        """ΔW = alpha/rank · B·A in fp32."""
        return delta_weight(self.lora_A, self.lora_B, self.alpha / self.rank)


@dataclass(frozen=True)
class Adapter:
    """One adapter: its modules by component and name (`unet.mid_block…to_q`) and what is known about it."""

    modules: Mapping[str, AdapterModule]
    info: Mapping[str, Any] = field(default_factory=dict)
    """The visionlora header: base id and fingerprints, config, trigger, training summary."""

    def delta_weights(self) -> dict[str, Tensor]:
        """{module name: ΔW in fp32}, each in the shape of its base weight."""
        return {name: module.delta_weight() for name, module in self.modules.items()}

    def component(self, prefix: str) -> dict[str, AdapterModule]:
        """The modules of one component (`unet`, `text_encoder`), without its prefix."""
        start = prefix + "."
        return {name[len(start) :]: m for name, m in self.modules.items() if name.startswith(start)}

    @property
    def components(self) -> list[str]:
        """The components that have modules, sorted."""
        return sorted({name.split(".", 1)[0] for name in self.modules})
