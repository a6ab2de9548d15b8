"""Reads mapped weights from their file, without bringing the weights themselves into memory.

Weights that safetensors maps from a file take memory page by page as they are looked at (Linux brings in 2 MiB at a time of a
file that was just written), and give it back only when the whole file is let go: whoever casts a model holds both copies of
it at the end. Here the bytes are read from the file anew, so that the mapped ones stay untouched. That is known on Linux;
elsewhere, and for weights that are in memory anyway or were written to, they are read as they always were.
"""

from __future__ import annotations

import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PIECE = 2**18
"""Bytes that are read at a time."""
MAPS, PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S*p ([0-9a-f]+) \S+ (\d+) +(/.*)")


class Mappings:
    """The files that are mapped into this process now, privately."""

    def __init__(self) -> None:
        lines = MAPS.read_text().splitlines() if MAPS.is_file() else []
        found = [m.groups() for line in lines if (m := LINE.fullmatch(line)) is not None]
        self.places = sorted(
            (int(start, 16), int(end, 16), int(offset, 16), path, int(inode))
            for start, end, offset, inode, path in found
        )

    def file_of(self, tensor: Tensor) -> tuple[str, int] | None:
        """The file that a contiguous CPU tensor lies in, and where; None when it lies in none, or was written to since."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        first = tensor.data_ptr()
        at = bisect_right(self.places, (first, 2**64, 0, "", 0)) - 1
        if at < 0:
            return None
        start, end, offset, path, inode = self.places[at]
        inside = start <= first and first + tensor.nbytes <= end
        if not inside or not is_file(path, inode) or not as_in_file(first, tensor.nbytes):
            return None
        return path, offset + first - start

    def copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """As `tensor.to(dtype)`; never a view."""
        if (place := self.file_of(tensor)) is not None:
            path, offset = place
            raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=offset)
            if len(raw) == tensor.nbytes:
                return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape).to(dtype)
        return tensor.to(dtype, copy=True)

    def pieces(self, tensor: Tensor) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor in order, a little at a time: threads of glibc's keep what they have once held."""
        if (place := self.file_of(tensor)) is not None:
            path, offset = place
            with Path(path).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size >= offset + tensor.nbytes:
                    for start in range(0, tensor.nbytes, PIECE):
                        yield os.pread(file.fileno(), min(PIECE, tensor.nbytes - start), offset + start)
                    return
        values: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield values.data

    def values(self, tensor: Tensor, index: list[int]) -> Tensor:
        """Some values of a tensor, counted through it in order."""
        if (place := self.file_of(tensor)) is not None:
            path, offset = place
            size = tensor.element_size()
            with Path(path).open("rb", buffering=0) as file:
                raw = b"".join(os.pread(file.fileno(), size, offset + i * size) for i in index)
            if len(raw) == size * len(index):
                return torch.frombuffer(bytearray(raw), dtype=tensor.dtype)
        return tensor.flatten()[torch.tensor(index, device=tensor.device)]


def is_file(path: str, inode: int) -> bool:
    """Whether the file at a path is the one that was mapped; it may have been replaced, or removed, since."""
    try:
        return Path(path).stat().st_ino == inode
    except OSError:
        return False


def as_in_file(first: int, count: int) -> bool:
    """Whether no page of a private mapping was written to: such a page is no longer one of the file, or is swapped out.

    Bits 61 to 63 of an entry of pagemap: of a file, swapped, present (Linux, Documentation/admin-guide/mm/pagemap.rst).

    Args:
        first: address.
        count: bytes.
    """
    start, end = first // mmap.PAGESIZE, (first + count - 1) // mmap.PAGESIZE + 1
    try:
        with PAGES.open("rb", buffering=0) as file:
            entries = np.frombuffer(os.pread(file.fileno(), 8 * (end - start), 8 * start), np.uint64)
    except OSError:
        return False
    present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    return len(entries) == end - start and not bool((swapped | present & ~of_file).any())


@torch.no_grad()
def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the floating parameters of a frozen module in place."""
    mappings = Mappings()
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = mappings.copied(parameter.data, dtype)
