"""Which pictures look alike: a hash and a thumbnail of each, and what these and other ties link.

In: pictures. Out: for each a perceptual hash and a thumbnail, from which near duplicates are found without comparing
each picture with each other.

Letters in shapes: n pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

THUMBNAIL = 16
"""Side of a thumbnail, px."""
HASH_BITS = 3
"""Near duplicates differ in at most so many of the 64 bits of their perceptual hashes ..."""
THUMBNAIL_DIFFERENCE = 6.0
"""... and, on average, in at most so many of 255 levels of the brightness of their thumbnails, and of the colours beside it:
simple small pictures, such as digits, often share a hash. Colours are compared in blocks of 4 x 4 px, as JPEG keeps fewer of
them than of brightness. And what differs beside the mean level of each colour ..."""
OWN_SPREAD = 0.25
"""... is at most this part of the spread within either of them, plus half a level: pictures of one texture, such as granite,
are all about grey in small, but each has grains of its own."""

_MARGIN = 6  # levels; see perceptual_hash
_TINY = 16  # px; of a picture of a shorter side the hash sees px that JPEG changes by more than the margin
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow and JPEG have it
_LARGE = 8 * THUMBNAIL  # px; what is averaged away above it changes no thumbnail that can be seen
_HASHES_AT_ONCE = 1 << 20  # pairs; each takes some tens of bytes
_THUMBNAILS_AT_ONCE = 1 << 14  # pairs; each takes some thousands of bytes
_MANY = 64  # windows from this on are compared as one product of matrices ...
_ROWS = 128  # ... of so many pictures with all in their windows


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, of which few change when a picture is saved again or made a little smaller: a difference hash.

    A bit says whether the picture, at 9 x 8 px, gets brighter from one px to the next. It must do so by more than 6 of
    255 levels: flat areas would else be left to noise. Tiny pictures are blurred first.

    Args:
        image: an RGB picture.

    >>> perceptual_hash(Image.new("RGB", (20, 10), "red"))
    0
    """
    if min(image.size) < _TINY:
        image = image.filter(ImageFilter.BoxBlur(1))
    grey = np.asarray(_small(image, 9, 8).convert("L"), dtype=np.int16)
    return int(_where_brighter(grey[None])[0])


