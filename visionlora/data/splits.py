"""Which pictures train, which choose the best step, and which only test.

In: labelled pictures and what ties them together (see `visionlora.data.alike`). Out: three sides that share nothing,
each class spread over them by the wanted shares.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from visionlora.data.images import printable
from visionlora.data.labelled import LabelledData
from visionlora.data.wording import count_of, first_names, problem_report
from visionlora.errors import ConfigError, DataError

_SIDES = ("train", "val", "test")
_MAX_PAIRS = 5


@dataclass(frozen=True)
class Splits:
    """Positions in `LabelledData.items`, ascending; no position is in two sides."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    notes: tuple[str, ...]
    """What a person should know, one line each."""


def split(
    data: LabelledData,
    components: Sequence[int] | npt.NDArray[np.int64],
    val_share: float = 0.15,
    test_share: float = 0.15,
    seed: int = 0,
    barred: Mapping[str, Collection[int]] | None = None,
) -> Splits:
    """Cuts the data into train, val and test, class by class, and keeps what is linked on one side.

    Where no pictures are linked each class has its share on each side, rounded up or down, and at least one picture in
    train; roundings are carried from class to class, so that the sides as a whole have their shares too. Splits that
    the data itself names are kept; a side that it lacks is cut from train. The order of the items does not matter,
    only that of their paths.

    Args:
        data: the pictures.
        components: from `alike.linked`.
        val_share: of the pictures that are to be cut, from 0 to below 1.
        test_share: likewise; both together below 1.
        seed: of the drawing.
        barred: by side (val, test), positions of pictures that cannot judge there, because what learns now has learned from
            them before; with what is linked to them they go where they can. Splits that the data names are kept all the
            same, and a note says how many are among them.

    Raises:
        ConfigError: for a share out of range.
        DataError: when the data itself has a class in val or test that is not in train.
    """
    shares = {"val": val_share, "test": test_share}
    for side, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{side}_share is {share:g}; it must be at least 0 and below 1, e.g. 0.15.")
    if not val_share + test_share < 1:
        raise ConfigError(
            f"val_share and test_share are {val_share:g} and {test_share:g}, which leaves nothing to train on; "
            "together they must be below 1."
        )
    sides = [item.split or "train" for item in data.items]
    named = [side for side in _SIDES if side in {item.split for item in data.items}]
    if named:
        _check_named(data, sides)
    wanted = {side: share for side, share in shares.items() if side not in named}
    order = sorted(range(len(sides)), key=lambda i: data.items[i].path.as_posix())
    pool = [i for i in order if sides[i] == "train"]
    barred = barred or {}
    for i, side in _drawn(data, pool, [int(c) for c in components], wanted, random.Random(seed), barred):
        sides[i] = side
    train, val, test = (tuple(i for i, s in enumerate(sides) if s == side) for side in _SIDES)
    notes = _notes(data, sides, shares, named)
    if named:
        notes += _leaks(data, order, sides, [int(c) for c in components])
        for side in named:
            if count := sum(sides[i] == side for i in barred.get(side, ())):
                notes.append(
                    f"{count_of(count, 'picture', 'pictures')} of {side} had a part in an earlier training, so that scores may "
                    "be too good"
                )
    return Splits(train, val, test, tuple(notes))


# Who goes where.


