"""Which device a model runs on: a word of the user -> one that torch has here."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from visionlora.errors import ConfigError, ProcessLost, VisionLoRAError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
AUTOMATIC = ("cuda", "xpu", "mps", "cpu")
"""What auto takes, the first that is there: where accelerate trains too."""


def usable_device(word: str | torch.device = AUTO) -> torch.device:
    """A device that is there; auto takes a GPU where there is one: cuda, xpu of Intel, or mps on a Mac.

    Under `accelerate launch` or torchrun a GPU without a number is that of the process, where there are so many.

    Raises:
        ConfigError: when there is no such device.
    """
    import torch  # not above: the command line asks which process it is before anything heavy is loaded

    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    best = next(kind for kind in AUTOMATIC if there[kind])
    if word == AUTO:
        word = best
    given = str(word)
    try:
        device = torch.device(word)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise ConfigError(f"device is {given!r}; it must be auto, cpu, mps, xpu or cuda (cuda:1 for the second).")
    count = there[device.type]
    if not count:
        what = "GPU that torch can use" if device.type == "cuda" else f"{device.type} device that torch can use"
        raise ConfigError(f"device is {given!r}, but there is no {what}. Take {best}.")
    if device.type != "cpu" and device.index is not None and device.index >= count:
        raise ConfigError(f"device is {given!r}, but the last one is {device.type}:{count - 1}.")
    rank = os.environ.get("LOCAL_RANK", "")
    if str(device) in ("cuda", "xpu") and rank.isdigit() and int(rank) < count:
        return torch.device(device.type, int(rank))
    return device


def process_of() -> tuple[int, int]:
    """Which of how many processes of a launch this is, as torchrun and `accelerate launch` say.

    Both say LOCAL_RANK too; without it the others are those of the machine, such as a pod of a cluster, where this process is
    started by hand.
    """
    try:
        rank, processes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except (KeyError, ValueError):
        return 0, 1
    return (
        (rank, processes) if os.environ.get("LOCAL_RANK", "-1") not in ("", "-1") and 0 <= rank < processes else (0, 1)
    )


def leave_launch() -> None:
    """Ends this process at once where it is done and is not the first of its launch.

    In the order of the interpreter its end may meet a thread of gloo that still lets go of the last thing that was exchanged,
    and is aborted; the launcher takes that for a failure and ends the first process, which may still be writing.
    """
    if process_of()[0] and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def process_lost(error: Exception) -> ProcessLost | None:
    """What is said where another process of the launch has ended while this one waited for it; None of other errors."""
    reason = str(error).strip().split("\n")[0].split(". ")[0]
    of_launch = type(error).__name__ in ("DistBackendError", "DistNetworkError") or re.search(
        r"\bgloo/|\[gloo\b", reason
    )
    if process_of()[1] == 1 or isinstance(error, VisionLoRAError) or not of_launch:
        return None
    return ProcessLost(
        "Another process of this launch has ended or does not answer, for a reason that it may have told, and this one cannot "
        "go on without it "
        f"({reason.rstrip('.')})."
    )
