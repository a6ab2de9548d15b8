"""Which pictures train, which choose the best step, and which only test.

In: labelled pictures and what ties them together (equal bytes, near duplicates, a common group). Out: three sides that
share nothing, each class spread over them by the wanted shares.

Letters in shapes: n pictures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from visionlora.data.classes import LabelledData
from visionlora.data.wording import count_of, first_names, problem_report
from visionlora.errors import ConfigError, DataError

HASH_BITS = 3
"""Near duplicates differ in at most so many of the 64 bits of their perceptual hashes ..."""
THUMBNAIL_DIFFERENCE = 6.0
"""... and, on average, in at most so many of 255 levels of their thumbnails: simple small pictures, such as digits,
often share a hash."""

_SIDES = ("train", "val", "test")
_HASHES_AT_ONCE = 1 << 20  # pairs; each takes some tens of bytes
_THUMBNAILS_AT_ONCE = 1 << 14  # pairs; each takes some thousands of bytes
_MAX_PAIRS = 5


@dataclass(frozen=True)
class Splits:
    """Positions in `LabelledData.items`, ascending; no position is in two sides."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    notes: tuple[str, ...]
    """What a person should know, one line each."""


def linked(
    hashes: npt.NDArray[np.uint64],
    thumbnails: npt.NDArray[np.uint8],
    sha256: Sequence[str],
    groups: Sequence[str | None],
) -> npt.NDArray[np.int64]:
    """Numbers the pictures so that those that must stay together have the same number.

    That are files of equal bytes, near duplicates, and members of the same group; and whatever these chain together.

    Args:
        hashes: perceptual hashes, (n,).
        thumbnails: small pictures, (n, 16, 16, 3).
        sha256: of the files.
        groups: names, None for no group.

    Returns:
        Numbers from 0 in order of first appearance, int64 (n,).
    """
    n = len(hashes)
    forest = _Forest(n)
    for keys in (sha256, groups):
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key is not None:
                forest.join(i, first.setdefault(key, i))
    # Equal thumbnails under equal hashes need no comparing: thousands of flat pictures become one.
    flat = np.concatenate([hashes.astype("<u8").view(np.uint8).reshape(n, 8), thumbnails.reshape(n, 768)], axis=1)
    _, one, which = np.unique(_rows_as_bytes(flat), return_index=True, return_inverse=True)
    for i, j in enumerate(one[which]):
        forest.join(i, int(j))
    near = _near_duplicates(hashes[one], thumbnails[one])
    for i, j in enumerate(one[near].tolist()):
        forest.join(int(one[i]), j)
    return forest.numbers()


