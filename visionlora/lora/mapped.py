"""Copies of weights in another dtype without reading the weights themselves.

Weights that safetensors maps from a file take memory page by page as they are read, and give it back only when the whole
file is let go: whoever casts a model holds both copies of it at the end. Here the bytes are read from the file anew, one
weight at a time, so that the mapped ones stay untouched. That is known on Linux; elsewhere, and for weights that are in
memory anyway, it is the cast that it always was.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MAPS = Path("/proc/self/maps")
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S*p ([0-9a-f]+) \S+ \d+ +(/.*)")


class Mappings:
    """The files that are mapped into this process now, privately."""

    def __init__(self) -> None:
        lines = MAPS.read_text().splitlines() if MAPS.is_file() else []
        found = [m.groups() for line in lines if (m := LINE.fullmatch(line)) is not None]
        self.places = sorted(
            (int(start, 16), int(end, 16), int(offset, 16), path) for start, end, offset, path in found
        )

    def file_of(self, tensor: Tensor) -> tuple[str, int] | None:
        """The file that a contiguous CPU tensor lies in, and where; None when it lies in none."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        first = tensor.data_ptr()
        at = bisect_right(self.places, (first, 2**64, 0, "")) - 1
        if at < 0:
            return None
        start, end, offset, path = self.places[at]
        return (path, offset + first - start) if start <= first and first + tensor.nbytes <= end else None

    def copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """As `tensor.to(dtype)`; never a view.

        The tensor must not have been written to since it was mapped: what was written would be missing in the copy. Its ends
        are compared with those of the file.
        """
        if (place := self.file_of(tensor)) is not None:
            path, offset = place
            try:
                raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=offset)
            except OSError:  # deleted since
                raw = np.empty(0, np.uint8)
            if len(raw) == tensor.nbytes:
                again = torch.from_numpy(raw).view(tensor.dtype)
                flat = tensor.flatten()
                if torch.equal(again[:1], flat[:1]) and torch.equal(again[-1:], flat[-1:]):
                    return again.view(tensor.shape).to(dtype)
        return tensor.to(dtype, copy=True)


@torch.no_grad()
def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the floating parameters of a frozen module in place."""
    mappings = Mappings()
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = mappings.copied(parameter.data, dtype)
