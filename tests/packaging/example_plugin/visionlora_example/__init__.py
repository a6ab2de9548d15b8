"""A plug-in for visionlora: a method, an init, a model family and a target preset."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.combine import COMBINATIONS
from visionlora.lora.config import AdapterConfig
from visionlora.lora.families import Family
from visionlora.lora.methods.base import Gain, Method, Site
from visionlora.mixing.compose.base import Composition


class ScaledOutput(Method):
    """One learned factor for the whole output of a layer."""

    kind = "scaled-output"
    additive = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.change = nn.Parameter(torch.zeros(1, device=site.weight.device))

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> ScaledOutput:
        return cls(site)

    def gain(self) -> Gain:
        return Gain(self.change.expand(len(self.site.weight)) * self.factor, with_bias=False)

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        return weight.float() * self.change.item() * self.scale

    def export(self) -> AdapterModule:
        return AdapterModule("scaled-output", {"change": self.change.detach().cpu().clone()}, 1.0)


def ones(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """An init: every value 1."""
    return torch.ones(rank, *site.weight.shape[1:])


TOY = Family("toy", roles={"attn.q": ("toy_q",), "attn.v": ("toy_v",)})
LIGHT = ("toy_v",)


def mean(factors, options) -> tuple[Tensor, Tensor]:
    """A combination: the mean of all ΔW."""
    down, up = COMBINATIONS["sum"](factors, options)
    return down, up / len(factors)


class First(Composition):
    """A composition: the first adapter alone."""

    def weights(self, names, step, steps):
        return {name: float(k == 0) for k, name in enumerate(names)}
