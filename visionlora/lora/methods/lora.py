"""LoRA and its close kin: y = Wx + s·B·A·x.

lora       s = alpha/r                        arXiv 2106.09685, eq. 3
rslora     s = alpha/√r                       arXiv 2312.03732, theorem 3.2
lora+      B learns `lr_ratio` times as fast  arXiv 2402.12354; the ratio is applied by `Handle.parameter_groups`
lora-fa    A stays frozen; the gradient of B is multiplied by (A·Aᵀ)⁻¹/s², arXiv 2308.03303, eq. 9
init pissa A and B start at the principal part of W, arXiv 2404.02948. The base is left alone: the branch is
s·(B·A - B₀·A₀), kept as offsets from A₀ and B₀ so that it starts at exactly nothing; the file holds it
as a LoRA of rank 2r that is right on the untouched base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inits import principal_factors, start
from visionlora.lora.methods.base import Factors, Method, Site, cpu


class CorrectedGradient(torch.autograd.Function):
    """B as it is; its gradient times a (r, r) matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lora_B: Tensor, correction: Tensor) -> Tensor:  # noqa: D102
        return lora_B.view_as(lora_B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: D102
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (correction,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, correction.dtype)
        return (grad.flatten(1).to(wide) @ correction.to(wide)).to(grad.dtype).view_as(grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # noqa: D102
        return tangent.view_as(tangent)


class LoRA(Method):
    """The two factors of one adapter on one site."""

    kind = "lora"
    bounded_rank = True

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    correction: Tensor | None
    """(r, r), what the gradient of B is multiplied by; LoRA-FA alone has one."""

    def __init__(
        self, site: Site, lora_A: Tensor, lora_B: Tensor, alpha: float, scaling: float | None = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(site, dropout)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.alpha = float(alpha)
        self.scaling = alpha / len(lora_A) if scaling is None else scaling
        self.register_buffer("correction", None, persistent=False)

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> LoRA:
        """A by the chosen init, B zero. Geometry and device come from the base weight."""
        rank, weight = config.rank_of(site.name), site.weight
        alpha, scaling = config.alpha_of(site.name), config.scaling_of(site.name)
        if config.init == "pissa":
            down, up = principal_factors(weight, rank, scaling)
            return PrincipalLoRA(site, down, up, alpha, scaling, config.dropout)
        down = start(site, rank, config, generator)
        up = torch.zeros(len(weight), rank, *(1,) * (weight.dim() - 2))
        made = cls(site, down.to(weight.device), up.to(weight.device), alpha, scaling, config.dropout)
        if config.method == "lora-fa":
            made.freeze_down()
        return made

    @classmethod
    def numbers(cls, site: Site, rank: int, config: AdapterConfig, stored: bool = False) -> int:
        """Of LoRA-FA, B alone trains; the file of init pissa has both factors twice."""
        if config.method == "lora-fa" and not stored:
            return rank * len(site.weight)
        twice = stored and config.init == "pissa"
        return super().numbers(site, 2 * rank if twice else rank, config, stored)

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> LoRA:
        """Frozen."""
        device, (down, up) = site.weight.device, module.lora_factors()
        made = cls(site, down.to(device), up.to(device), module.alpha, module.scaling)
        made.requires_grad_(False)
        return made

    def learn_on(self, config: AdapterConfig) -> None:
        """Both factors, or B alone."""
        super().learn_on(config)
        if config.method == "lora-fa":
            self.freeze_down()

    def freeze_down(self) -> None:
        """LoRA-FA: A does not train, and the gradient of B is corrected for it, whatever the optimizer."""
        self.lora_A.requires_grad_(False)
        a = self.lora_A.detach().cpu().flatten(1).double()  # Apple's GPUs know no fp64
        inverse = torch.linalg.inv(a @ a.t() + 1e-8 * torch.eye(len(a))) / self.scaling**2
        self.register_buffer("correction", inverse.float().to(self.lora_A.device), persistent=False)

    @property
    def rank(self) -> int:
        """Rank r of ΔW."""
        return self.lora_A.shape[0]

    def factors(self) -> list[Factors]:
        """s·B·A."""
        up = self.lora_B if self.correction is None else CorrectedGradient.apply(self.lora_B, self.correction)
        return [(self.lora_A, up, self.times(self.scaling))]

    def export(self) -> AdapterModule:
        """Both factors; a scaling other than alpha/r (rsLoRA) goes into alpha, so that every reader applies it."""
        return AdapterModule.lora(cpu(self.lora_A), cpu(self.lora_B), self.scaling * self.rank)


class PrincipalLoRA(LoRA):
    """PiSSA on an untouched base: lora_A and lora_B are offsets from the principal factors A₀ and B₀."""

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self, site: Site, start_A: Tensor, start_B: Tensor, alpha: float, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, torch.zeros_like(start_A), torch.zeros_like(start_B), alpha, scaling, dropout)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)

    def factors(self) -> list[Factors]:
        """B·A - B₀·A₀ = dB·(A₀+dA) + B₀·dA: exactly zero while dA and dB are."""
        down = torch.cat([self.start_A + self.lora_A, self.lora_A])
        up = torch.cat([self.lora_B, self.start_B], dim=1)
        return [(down, up, self.times(self.scaling))]

    def export(self) -> AdapterModule:
        """A LoRA of rank 2r."""
        ((down, up, _),) = self.factors()
        return AdapterModule.lora(cpu(down), cpu(up), self.scaling * len(down))
