"""How many pictures of a step fit in memory at once: found by looking at what one of them keeps for its backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from visionlora.lora.packed import keeping_dense, owner_of

SPARE = 0.8
"""Share of the free memory that may be used; gradients on the way and the allocator's gaps take the rest."""


def bytes_kept(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, those of parameters not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if owner_of(tensor) is None:  # else it is unpacked again
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with keeping_dense(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def at_once(together: int, per_picture: int, free: int | None) -> int:
    """How many of the pictures of a step go through the model at once: as many as fit, and a divisor of them all.

    Args:
        together: pictures of a step.
        per_picture: bytes that one keeps.
        free: bytes; None for no limit.

    >>> at_once(12, 100, 1000), at_once(12, 100, 10), at_once(12, 100, None)
    (6, 1, 12)
    """
    if free is None:
        return together
    fitting = max(1, int(SPARE * free / max(1, per_picture)))
    return max(n for n in range(1, together + 1) if together % n == 0 and n <= fitting)
