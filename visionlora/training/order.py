"""Which pictures a step sees and which random numbers it draws: functions of (seed, images seen) alone.

A run that is cut off and goes on, or runs on another number of processes, sees the same pictures and noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generator_at(seed: int, images_seen: int, purpose: str = "noise") -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    >>> a, b = generator_at(1, 64), generator_at(1, 64)
    >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
    True
    """
    mixed = seed * 0x9E3779B97F4A7C15 + images_seen * 0xBF58476D1CE4E5B9 + sum(purpose.encode()) * 0x94D049BB133111EB
    return torch.Generator().manual_seed(mixed % 2**63)


def indices_at(seed: int, images_seen: int, batch: int, dataset: int) -> Tensor:
    """The next `batch` positions, (batch,): the data set is shuffled anew for each pass and never cut short."""
    positions: list[Tensor] = []
    start, wanted = images_seen, batch
    while wanted > 0:
        epoch, offset = divmod(start, dataset)
        order = torch.randperm(dataset, generator=generator_at(seed, epoch, "order"))
        part = order[offset : offset + wanted]
        positions.append(part)
        start, wanted = start + len(part), wanted - len(part)
    return torch.cat(positions)
