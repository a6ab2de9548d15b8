"""Memory that models take: what they no longer need, and whether there was enough."""

from __future__ import annotations

import ctypes
import sys

import torch


def give_back() -> None:
    """Returns freed memory to the system. glibc keeps much of it: after the VAE has encoded pictures, hundreds of MiB."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left; for the GPUs of Macs torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)