def thumbnail(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The picture pressed into 16 x 16 px, uint8 (16, 16, 3)."""
    return np.array(_small(image, THUMBNAIL, THUMBNAIL), dtype=np.uint8)


def _small(image: Image.Image, width: int, height: int) -> Image.Image:
    # The gap: large photos are first reduced by a whole factor, at a small part of the cost.
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)


def looks_of(image: Image.Image) -> tuple[int, npt.NDArray[np.uint8]]:
    """The perceptual hash and the thumbnail of an RGB picture; a large one is made smaller once for both."""
    factor = min(image.size) // _LARGE
    small = image.reduce(factor) if factor > 1 else image
    return perceptual_hash(small), thumbnail(small)


def look_alikes(hashes: Sequence[int], thumbnails: Sequence[npt.NDArray[np.uint8]]) -> list[list[int]]:
    """The positions of near duplicates, set by set; pictures that are like no other are in none.

    Args:
        hashes: from `perceptual_hash`, n of them.
        thumbnails: from `thumbnail`, n of them.
    """
    if not hashes:
        return []
    n = len(hashes)
    numbers = linked(np.array(hashes, np.uint64), np.stack(thumbnails), [str(i) for i in range(n)], [None] * n)
    sets: dict[int, list[int]] = {}
    for i, number in enumerate(numbers.tolist()):
        sets.setdefault(number, []).append(i)
    return [members for members in sets.values() if len(members) > 1]


def linked(
    hashes: npt.NDArray[np.uint64],
    thumbnails: npt.NDArray[np.uint8],
    sha256: Sequence[str],
    groups: Sequence[str | None],
    near: bool = True,
    mirrored: bool = False,
) -> npt.NDArray[np.int64]:
    """Numbers the pictures so that those that must stay together have the same number.

    That are files of equal bytes, near duplicates, and members of the same group; and whatever these chain together.

    Args:
        hashes: perceptual hashes, (n,).
        thumbnails: small pictures, (n, 16, 16, 3).
        sha256: of the files.
        groups: names, None for no group.
        near: whether near duplicates count, and not files of equal bytes alone.
        mirrored: whether those that are near duplicates when one of them is mirrored count too.

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
    if not near:
        return forest.numbers()
    for i, j in enumerate(_alike(hashes, thumbnails).tolist()):
        forest.join(i, j)
    if mirrored:
        both = np.concatenate([thumbnails, thumbnails[:, :, ::-1]])
        own, turned = np.split(_alike(_hashes_of(both), both), 2)
        # What is alike as it is was found above, by better hashes.
        like = dict(zip(turned.tolist(), range(n), strict=True))
        for i, number in enumerate(own.tolist()):
            forest.join(i, like.get(number, i))
    return forest.numbers()


def _alike(hashes: npt.NDArray[np.uint64], thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """For each picture the position of one, the same for all that near duplicates chain together."""
    # Equal thumbnails under equal hashes need no comparing: thousands of flat pictures become one.
    n = len(hashes)
    flat = np.concatenate([hashes.astype("<u8").view(np.uint8).reshape(n, 8), thumbnails.reshape(n, 768)], axis=1)
    _, one, which = np.unique(_rows_as_bytes(flat), return_index=True, return_inverse=True)
    found: npt.NDArray[np.int64] = one[_near_duplicates(hashes[one], thumbnails[one])][which]
    return found


def _hashes_of(thumbnails: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Hashes like `perceptual_hash`, of thumbnails (n, 16, 16, 3) alone, so that mirrored ones can be had: 56 bits each."""
    grey = thumbnails.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4, 5), dtype=np.float32)
    return _where_brighter(grey)


def _where_brighter(grey: npt.NDArray[np.int16 | np.float32]) -> npt.NDArray[np.uint64]:
    """A bit for each px of (n, 8, 8 or 9) but the last of its row, set where the next one is brighter by the margin."""
    bits = np.zeros((len(grey), 8, 8), bool)
    bits[:, :, : grey.shape[2] - 1] = np.diff(grey, axis=2) > _MARGIN
    return np.packbits(bits.reshape(-1, 64), axis=1).view(">u8").astype(np.uint64).reshape(-1)


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

    Thumbnails are compared only where hashes are near. Within each hash the pictures are sorted by mean brightness: means
    lie no further apart than levels do on average, so each picture is compared only with a window of the others.
    """
    mean = thumbnails.reshape(len(thumbnails), 256, 3).mean(axis=1, dtype=np.float64) @ _LUMA.astype(np.float64)
    order = np.lexsort((mean, hashes))
    small, mean = _Small(thumbnails[order]), mean[order]
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
    # Within a run pictures and windows are in the order of their means.
    run = np.concatenate([group, len(unique) + np.repeat(np.arange(len(first)), size)])
    many = high - low > _MANY
    forest = _Forest(len(order))
    few = ~many
    for a, b in _pairs(item[few], low[few], high[few], _THUMBNAILS_AT_ONCE):
        small.join(forest, a, b)
    for rows in _cut(run[many], _ROWS):
        for a, b in small.candidates(forest, item[many][rows], low[many][rows], high[many][rows]):
            small.join(forest, a, b)
    result = np.empty_like(order)
    result[order] = order[forest.parent]
    return result


class _Small:
    """Thumbnails, prepared to be compared."""

    def __init__(self, thumbnails: npt.NDArray[np.uint8]) -> None:
        n = len(thumbnails)
        blocks = thumbnails.reshape(n, 4, 4, 4, 4, 3)
        means = blocks.mean(axis=(2, 4), keepdims=True, dtype=np.float32)
        self.colours = (means - (means @ _LUMA)[..., None]).reshape(n, 48)
        """Of blocks, beside their brightness."""
        # The difference of blocks is a lower bound too, at a fraction of the cost.
        self.brightness = (means @ _LUMA).reshape(n, 16)
        # The brightness of each px with the colour of its block.
        levels = (blocks @ _LUMA)[..., None] - (means @ _LUMA)[..., None] + means
        self.mean = means.reshape(n, 16, 3).mean(axis=1)
        """Level of each colour, (n, 3)."""
        self.grain = (levels.reshape(n, 256, 3) - self.mean[:, None]).reshape(n, 768)
        self.square = np.square(self.grain).mean(axis=1)
        self.most = OWN_SPREAD * np.sqrt(self.square) + 0.5
        """How much the grain of another may differ, in root mean square."""

    def join(self, forest: _Forest, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> None:
        """Joins those of the pairs that are near duplicates."""
        # Thousands of copies are soon one set, whose pairs need no comparing.
        new = forest.parent[a] != forest.parent[b]
        a, b = a[new], b[new]
        near = np.abs(self.brightness[a] - self.brightness[b]).mean(axis=1) <= THUMBNAIL_DIFFERENCE + 1e-3  # rounding
        near &= np.abs(self.colours[a] - self.colours[b]).mean(axis=1) <= THUMBNAIL_DIFFERENCE
        a, b = a[near], b[near]
        grain = (self.grain[a] - self.grain[b]).reshape(-1, 256, 3)
        apart = (grain + (self.mean[a] - self.mean[b])[:, None]) @ _LUMA
        near = np.abs(apart).mean(axis=1) <= THUMBNAIL_DIFFERENCE
        near &= np.sqrt(np.square(grain).mean(axis=(1, 2))) <= np.minimum(self.most[a], self.most[b])
        forest.join_all(a[near], b[near])

    def candidates(
        self, forest: _Forest, item: npt.NDArray[np.int64], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Pairs of items and positions from low up to high that may be near duplicates by their grain."""
        first = int(low.min())
        window = slice(first, int(high.max()))
        at = np.arange(window.start, window.stop)
        wanted = (at >= low[:, None]) & (at < high[:, None]) & (forest.parent[item][:, None] != forest.parent[window])
        if not wanted.any():
            return
        apart = self.square[item][:, None] + self.square[window] - self.grain[item] @ self.grain[window].T * (2 / 768)
        most = np.minimum(self.most[item][:, None], self.most[window])
        i, j = np.nonzero(wanted & (apart <= np.square(most) + 0.05))  # rounding
        for part in range(0, len(i), _THUMBNAILS_AT_ONCE):
            piece = slice(part, part + _THUMBNAILS_AT_ONCE)
            yield item[i[piece]], first + j[piece]


def _cut(run: npt.NDArray[np.int64], most: int) -> Iterator[slice]:
    """Slices of equal numbers that lie side by side, of at most so many."""
    ends = [*(np.flatnonzero(np.diff(run)) + 1).tolist(), len(run)]
    start = 0
    for end in ends:
        yield from (slice(at, min(at + most, end)) for at in range(start, end, most))
        start = end


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
