"""How many pictures of a step fit in memory at once: found by looking at what one of them keeps for its backward pass."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from visionlora.lora.packed import keeping_dense, owner_of
from visionlora.training.optimizers import STATE_BYTES

SPARE = 0.8
"""Share of the free memory that may be used; gradients on the way and the allocator's gaps take the rest."""

NO_LIMIT = 2**62
"""Bytes; version 1 of control groups writes a number near 2^63 where there is no limit."""


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
    """Bytes that this process can still have on a device; None where that cannot be told.

    Processes that train together on CPUs of one machine (`LOCAL_WORLD_SIZE` of torchrun) share its memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if sys.platform != "linux":
        return None
    found = [limit for limit in (available(), left_in_group()) if limit is not None]
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that the machine can still give, without swapping."""
    for line in text_of(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def left_in_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process leave it, of a container or a batch system; None without a limit.

    Of either version (the kernel's documentation: admin-guide/cgroup-v1/memory, cgroup-v2). A container often sees its
    own group at the root. Pages of files count as used until others need them, so they are taken off.
    """
    found: list[int] = []
    for line in text_of(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        inside = top / path.lstrip("/")
        for group in [g for g in (inside, *inside.parents) if g == top or top in g.parents]:
            highest, used = text_of(group / limit).strip(), text_of(group / usage).strip()
            if highest.isdigit() and used.isdigit() and int(highest) < NO_LIMIT:
                stat = dict(
                    entry.split(" ", 1) for entry in text_of(group / "memory.stat").splitlines() if " " in entry
                )
                found.append(max(0, int(highest) - int(used) + int(stat.get(cached, 0))))
    return min(found, default=None)


def text_of(path: Path) -> str:
    """Of a file of the kernel's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def bytes_for_steps(parameters: Iterable[nn.Parameter], optimizer: str, averaged: bool) -> int:
    """Bytes that the first step takes for good: gradients, what the optimizer remembers, and a running average.

    Args:
        parameters: what trains.
        optimizer: its word, see `visionlora.training.optimizers`.
        averaged: whether there is a running average.
    """
    return sum(p.numel() * (p.element_size() * (1 + averaged) + STATE_BYTES[optimizer]) for p in parameters)


@dataclass(frozen=True)
class Room:
    """What pictures keep for backward, and the memory that there is for it."""

    per_picture: int
    """Bytes."""
    free: int | None
    """Bytes; None for no limit."""

    @property
    def fitting(self) -> int | None:
        """Pictures that fit at once, 1 or more; None for no limit."""
        return None if self.free is None else max(1, int(SPARE * self.free / max(1, self.per_picture)))


def room_for(
    model: nn.Module, run: Callable[[], Tensor], optimizer: str, averaged: bool, device: torch.device, pictures: int = 1
) -> Room:
    """Looks at a forward pass, with what the first step takes for good taken off what is free.

    Args:
        model: with what trains switched on.
        run: the pass.
        optimizer: its word.
        averaged: whether there is a running average.
        device: where it trains.
        pictures: of the pass.
    """
    kept, free = bytes_kept(model, run) // pictures, free_memory(device)
    trained = (p for p in model.parameters() if p.requires_grad)
    return Room(kept, None if free is None else max(0, free - bytes_for_steps(trained, optimizer, averaged)))


def at_once(together: int, room: Room) -> int:
    """How many of the pictures of a step go through the model at once: as many as fit, and a divisor of them all.

    >>> at_once(12, Room(100, 1000)), at_once(12, Room(100, 10)), at_once(12, Room(100, None))
    (6, 1, 12)
    """
    fitting = room.fitting
    if fitting is None:
        return together
    return max(n for n in range(1, together + 1) if together % n == 0 and n <= fitting)


def peak_memory() -> int:
    """The most that was used so far, in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
