"""Versions and hardware of a run, for `run.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from visionlora import __version__
from visionlora.errors import ConfigError

YEAR_10000 = 253402300800


def began() -> float:
    """When something begins, seconds since 1970: now, or what `SOURCE_DATE_EPOCH` says, for builds that are the same each time.

    Raises:
        ConfigError: where that is no time.
    """
    if not (said := os.environ.get("SOURCE_DATE_EPOCH")):
        return time.time()
    if not said.isascii() or not said.isdigit() or int(said) >= YEAR_10000:
        raise ConfigError(f"SOURCE_DATE_EPOCH is {said!r} here; set it to seconds since 1970, or unset it.")
    return float(said)


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