def split(
    data: LabelledData,
    components: Sequence[int] | npt.NDArray[np.int64],
    val_share: float = 0.15,
    test_share: float = 0.15,
    seed: int = 0,
) -> Splits:
    """Cuts the data into train, val and test, class by class, and keeps what is linked on one side.

    Where no pictures are linked each class has its share on each side, rounded up or down, and at least one picture in
    train; roundings are carried from class to class, so that the sides as a whole have their shares too. Splits that
    the data itself names are kept; a side that it lacks is cut from train. The order of the items does not matter,
    only that of their paths.

    Args:
        data: the pictures.
        components: from `linked`.
        val_share: of the pictures that are to be cut, from 0 to below 1.
        test_share: likewise; both together below 1.
        seed: of the drawing.

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
    for i, side in _drawn(data, pool, [int(c) for c in components], wanted, random.Random(seed)):
        sides[i] = side
    train, val, test = (tuple(i for i, s in enumerate(sides) if s == side) for side in _SIDES)
    notes = _notes(data, sides, shares, named)
    if named:
        notes += _leaks(data, order, sides, [int(c) for c in components])
    return Splits(train, val, test, tuple(notes))


# What is linked.


class _Forest:
    """Union-find: sets of positions that are joined step by step; the root of each is its smallest member."""

    def __init__(self, n: int) -> None:
        self.parent = np.arange(n)

    def find(self, i: int) -> int:
        parent = self.parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    def join(self, i: int, j: int) -> None:
        i, j = self.find(i), self.find(j)
        self.parent[max(i, j)] = min(i, j)

    def join_all(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> None:
        """Joins pairs; each parent must be a root, and is one afterwards."""
        pairs = np.stack([self.parent[a], self.parent[b]], axis=1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            for i, j in np.unique(pairs, axis=0).tolist():
                self.join(i, j)
            self.flatten()

    def flatten(self) -> None:
        """Makes each parent a root."""
        while not np.array_equal(above := self.parent[self.parent], self.parent):
            self.parent = above

    def numbers(self) -> npt.NDArray[np.int64]:
        """Of the sets, by first appearance: the root of a set is its smallest member."""
        self.flatten()
        return np.unique(self.parent, return_inverse=True)[1].astype(np.int64)


def _rows_as_bytes(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Rows as single values, which np.unique sorts much faster than rows; the S kinds would drop final zeros."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)


def _near_duplicates(hashes: npt.NDArray[np.uint64], thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """For each picture one (the same for all that are linked) of its near duplicates, or itself.

    Thumbnails are compared only where hashes are near. Within each hash the pictures are sorted by mean level: means
    lie no further apart than levels do on average, so each picture is compared only with a window of the others.
    """
    pixels = thumbnails.reshape(len(thumbnails), 768)
    mean = pixels.mean(axis=1, dtype=np.float64)
    order = np.lexsort((mean, hashes))
    pixels, mean = pixels[order], mean[order]
    # 4 x 4 blocks: their difference is a lower bound too, at a fraction of the cost.
    blocks = pixels.reshape(-1, 4, 4, 4, 4, 3).mean(axis=(2, 4), dtype=np.float32).reshape(-1, 48)
    unique, start = np.unique(hashes[order], return_index=True)
    stop = np.append(start[1:], len(order))
    group = np.repeat(np.arange(len(unique)), stop - start)

    # One sorted axis for all windows: the hash's number, then the mean; 1024 is more than any two means differ.
    axis = group * 1024.0 + mean
    reach = THUMBNAIL_DIFFERENCE + 1e-3  # rounding
    own = np.arange(len(order))
    first, second = _near_hashes(unique)
    size = (stop - start)[first]
    left = np.repeat(start[first] - np.append(0, np.cumsum(size)[:-1]), size) + np.arange(size.sum())
    centre = np.repeat(second, size) * 1024.0 + mean[left]
    item = np.concatenate([own, left])
    low = np.concatenate([own + 1, np.searchsorted(axis, centre - reach, "left")])
    high = np.concatenate(
        [np.searchsorted(axis, axis + reach, "right"), np.searchsorted(axis, centre + reach, "right")]
    )
    forest = _Forest(len(order))
    for a, b in _pairs(item, low, high, _THUMBNAILS_AT_ONCE):
        roots = forest.parent  # thousands of copies are soon one set, whose pairs need no comparing
        new = roots[a] != roots[b]
        a, b = a[new], b[new]
        near = np.abs(blocks[a] - blocks[b]).mean(axis=1) <= reach
        a, b = a[near], b[near]
        near = np.abs(pixels[a].astype(np.int16) - pixels[b]).mean(axis=1) <= THUMBNAIL_DIFFERENCE
        forest.join_all(a[near], b[near])
    result = np.empty_like(order)
    result[order] = order[forest.parent]
    return result


def _near_hashes(hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of positions of different hashes that differ in at most `HASH_BITS` bits.

    Of four words of 16 bits at least one is equal in such a pair, so only hashes that share a word are compared.
    """
    found = [np.zeros((0, 2), np.int64)]
    for word in range(4):
        words = (hashes >> np.uint64(16 * word)) & np.uint64(0xFFFF)
        order = np.argsort(words, kind="stable")
        stop = np.searchsorted(words[order], words[order], "right")
        for a, b in _pairs(np.arange(len(order)), np.arange(len(order)) + 1, stop, _HASHES_AT_ONCE):
            i, j = order[a], order[b]
            near = np.bitwise_count(hashes[i] ^ hashes[j]) <= HASH_BITS
            found.append(np.stack([i[near], j[near]], axis=1))
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _pairs(
    item: npt.NDArray[np.int64], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64], most: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Each item with each position from low up to, not including, high; about `most` pairs at a time."""
    size = np.maximum(high - low, 0)
    some = size > 0
    item, low, size = item[some], low[some], size[some]
    ends = np.cumsum(size)
    at = 0
    while at < len(item):
        done = ends[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, done + most, "right")))
        part = size[at:stop]
        offset = np.arange(part.sum()) - np.repeat(np.cumsum(part) - part, part)
        yield np.repeat(item[at:stop], part), np.repeat(low[at:stop], part) + offset
        at = stop


# Who goes where.


def _drawn(
    data: LabelledData, pool: Sequence[int], components: Sequence[int], shares: dict[str, float], rng: random.Random
) -> Iterator[tuple[int, str]]:
    """Each position of the pool and its side.

    Components are placed from the largest to the smallest, each on a side that still needs all of it, drawn by how
    much the side needs; where no side does, on the one that it overfills least.
    """
    bundles: dict[int, list[int]] = {}
    for i in pool:
        bundles.setdefault(components[i], []).append(i)
    members = list(bundles.values())
    contents = [Counter(c for i in bundle for c in _strata(data, i)) for bundle in members]
    totals: Counter[int] = Counter()
    for content in contents:
        totals.update(content)
    need = _targets(totals, shares)
    draw = [rng.random() for _ in members]
    order = sorted(range(len(members)), key=lambda k: (-len(members[k]), min(totals[c] for c in contents[k]), draw[k]))
    side_of: dict[int, str] = {}

    def place(k: int, side: str) -> None:
        side_of[k] = side
        for c, count in contents[k].items():
            need[side][c] -= count

    def overfill(k: int, side: str) -> int:
        return sum(max(0, count - max(0, need[side][c])) for c, count in contents[k].items())

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
        fitting = [side for side in need if not overfill(k, side)]
        if fitting:
            weights = [sum(need[side][c] for c in contents[k]) for side in fitting]
            at = rng.random() * sum(weights)
            while len(fitting) > 1 and at >= weights[0]:
                at -= weights.pop(0)
                fitting.pop(0)
            place(k, fitting[0])
        else:
            place(k, min(need, key=lambda side: overfill(k, side)))
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
    bundles: dict[int, list[int]] = {}
    for i in order:
        bundles.setdefault(components[i], []).append(i)
    pairs = []
    for bundle in bundles.values():
        first = min(bundle, key=lambda i: _SIDES.index(sides[i]))
        pairs += [(first, i) for i in bundle if sides[i] != sides[first]]
    if pairs:
        shown = [
            f"{first_names([data.name_of(i)])} ({sides[i]}) and {first_names([data.name_of(j)])} ({sides[j]})"
            for i, j in pairs[:_MAX_PAIRS]
        ]
        more = f" and {len(pairs) - _MAX_PAIRS:,} more" if len(pairs) > _MAX_PAIRS else ""
        yield (
            f"{count_of(len(pairs), 'picture is', 'pictures are')} linked with one of another split (near duplicates, or "
            f"the same group), so that scores may be too good: {', '.join(shown)}{more}"
        )
