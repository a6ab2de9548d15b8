"""Which pictures a step sees and which random numbers it draws: functions of (seed, images seen) alone.

A run that is cut off and goes on, or runs on another number of processes, sees the same pictures and noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionlora.data.groups import Group


def generator_at(seed: int, images_seen: int, purpose: str = "noise") -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    >>> a, b = generator_at(1, 64), generator_at(1, 64)
    >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
    True
    """
    mixed = seed * 0x9E3779B97F4A7C15 + images_seen * 0xBF58476D1CE4E5B9 + sum(purpose.encode()) * 0x94D049BB133111EB
    return torch.Generator().manual_seed(mixed % 2**63)


def positions_at(seed: int, images_seen: int, batch: int, turn: int, groups: Sequence[Group]) -> Tensor:
    """The next `batch` positions, (batch,), of a data set of several groups.

    Each `turn` pictures are of one group. In a cycle every group has its turns, in an order shuffled anew; from turn to turn
    a group goes on in its own shuffled order, so each of its pictures comes up as often as any other.

    Args:
        seed: of the order.
        images_seen: pictures before these; a multiple of `turn`.
        batch: a multiple of `turn`.
        turn: pictures that share a forward pass, on all processes together.
        groups: of the data set.
    """
    if len(groups) == 1:
        (only,) = groups
        return torch.tensor(only.positions)[indices_at(seed, images_seen, batch, len(only.positions))]
    turns = torch.tensor([group.turns for group in groups])
    every, found = int(turns.sum()), []
    for number in range(images_seen // turn, (images_seen + batch) // turn):
        cycle, place = divmod(number, every)
        order = torch.repeat_interleave(turns)[torch.randperm(every, generator=generator_at(seed, cycle, "turns"))]
        g = int(order[place])
        before = cycle * groups[g].turns + int((order[:place] == g).sum())
        own = groups[g].positions
        within = indices_at(seed, before * turn, turn, len(own), purpose=f"order of {g}")
        found.append(torch.tensor(own)[within])
    return torch.cat(found)


def indices_at(seed: int, images_seen: int, batch: int, dataset: int, purpose: str = "order") -> Tensor:
    """The next `batch` positions, (batch,): the data set is shuffled anew for each pass and never cut short."""
    positions: list[Tensor] = []
    start, wanted = images_seen, batch
    while wanted > 0:
        epoch, offset = divmod(start, dataset)
        order = torch.randperm(dataset, generator=generator_at(seed, epoch, purpose))
        part = order[offset : offset + wanted]
        positions.append(part)
        start, wanted = start + len(part), wanted - len(part)
    return torch.cat(positions)
