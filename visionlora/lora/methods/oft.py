"""OFT and BOFT from files: W' = R·W with R orthogonal, built of small blocks; frozen, as a ΔW on the given base.

Sources: OFT, arXiv 2306.07280; BOFT, arXiv 2311.06243; the layout of the blocks is that of LyCORIS' and sd-scripts' files.
    oft_blocks (n, b, b)      Q = oft_blocks - oft_blocksᵀ, R = (I + Q)(I - Q)⁻¹ by blocks, W'[block] = Rᵀ·W[block]
    oft_blocks (m, n, b, b)   m such factors, the i-th over features that lie 2ⁱ·b/2 apart, W' = R_m … R_1·W
    rescale (o, 1, ...)       multiplies W' where present
`constraint` (alpha in the files) times o bounds the norm of Q; 0 does not bound it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.methods.base import Factors, Method, Site
from visionlora.lora.products import factors


class OFT(Method):
    """A rotation of the output features of one site."""

    kind = "oft"
    additive = False

    def __init__(self, site: Site, module: AdapterModule) -> None:
        super().__init__(site)
        self.module = module
        self.change()

    def change(self) -> Tensor:
        """R·W - W in fp32."""
        return self.of_weight(self.turned)

    def turned(self, weight: Tensor) -> Tensor:
        """R·W - W of a weight."""
        tensors = {n: t.to(weight.device) for n, t in self.module.tensors.items()}
        return rotated(weight, tensors, float(self.module.options.get("constraint", 0))) - weight

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> OFT:
        """Frozen."""
        return cls(site, module)

    def factors(self) -> list[Factors]:
        """ΔW beside an identity."""
        return [(*factors("diff", {"diff": self.change()}), self.factor)]

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """R·W - W."""
        return self.change() * self._scale

    def export(self) -> AdapterModule:
        """As it was read."""
        return self.module


@torch.no_grad()
def rotated(weight: Tensor, tensors: Mapping[str, Tensor], constraint: float) -> Tensor:
    """W', in the dtype of the weight and on its device; computed in fp64, as R is an inverse, and there are GPUs without it."""
    blocks = tensors["oft_blocks"].cpu().double()
    skew = blocks - blocks.transpose(-1, -2)
    bound, norm = constraint * len(weight), skew.norm()
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    unit = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rotation = torch.linalg.solve(unit - skew, unit + skew, left=False)
    out = weight.cpu().double()
    if blocks.dim() == 3:
        out = torch.einsum("knm,kn...->km...", rotation, out.unflatten(0, blocks.shape[:2])).flatten(0, 1)
    else:
        for i, factor in enumerate(rotation):
            apart = 2**i * (blocks.shape[-1] // 2)
            mixed = out.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
            mixed = torch.einsum("kij,kj...->ki...", factor, mixed.unflatten(0, (-1, blocks.shape[-1])))
            out = mixed.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in tensors:
        out = out * tensors["rescale"].cpu().double().view(-1, *(1,) * (weight.dim() - 1))
    return out.to(weight.dtype).to(weight.device)
