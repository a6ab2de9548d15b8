"""Pictures that may share a forward pass (they have one size), and how often each lot gets its turn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Some pictures of a data set."""

    positions: tuple[int, ...]
    """Positions in the data set; one that counts several times is there several times."""
    turns: int
    """Forward passes that it gets in a cycle of all groups."""


def grouped(keys: Sequence[Hashable], repeats: Sequence[int], sides: Sequence[Hashable]) -> tuple[Group, ...]:
    """Groups of pictures that have the same key and are on the same side; the sides get equally many turns.

    Within a side each picture comes up as often as it repeats: a group's turns are its pictures times their repeats.

    Args:
        keys: of each picture: only equal ones share a forward pass.
        repeats: how often each picture counts.
        sides: of each picture: the pictures to learn from, and those of the class they belong to.

    >>> grouped(["a", "b", "a", "a"], [1, 1, 2, 1], [0, 0, 0, 1])
    (Group(positions=(0, 2, 2), turns=3), Group(positions=(1,), turns=1), Group(positions=(3,), turns=4))
    """
    lots: dict[tuple[Hashable, Hashable], list[int]] = {}
    for i, (key, count, side) in enumerate(zip(keys, repeats, sides, strict=True)):
        lots.setdefault((side, key), []).extend([i] * count)
    sizes: dict[Hashable, int] = {}
    for (side, _), positions in lots.items():
        sizes[side] = sizes.get(side, 0) + len(positions)
    most = max(sizes.values(), default=0)
    turns = {lot: len(positions) * most // sizes[lot[0]] for lot, positions in lots.items()}
    for side, size in sizes.items():  # the turns that are left go to those that rounding down cost most
        own = [lot for lot in lots if lot[0] == side]
        by_loss = sorted(own, key=lambda lot: -(len(lots[lot]) * most % size))
        for lot in by_loss[: most - sum(turns[lot] for lot in own)]:
            turns[lot] += 1
    return tuple(Group(tuple(positions), turns[lot]) for lot, positions in lots.items())
