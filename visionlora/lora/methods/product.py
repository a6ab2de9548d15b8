"""LoHa, LoKr and full differences from files: y = Wx + s·ΔW·x with ΔW of a structure of its own, frozen.

They are not trained here. The tensors stay as they are in the file; the factors are made when a layer needs them. See
`visionlora.lora.products` for the shapes and sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.methods.base import Factors, Method, Site
from visionlora.lora.products import factors, product


class Product(Method):
    """ΔW given by tensors of any of the kinds loha, lokr and diff."""

    kind = "product"
    additive = False  # ΔW is often as large as the weight: it is added as it is, not by way of factors

    def __init__(self, site: Site, module: AdapterModule) -> None:
        super().__init__(site)
        self.module = module
        self.names = tuple(module.tensors)
        for name, tensor in module.tensors.items():
            self.register_buffer(name, tensor.to(site.weight.device), persistent=False)

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> Product:
        """Frozen."""
        return cls(site, module)

    def tensors(self) -> dict[str, Tensor]:
        """On the device of the layer."""
        return {name: getattr(self, name) for name in self.names}

    def factors(self) -> list[Factors]:
        """Exact factors in the shape of the layer."""
        down, up = factors(self.module.kind, self.tensors(), self.site.weight.shape)
        return [(down, up, self.times(self.module.scaling))]

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """s·ΔW."""
        return product(self.module.kind, self.tensors()).view(weight.shape) * (self.module.scaling * self._scale)

    def export(self) -> AdapterModule:
        """As it was read."""
        return self.module
