"""Which size a picture is trained at: shapes of about the same area and near the picture's own (aspect-ratio buckets).

Sizes are (height, width) in px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from visionlora.errors import ConfigError

Size = tuple[int, int]
LONGEST = 2.0
"""Sides of a bucket are at most this many times the resolution, and at least as small a part of it."""
EDGES = 2.0
"""What is lost at the edges counts so many times what is lost of the area."""


@dataclass(frozen=True)
class Framing:
    """How one picture becomes its training picture: made as small as `resized`, then cut to `bucket`."""

    original: Size
    resized: Size
    bucket: Size
    corner: Size
    """Top and left of the cut, in the resized picture."""

    def conditions(self, corner: Size) -> tuple[int, int, int, int, int, int]:
        """Original size, corner of the cut that was made and size, as SDXL is told (arXiv 2307.01952, section 2.2)."""
        return (*self.original, *corner, *self.bucket)

    def source(self, corner: Size) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in px of the picture, of the cut that has this corner in the resized picture."""
        (height, width), (rh, rw), (h, w), (top, left) = self.original, self.resized, self.bucket, corner
        across, down = width / rw, height / rh
        return left * across, top * down, min((left + w) * across, width), min((top + h) * down, height)

    @property
    def enlarged(self) -> bool:
        """Whether the picture has fewer pixels than its bucket."""
        return self.resized[0] > self.original[0]


def framing(size: Size, bucket: Size) -> Framing:
    """The centre of a picture of a size in a bucket: the side that has less to spare is made to fit, the other is cut."""
    h, w = size
    scale = max(bucket[0] / h, bucket[1] / w)
    resized = (max(bucket[0], round(h * scale)), max(bucket[1], round(w * scale)))
    corner = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    return Framing((h, w), resized, bucket, corner)


def bucket_of(size: Size, resolution: int, step: int, upscale: bool = False) -> Size:
    """The bucket of a picture: the shape that loses least, of the picture at its edges and of the area, among those that

    - have sides that are multiples of `step`, at most twice and at least half the resolution,
    - have at most resolution² pixels, and
    - are no larger than the picture, unless `upscale`.

    A picture that is smaller than every such shape gets the smallest.

    >>> bucket_of((800, 800), 512, 64), bucket_of((1080, 1920), 512, 64), bucket_of((300, 400), 512, 64)
    ((512, 512), (384, 640), (256, 384))

    Args:
        size: of the picture.
        resolution: side of a square of the wanted area.
        step: of the sides; a divisor of the resolution.
        upscale: whether a picture may be enlarged to reach the area.
    """
    h, w = size
    shortest = max(step, int(resolution / LONGEST) // step * step)
    longest = int(resolution * LONGEST) // step * step
    candidates = []
    for bw in range(step, longest + 1, step):
        bh = min(longest, resolution * resolution // bw // step * step)
        if not upscale:
            if bw > max(step, w):
                break
            bh = min(bh, max(step, h // step * step))
        candidates += [(height, bw) for height in range(step, bh + 1, step)]
    regular = [c for c in candidates if min(c) >= shortest] or candidates

    def loss(bucket: Size) -> tuple[float, float]:
        cut = abs(math.log(bucket[1] / bucket[0] * h / w))  # log of the share that is cut away
        return EDGES * cut - math.log(bucket[0] * bucket[1]), cut

    return min(regular, key=loss)


def check_step(step: int, multiple: int, resolution: int) -> None:
    """Raises ConfigError when sides that are multiples of `step` px do not fit a model, or none of them is the resolution.

    Args:
        step: wanted, px.
        multiple: of the model, px.
        resolution: a multiple of it, px.
    """
    fine = [s for s in range(multiple, resolution + 1, multiple) if resolution % s == 0]
    if step in fine:
        return
    nearest = [max([s for s in fine if s < step], default=0), min([s for s in fine if s > step], default=0)]
    raise ConfigError(
        f"bucket_step is {step}; it must be a multiple of {multiple} px for this model, and divide the resolution, "
        f"{resolution} px. Use {' or '.join(str(s) for s in nearest if s)}."
    )


def described(framings: Sequence[tuple[str, Framing]]) -> list[str]:
    """What became of the pictures, in lines for a person; nothing when all have one shape and lose nothing.

    Args:
        framings: each with the name of its picture.
    """
    by_bucket: dict[Size, list[str]] = {}
    for name, f in framings:
        by_bucket.setdefault(f.bucket, []).append(name)
    lines = []
    if len(by_bucket) > 1:
        parts = [
            f"{w}x{h}: {len(names)}" + (f" ({names[0]})" if len(names) == 1 else "")
            for (h, w), names in sorted(by_bucket.items(), key=lambda b: (-len(b[1]), b[0]))
        ]
        lines.append("Sizes, width x height in px: " + ", ".join(parts) + ".")
    cut = [(name, 1 - f.bucket[0] * f.bucket[1] / (f.resized[0] * f.resized[1])) for name, f in framings]
    if much := [(name, share) for name, share in cut if share > 0.1]:
        name, share = max(much, key=lambda c: c[1])
        lines.append(
            f"{len(much)} of {len(cut)} pictures lose more than a tenth at the edges, {name} most ({share:.0%})."
        )
    if small := [name for name, f in framings if f.enlarged]:
        lines.append(f"{len(small)} of {len(cut)} pictures are enlarged, the first {small[0]}.")
    return lines
