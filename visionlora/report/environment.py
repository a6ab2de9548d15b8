"""Versions and hardware of a run, for `run.json`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch

from visionlora import __version__


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Plain values.

    Args:
        packages: whose versions are noted beside torch's.
    """
    return {
        "visionlora": __version__,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