def _drawn(
    data: LabelledData, pool: Sequence[int], components: Sequence[int], shares: dict[str, float], rng: random.Random,
    barred: Mapping[str, Collection[int]],
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Each position of the pool and its side.

    Components are placed from the largest to the smallest, each on a side that still needs all of it, drawn by how
    much the side needs; where no side does, on the one that it overfills least. Those that may not be everywhere come first.
    """
    members = _bundles(pool, components)
    contents = [Counter(c for i in bundle for c in _strata(data, i)) for bundle in members]
    totals: Counter[int] = Counter()
    for content in contents:
        totals.update(content)
    need = _targets(totals, shares)
    draw = [rng.random() for _ in members]
    kept_off = {side: set(barred.get(side, ())) for side in need}
    allowed = [[side for side in need if kept_off[side].isdisjoint(bundle)] for bundle in members]
    order = sorted(
        range(len(members)),
        key=lambda k: (len(allowed[k]), -len(members[k]), min(totals[c] for c in contents[k]), draw[k]),
    )
    side_of: dict[int, str] = {}

    def place(k: int, side: str) -> None:
        side_of[k] = side
        for c, count in contents[k].items():
            need[side][c] -= count

    def overfill(k: int, side: str) -> int:
        return sum(max(0, count - max(0, need[side][c])) for c, count in contents[k].items())

    for k in order:
        if allowed[k] == ["train"] != [*need]:
            place(k, "train")
    # Train first gets one of each class, of the rarest first: they have the fewest places to be.
    holders: dict[int, list[int]] = {c: [] for c in totals}
    for k in sorted(order, key=draw.__getitem__):
        for c in contents[k]:
            holders[c].append(k)
    for c in sorted((c for c in totals if c >= 0), key=lambda c: (totals[c], c)):
        if not any(side_of.get(k) == "train" for k in holders[c]):
            place(min(holders[c], key=lambda k: (overfill(k, "train"), draw[k])), "train")
    for k in order:
        if k in side_of:
            continue
        fitting = [side for side in allowed[k] if not overfill(k, side)]
        if fitting:
            weights = [sum(need[side][c] for c in contents[k]) for side in fitting]
            at = rng.random() * sum(weights)
            while len(fitting) > 1 and at >= weights[0]:
                at -= weights.pop(0)
                fitting.pop(0)
            place(k, fitting[0])
        else:
            place(k, min(allowed[k], key=lambda side: overfill(k, side)))
    for k, side in side_of.items():
        yield from ((i, side) for i in members[k])


def _strata(data: LabelledData, i: int) -> tuple[int, ...]:
    """The classes of a picture; with several labels also -1, which stands for all pictures, so that sides keep size."""
    labels = data.items[i].labels
    return (*labels, -1) if data.multi_label else labels


def _targets(totals: Counter[int], shares: dict[str, float]) -> dict[str, dict[int, int]]:
    """How many pictures of each class each side should have: largest remainders, what is rounded off being carried on."""
    parts = {"train": 1 - sum(shares.values()), **{side: share for side, share in shares.items() if share}}
    need: dict[str, dict[int, int]] = {side: {} for side in parts}
    carry = dict.fromkeys(parts, 0.0)
    for c in sorted(totals):
        quota = {side: part * totals[c] for side, part in parts.items()}
        # A share that comes to a whole number is one, whatever floating point makes of it.
        floor = {side: int(q + 1e-9) for side, q in quota.items()}
        left = totals[c] - sum(floor.values())
        rest = {side: max(0.0, quota[side] - floor[side]) for side in parts}
        owed = {side: carry[side] + rest[side] for side in parts} if c >= 0 else rest
        # Only a side with a remainder is rounded up.
        ranked = sorted((side for side in parts if rest[side] > 1e-9), key=lambda side: -owed[side])
        if floor["train"] == 0 and "train" in ranked:
            ranked.insert(0, ranked.pop(ranked.index("train")))
        up = set(ranked[:left])
        for side in parts:
            need[side][c] = floor[side] + (side in up)
            if c >= 0:
                carry[side] = owed[side] - (side in up)
    return need


# What to say about it.


def _check_named(data: LabelledData, sides: Sequence[str]) -> None:
    if any(item.split is None for item in data.items):
        raise ValueError("split: either all items name a split, or none.")
    held = Counter((c, side) for item, side in zip(data.items, sides, strict=True) for c in item.labels)
    problems = []
    for c, name in enumerate(data.classes):
        where = [f"{held[c, side]} in {side}" for side in ("val", "test") if held[c, side]]
        if where and not held[c, "train"]:
            problems.append(
                f"class {first_names([name])} is not in train ({' and '.join(where)}); move some of its pictures there"
            )
    if problems:
        raise DataError(problem_report(data.root, problems, "Fix this first: what is not in train cannot be learned."))


def _notes(data: LabelledData, sides: Sequence[str], shares: dict[str, float], named: Sequence[str]) -> list[str]:
    notes = []
    if named:
        cut = [side for side in ("val", "test") if side not in named and shares[side]]
        notes.append(
            f"the data names its splits {', '.join(named)}; they are kept"
            + (f", and {' and '.join(cut)} cut from train" if cut else "")
        )
    for side in ("val", "test"):
        present = [item for item, s in zip(data.items, sides, strict=True) if s == side]
        held = {c for item in present for c in item.labels}
        lacking = [name for c, name in enumerate(data.classes) if c not in held]
        if not present:
            if side in named or shares[side]:
                notes.append(f"{side} is empty: there are too few pictures that can be taken from train")
        elif lacking:
            notes.append(
                f"{side} has no picture of {count_of(len(lacking), 'class', 'classes')}: {first_names(lacking)}"
            )
    return notes


def _leaks(data: LabelledData, order: Sequence[int], sides: Sequence[str], components: Sequence[int]) -> Iterator[str]:
    """A note on pictures that are linked across the sides that the data names."""
    pairs = []
    for bundle in _bundles(order, components):
        first = min(bundle, key=lambda i: _SIDES.index(sides[i]))
        pairs += [(first, i) for i in bundle if sides[i] != sides[first]]
    if pairs:
        yield (
            f"{count_of(len(pairs), 'picture is', 'pictures are')} linked with one of another split (near duplicates, or "
            f"the same group), so that scores may be too good: {_first_pairs(data, pairs, sides)}"
        )


def of_two_classes(data: LabelledData, alike: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
    """A note on pictures that look alike and have different classes, if there are any: one of the labels may be wrong.

    Args:
        data: the pictures; with several labels each, frames of one film may well differ, and nothing is said.
        alike: from `alike.linked`, of what looks alike as it is: a mirrored arrow is another arrow.
    """
    if data.multi_label:
        return []
    order = sorted(range(len(data.items)), key=lambda i: data.items[i].path.as_posix())
    class_of = [data.classes[item.labels[0]] for item in data.items]
    pairs = [
        (bundle[0], i)
        for bundle in _bundles(order, [int(c) for c in alike])
        for i in bundle
        if class_of[i] != class_of[bundle[0]]
    ]
    if not pairs:
        return []
    return [
        f"{count_of(len(pairs), 'picture looks', 'pictures look')} like one of another class, so that one of the labels may be "
        f"wrong: {_first_pairs(data, pairs, class_of)}"
    ]


def _bundles(order: Sequence[int], components: Sequence[int]) -> list[list[int]]:
    """The positions of each component, in this order."""
    bundles: dict[int, list[int]] = {}
    for i in order:
        bundles.setdefault(components[i], []).append(i)
    return list(bundles.values())


def _first_pairs(data: LabelledData, pairs: Sequence[tuple[int, int]], told: Sequence[str]) -> str:
    """The first pairs of positions, each with what is told of it in brackets."""
    shown = [
        " and ".join(f"{first_names([data.name_of(i)])} ({printable(told[i])})" for i in pair)
        for pair in pairs[:_MAX_PAIRS]
    ]
    more = f" and {len(pairs) - _MAX_PAIRS:,} more" if len(pairs) > _MAX_PAIRS else ""
    return ", ".join(shown) + more
