"""Layers that carry adapters.

A layer is adapted in place: its class is replaced by a subclass that also runs the adapters, so the module, its
weight and their names stay the same objects, and giving the class back restores the model exactly.
Letters in shapes: b batch, n tokens, i in, o out, r rank, *s spatial sizes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.functional import delta_weight


class LoRA(nn.Module):
    """The two factors of one adapter on one layer; `scale` multiplies alpha/rank and may change at any time."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, lora_A: Tensor, lora_B: Tensor, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.alpha, self.dropout, self.scale = float(alpha), float(dropout), 1.0

    @classmethod
    def new(cls, base: nn.Linear | nn.Conv2d, config: AdapterConfig, generator: torch.Generator) -> LoRA:
        """Factors for one base layer: A random, B zero. Geometry and device come from the base weight."""
        weight = base.weight
        down = torch.empty(config.rank, *weight.shape[1:], dtype=torch.float32)
        if config.init == "gaussian":
            down.normal_(std=1 / config.rank, generator=generator)
        else:  # U(-1/√i, 1/√i), what kaiming_uniform with a=√5 gives
            bound = 1 / math.sqrt(down[0].numel())
            down.uniform_(-bound, bound, generator=generator)
        up = torch.zeros(weight.shape[0], config.rank, *(1,) * (weight.dim() - 2))
        return cls(down.to(weight.device), up.to(weight.device), config.effective_alpha, config.dropout)

    @property
    def rank(self) -> int:
        """Rank r of ΔW."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """Scale · alpha / rank."""
        return self.scale * self.alpha / self.rank

    def delta_weight(self) -> Tensor:
        """ΔW in fp32 at the present scale."""
        return delta_weight(self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def add_to(self, out: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        """`out` + ΔW applied to `x`, in the dtype of `out`: (b, n, o), or (b, o, *s) for a convolution."""
        x = F.dropout(x, self.dropout, self.training)
        lora_A, lora_B = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        x = x.to(out.dtype)
        if isinstance(base, nn.Linear):
            up = F.linear(x, lora_A).flatten(0, -2)
            return torch.addmm(out.flatten(0, -2), up, lora_B.t(), alpha=self.scaling).view_as(out)
        conv = cast(Any, base)
        # Groups share A: repeating it gives every group its own r channels, which is the grouped ΔW exactly.
        down = conv._conv_forward(x, lora_A.repeat(conv.groups, *(1,) * (lora_A.dim() - 1)), None)
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return out + self.scaling * convolve(down, lora_B, groups=conv.groups)


class AdaptedLayer(nn.Module):
    """Mixed into the class of an adapted layer. Adapters with scale 0 are not run: the output is the base's own."""

    adapters: nn.ModuleDict
    merged: bool

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus every adapter's."""
        out: Tensor = super().forward(x)
        if not self.merged:
            for adapter in self.adapters.values():
                if cast(LoRA, adapter).scale != 0:
                    out = cast(LoRA, adapter).add_to(out, x, self)
        return out


ADAPTED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that runs adapters; one per class, so that compiled code is shared."""
    if base not in ADAPTED_CLASSES:
        body = {"__module__": base.__module__, "base_class": base}
        ADAPTED_CLASSES[base] = type(f"Adapted{base.__name__}", (AdaptedLayer, base), body)
    return ADAPTED_CLASSES[base]


def adapt(module: nn.Module, name: str, adapter: LoRA) -> None:
    """Adds one adapter to a layer under `name`.

    Raises:
        ConfigError: when the layer already has an adapter of that name.
    """
    if not isinstance(module, AdaptedLayer):
        module.__class__ = adapted_class(type(module))
        module.adapters, module.merged = nn.ModuleDict(), False  # type: ignore[assignment]
    layer = cast(AdaptedLayer, module)
    if name in layer.adapters:
        raise ConfigError(f"An adapter named {name!r} is there already: eject it first or choose another name.")
    layer.adapters[name] = adapter.train(module.training)


def release(module: nn.Module, name: str) -> None:
    """Takes one adapter off a layer; with the last one the layer becomes the plain base layer again."""
    layer = cast(AdaptedLayer, module)
    del layer.adapters[name]
    if not layer.adapters:
        del layer.adapters, layer.merged
        module.__class__ = module.base_class  # type: ignore[assignment]
