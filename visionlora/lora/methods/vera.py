"""VeRA: y = Wx + b ⊙ B(d ⊙ A·x) with one frozen random pair A, B for all layers; only the vectors train.

Source: arXiv 2310.11454, eq. 2. The shared pair is a function of the seed and the rank: row j of A is the same for every
width (its first i values are taken), likewise the columns of B, so nothing but the vectors is stored. Convolutions use
the pair of their flattened kernels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.methods.base import Factors, Method, Site, cpu

BLOCK = 256
"""Values drawn at a time, so that a wider layer sees the same values first."""
D_INITIAL = 0.1


@lru_cache(maxsize=64)
def shared_projection(which: str, rank: int, width: int, seed: int) -> Tensor:
    """(rank, width), uniform with the variance of kaiming's init; the first columns do not depend on the width."""
    offset = {"A": 0, "B": 1}[which]
    blocks = []
    for k in range(math.ceil(width / BLOCK)):
        generator = torch.Generator().manual_seed((seed * 2 + offset) * 1_000_003 + k)
        blocks.append(torch.rand(rank, BLOCK, generator=generator) * 2 - 1)
    return torch.cat(blocks, dim=1)[:, :width].contiguous() / math.sqrt(rank if which == "B" else BLOCK)


class VeRA(Method):
    """Two vectors on one site."""

    kind = "vera"

    lambda_b: nn.Parameter
    lambda_d: nn.Parameter
    shared_A: Tensor
    shared_B: Tensor

    def __init__(self, site: Site, lambda_b: Tensor, lambda_d: Tensor, seed: int, dropout: float = 0.0) -> None:
        super().__init__(site, dropout)
        weight = site.weight
        self.lambda_b, self.lambda_d, self.seed = nn.Parameter(lambda_b), nn.Parameter(lambda_d), seed
        rank, width = len(lambda_d), weight[0].numel()
        down, up = shared_projection("A", rank, width, seed), shared_projection("B", rank, len(weight), seed).t()
        spatial = (1,) * (weight.dim() - 2)
        self.register_buffer("shared_A", down.reshape(rank, *weight.shape[1:]).to(weight.device), persistent=False)
        self.register_buffer("shared_B", up.reshape(len(weight), rank, *spatial).to(weight.device), persistent=False)

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> VeRA:
        """b zero, d at 0.1."""
        rank, device = config.rank_of(site.name), site.weight.device
        b, d = torch.zeros(len(site.weight), device=device), torch.full((rank,), D_INITIAL, device=device)
        return cls(site, b, d, config.projection_seed, config.dropout)

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> VeRA:
        """Frozen; the seed of the shared pair is in the file."""
        device = site.weight.device
        b, d = (module.tensors[n].float().to(device) for n in ("lambda_b", "lambda_d"))
        made = cls(site, b, d, int(module.options["projection_seed"]))
        made.requires_grad_(False)
        return made

    def factors(self) -> list[Factors]:
        """(b ⊙ B)·(d ⊙ A)."""
        spatial = (1,) * (self.shared_A.dim() - 1)
        down = self.shared_A * self.lambda_d.view(-1, *spatial)
        return [(down, self.shared_B * self.lambda_b.view(-1, *spatial), self.factor)]

    def export(self) -> AdapterModule:
        """The vectors and the seed of the shared pair."""
        tensors = {"lambda_b": cpu(self.lambda_b), "lambda_d": cpu(self.lambda_d)}
        return AdapterModule("vera", tensors, 1.0, {"projection_seed": self.seed})
