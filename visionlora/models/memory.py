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


LARGE = 2**22
"""Bytes from which on a block goes back at once. Pages that come anew cost time, and most activations are smaller."""
M_MMAP_THRESHOLD = -3
"""What glibc's malloc.h calls it."""


def free_at_once() -> None:
    """From here on large blocks go back to the system when they are freed, in the whole process.

    glibc keeps those of up to 32 MiB by itself, among small ones that stay: activations come in all sizes, and the gaps that
    they leave add up.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(M_MMAP_THRESHOLD, LARGE)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory left; for the GPUs of Macs torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)
