"""DoRA: y = m ⊙ (W + s·B·A)x / ‖W + s·B·A‖, the norm of each output row taken as a constant (arXiv 2402.09353, eq. 5).

The norms come from the low-rank identity in `visionlora.lora.functional.sum_row_norms`: no dense B·A is ever built. The
output is written as the base's own plus a change that is zero while B is, so training starts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.functional import sum_row_norms, wide
from visionlora.lora.inits import start
from visionlora.lora.methods.base import Factors, Gain, Method, Site, cpu


class DoRA(Method):
    """Factors and a magnitude of each output feature."""

    kind = "dora"
    bounded_rank = True
    additive = False

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter

    def __init__(
        self, site: Site, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, alpha: float,
        scaling: float | None = None, dropout: float = 0.0, axis: str = "out",
    ) -> None:  # fmt: skip
        super().__init__(site, dropout)
        self.axis = axis
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.shared_norms: Tensor | None = None
        self.alpha, self.scaling = float(alpha), alpha / len(lora_A) if scaling is None else scaling
        self.squares()
        with torch.no_grad():
            self.magnitude = nn.Parameter(self.norms().clone() if magnitude is None else magnitude)

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> DoRA:
        """A by the chosen init, B zero, the magnitude at the norms of W."""
        rank, weight = config.rank_of(site.name), site.weight
        down = start(site, rank, config, generator)
        up = torch.zeros(len(weight), rank, *(1,) * (weight.dim() - 2))
        alpha, scaling = config.alpha_of(site.name), config.scaling_of(site.name)
        return cls(site, down.to(weight.device), up.to(weight.device), None, alpha, scaling, config.dropout)

    @classmethod
    def numbers(cls, site: Site, rank: int, config: AdapterConfig, stored: bool = False) -> int:
        """With the magnitudes."""
        return super().numbers(site, rank, config, stored) + len(site.weight)

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> DoRA:
        """Frozen."""
        device, (down, up) = site.weight.device, module.lora_factors(site.weight.shape)
        magnitude, axis = module.tensors["magnitude"].float().flatten().to(device), module.options.get("axis", "out")
        made = cls(site, down.to(device), up.to(device), magnitude, module.alpha, module.scaling, axis=str(axis))
        made.requires_grad_(False)
        return made

    @property
    def rank(self) -> int:
        """Rank r of the direction's change."""
        return self.lora_A.shape[0]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖W + s·B·A‖ of each output row, (o,), or of each input column, (i,)."""
        if self.axis == "in":
            columns: Tensor = torch.linalg.vector_norm(
                self.direction(self.site.weight).transpose(0, 1).flatten(1), dim=1
            )
            return columns
        weight = wide(self.site.weight)
        factors = self.lora_A.detach().to(weight.dtype), self.lora_B.detach().to(weight.dtype)
        return sum_row_norms(weight, self.squares(), *factors, self.scaling)

    def squares(self) -> Tensor:
        """‖W‖² of each output row, (o,)."""
        return self.of_weight(lambda weight: weight.flatten(1).square().sum(1))

    def begin(self) -> None:
        """Gain and factors of one forward pass share the norms."""
        self.shared_norms = self.norms()

    def end(self) -> None:
        """Parameters may change from here on."""
        self.shared_norms = None

    def ratio(self) -> Tensor:
        """m / ‖W + s·B·A‖, (o,)."""
        norms = self.norms() if self.shared_norms is None else self.shared_norms
        return self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def gain(self) -> Gain | None:
        """m/‖·‖ - 1, on the output without its bias."""
        return None if self.axis == "in" else Gain((self.ratio() - 1) * self.factor, with_bias=False)

    def input_gain(self) -> Tensor | None:
        """m/‖·‖ - 1, on the base's input, when the magnitudes are those of columns."""
        return (self.ratio() - 1) * self.factor if self.axis == "in" else None

    def factors(self) -> list[Factors]:
        """(m/‖·‖ ⊙ B)·A, or B·(A ⊙ m/‖·‖) by columns."""
        if self.axis == "in":
            ratio = self.ratio().view(1, -1, *(1,) * (self.lora_A.dim() - 2))
            return [(self.lora_A * ratio.to(self.lora_A.dtype), self.lora_B, self.times(self.scaling))]
        ratio = self.ratio().view(-1, *(1,) * (self.lora_B.dim() - 1))
        return [(self.lora_A, self.lora_B * ratio.to(self.lora_B.dtype), self.times(self.scaling))]

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """m ⊙ (W + s·B·A)/‖·‖ - W."""
        ratio = self.ratio()
        ratio = (
            ratio.view(1, -1, *(1,) * (weight.dim() - 2))
            if self.axis == "in"
            else ratio.view(-1, *(1,) * (weight.dim() - 1))
        )
        return (self.direction(weight) * ratio - wide(weight)) * self._scale

    @torch.no_grad()
    def direction(self, weight: Tensor) -> Tensor:
        """W + s·B·A, dense."""
        product = wide(self.lora_B).flatten(1) @ wide(self.lora_A).flatten(1) * self.scaling
        return wide(weight) + product.view(weight.shape)

    def export(self) -> AdapterModule:
        """Factors and magnitude."""
        tensors = {"lora_A": cpu(self.lora_A), "lora_B": cpu(self.lora_B), "magnitude": cpu(self.magnitude)}
        options = {} if self.axis == "out" else {"axis": self.axis}
        return AdapterModule("dora", tensors, self.scaling * self.rank, options)
