"""The state of a run on disk: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionlora.atomic import replace_file
from visionlora.errors import RunFolderError

STATE_FILE = "state.pt"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes atomically: a run that is killed meanwhile leaves the state before.

    Raises:
        RunFolderError: when it cannot be written; the state before is still there.
    """
    content = io.BytesIO()
    torch.save(dict(state), content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
    except OSError as e:
        raise RunFolderError(
            f"The checkpoint {path} cannot be written ({e.strerror or e}); the last one is still whole. Free some space and "
            "resume."
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """A state that `write_state` wrote, on the CPU.

    Raises:
        RunFolderError: when there is none or it cannot be read.
    """
    if not path.is_file():
        raise RunFolderError(
            f"There is no checkpoint at {path}: the run was ended before its first one. Start it anew."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds on broken bytes
        raise RunFolderError(
            f"The checkpoint {path} cannot be read ({type(e).__name__}). Start the run anew."
        ) from None
    return dict(found)
