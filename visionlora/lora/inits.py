"""How the factor A starts; B starts at zero unless an init says otherwise, so that training starts as the identity.

One function each, in one registry: (site, rank, config, generator) -> lora_A in the shape of a down factor, fp32, CPU.
Letters in shapes: r rank, i in (of one group), *k kernel sizes, f = i·k features of one output position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visionlora import plugins
from visionlora.errors import ConfigError
from visionlora.lora.config import PLUGIN_GROUPS

if TYPE_CHECKING:
    from visionlora.lora.config import AdapterConfig
    from visionlora.lora.methods.base import Site

Init = Callable[["Site", int, "AdapterConfig", torch.Generator], Tensor]


def kaiming(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """U(-1/√f, 1/√f): what kaiming_uniform with a = √5 gives; the default of loralib and PEFT."""
    down = torch.empty(rank, *site.weight.shape[1:])
    bound = 1 / math.sqrt(down[0].numel())
    return down.uniform_(-bound, bound, generator=generator)


def gaussian(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """N(0, 1/r²): the default of diffusers' training scripts."""
    return torch.empty(rank, *site.weight.shape[1:]).normal_(std=1 / rank, generator=generator)


def orthogonal(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """Rows of an orthonormal basis that all adapters share (Orthogonal Adaptation, arXiv 2312.02432, section 4.2).

    The basis depends on the width alone: a discrete cosine transform with random signs and order. Adapter number
    `config.basis_index` takes the rows after those of the numbers before it, so adapters trained apart with different
    numbers (and the same rank) start in subspaces at right angles, and stay there when A is frozen (`lora-fa`).
    Scaled so that A·x has the variance that the kaiming init gives it.

    Raises:
        ConfigError: when the basis has fewer rows than the number asks for.
    """
    width = site.weight[0].numel()
    first = config.basis_index * rank
    if first + rank > width:
        raise ConfigError(
            f"basis_index {config.basis_index} at rank {rank} needs {first + rank} orthogonal directions, but layer "
            f"{site.name!r} has inputs of width {width}: the largest basis_index is {width // rank - 1}."
        )
    shared = torch.Generator().manual_seed(width)
    order = torch.randperm(width, generator=shared)
    signs = torch.randint(2, (width,), generator=shared).double() * 2 - 1
    frequency = order[first : first + rank, None].double()
    position = torch.arange(width, dtype=torch.float64)
    rows = torch.cos(math.pi * frequency * (2 * position + 1) / (2 * width)) * math.sqrt(2 / width)
    rows = torch.where(frequency == 0, rows / math.sqrt(2), rows) * signs
    return (rows / math.sqrt(3)).float().reshape(rank, *site.weight.shape[1:])


def eva(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """The top right-singular vectors of the layer's inputs (EVA, arXiv 2410.07170, section 3).

    Raises:
        ConfigError: when the inputs of this layer were not measured with `visionlora.lora.rank.input_spectra`.
    """
    found = (config.spectra or {}).get(site.name)
    if found is None:
        raise ConfigError(
            f"init 'eva' needs the inputs of layer {site.name!r}: measure them on some batches with "
            "`spectra = vl.input_spectra(model, config, run)` and pass AdapterConfig(..., spectra=spectra)."
        )
    directions = found[:rank]
    if len(directions) < rank:
        raise ConfigError(
            f"init 'eva' has {len(directions)} directions for layer {site.name!r} but its rank is {rank}: "
            "measure on more inputs or lower the rank."
        )
    return directions.float().reshape(rank, *site.weight.shape[1:]).clone()


INITS: dict[str, Init] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal, "eva": eva}
"""By name. `pissa` is not here: it starts both factors, from the base weight (`visionlora.lora.methods.lora`)."""


def start(site: Site, rank: int, config: AdapterConfig, generator: torch.Generator) -> Tensor:
    """lora_A by the init of the configuration, ours or a plug-in's.

    Raises:
        ConfigError: when a plug-in's init cannot be imported, or gives another shape.
    """
    init: Init | None = INITS.get(config.init) or plugins.load(PLUGIN_GROUPS["init"], config.init)
    if init is None:
        raise ConfigError(
            f"Init {config.init!r} comes from a plug-in that cannot be imported: see `visionlora plugins`."
        )
    down, wanted = init(site, rank, config, generator), (rank, *site.weight.shape[1:])
    if tuple(down.shape) != wanted:
        raise ConfigError(
            f"Init {config.init!r} gave lora_A of shape {tuple(down.shape)} for {site.name!r}, not {wanted}."
        )
    return down


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The top singular triplets of W split evenly: scaling · B₀·A₀ is its best rank-r part (PiSSA, arXiv 2404.02948)."""
    u, s, v = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    down = (root[:, None] * v[:rank]).reshape(rank, *weight.shape[1:])
    up = (u[:, :rank] * root).reshape(len(weight), rank, *(1,) * (weight.dim() - 2))
    return down.contiguous(), up.contiguous()
