"""(IA)³: a learned factor on each output feature, or on each input feature of the layer that closes an MLP.

Source: arXiv 2205.05638, section 3.3. Sites of role `mlp.out` get the factor on their input, all others on their output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.functional import wide
from visionlora.lora.methods.base import Gain, Method, Site, cpu


class IA3(Method):
    """One vector on one site."""

    kind = "ia3"
    additive = False

    factor_vector: nn.Parameter

    def __init__(self, site: Site, vector: Tensor, on_input: bool, relative: bool = False, bias: bool = True) -> None:
        super().__init__(site)
        self.factor_vector, self.on_input = nn.Parameter(vector), on_input
        self.relative, self.with_bias = relative, bias

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> IA3:
        """All ones."""
        on_input = site.role == "mlp.out"
        width = site.inputs if on_input else len(site.weight)
        return cls(site, torch.ones(width, device=site.weight.device), on_input)

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> IA3:
        """Frozen."""
        vector = module.tensors["vector"].float().flatten().to(site.weight.device)
        options = {n: bool(module.options[n]) for n in ("on_input", "relative", "bias") if n in module.options}
        made = cls(site, vector, **options)
        made.requires_grad_(False)
        return made

    def change(self) -> Tensor:
        """l - 1."""
        return self.factor_vector if self.relative else self.factor_vector - 1

    def gain(self) -> Gain | None:
        """l - 1 on the output with its bias."""
        return None if self.on_input else Gain(self.change() * self.factor, with_bias=self.with_bias)

    def input_gain(self) -> Tensor | None:
        """l - 1 on the base's input."""
        return self.change() * self.factor if self.on_input else None

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """(l - 1) ⊙ W, over rows or over columns."""
        change = wide(self.change()) * self._scale
        if not self.on_input:
            return wide(weight) * change.view(-1, *(1,) * (weight.dim() - 1))
        groups = self.site.inputs // weight.shape[1]
        of_group = change.view(groups, weight.shape[1]).repeat_interleave(len(weight) // groups, dim=0)
        return wide(weight) * of_group.view(*of_group.shape, *(1,) * (weight.dim() - 2))

    @torch.no_grad()
    def delta_bias(self, bias: Tensor) -> tuple[Tensor] | None:
        """(l - 1) ⊙ bias when the factor is on the output."""
        if self.on_input or not self.with_bias:
            return None
        return (wide(self.change()) * self._scale * wide(bias),)

    def export(self) -> AdapterModule:
        """The vector and where it acts."""
        options: dict[str, object] = {"on_input": self.on_input}
        if self.relative:
            options |= {"relative": True, "bias": self.with_bias}
        if (spatial := self.site.weight.dim() - 2) > 0:
            options["spatial"] = spatial
        return AdapterModule("ia3", {"vector": cpu(self.factor_vector)}, 1.0, options)
