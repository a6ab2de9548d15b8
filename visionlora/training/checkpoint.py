"""The state of a run on disk: written whole or not at all, read without running code from the file.

The state before the last one is kept beside it, for a disk that loses what was written.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from visionlora.atomic import replacing
from visionlora.errors import RunFolderError, WriteError

STATE_FILE = "state.pt"
PREVIOUS_FILE = "state-previous.pt"
FORMAT = 1
"""Of the state; a higher one was written by a newer version."""


class Remembering:
    """A file whose first error is kept, also Ctrl-C: torch.save makes a RuntimeError of it."""

    def __init__(self, file: BinaryIO) -> None:
        """Args: `file` is written to."""
        self.file = file
        self.error: BaseException | None = None

    def write(self, content: bytes) -> int:
        """As a file's."""
        try:
            return self.file.write(content)
        except BaseException as e:
            self.error = self.error or e
            raise

    def flush(self) -> None:
        """As a file's."""
        self.file.flush()


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes atomically: a run that is killed meanwhile leaves the state before. That one is kept under another name.

    Raises:
        WriteError: when it cannot be written; the state before is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_name(PREVIOUS_FILE)) as file:
            into = Remembering(file)
            try:
                torch.save({"format": FORMAT, **state}, cast(BinaryIO, into))
            except RuntimeError:
                if into.error is not None:
                    raise into.error from None
                raise
    except OSError as e:
        run = shlex.quote(str(path.parent.parent))
        there = path.exists() or path.with_name(PREVIOUS_FILE).exists()
        raise WriteError(
            f"The checkpoint {path} cannot be written ({e.strerror or e}); "
            + (
                f"the last one is still whole. Free some space and go on with --resume {run}."
                if there
                else f"it is the first one. Free some space and start anew: --resume auto --output {run}."
            )
        ) from None


def go_back(path: Path) -> None:
    """The state before the last takes the place of the last, where there is one."""
    previous = path.with_name(PREVIOUS_FILE)
    if previous.is_file():
        previous.replace(path)


def read_state(path: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A state that `write_state` wrote, on the CPU; where it cannot be read, the one before.

    Args:
        path: of the state.
        say: is told when the one before is taken.

    Raises:
        RunFolderError: when there is none, none can be read, or a newer version wrote it.
    """
    previous = path.with_name(PREVIOUS_FILE)
    if not path.exists() and not previous.exists():
        if any(path.parent.glob("step-*.safetensors")):
            raise RunFolderError(
                f"There is no checkpoint at {path} any more. Put it back, or {learning_on(path.parent)}."
            )
        raise RunFolderError(
            f"There is no checkpoint at {path}: the run was ended before its first one. Start it anew: "
            f"--resume auto --output {shlex.quote(str(path.parent.parent))}."
        )
    if path.exists() and not path.is_file():  # nor could the next one be written there
        kind = "a folder" if path.is_dir() else "no regular file"
        before = " Without it the run goes on with the one before." if previous.is_file() else ""
        raise RunFolderError(f"The checkpoint {path} is {kind}. Move it away, and put the run's own back.{before}")
    found, problem = _load(path)
    if found is None:
        found, _ = _load(previous)
        if found is None:
            raise RunFolderError(
                f"The checkpoint {path} cannot be read ({problem}), nor can one before it. "
                f"{start[0].upper() + start[1:] if (start := learning_on(path.parent)) else 'Start a new run'}."
            )
        say(f"The checkpoint {path} cannot be read ({problem}); going on with the one before.")
    if int(found.get("format", FORMAT)) > FORMAT:
        raise RunFolderError(
            f"The checkpoint {path} was written by a newer version of visionlora. Go on with that version "
            "(pip install -U visionlora), or start a new run."
        )
    return found


def learning_on(folder: Path) -> str:
    """How to learn on from the newest adapter among the checkpoints of a run; empty where there is none."""
    adapters = [*folder.glob("best.safetensors"), *sorted(folder.glob("step-*.safetensors"))]
    return f"start a new run that learns on: start_from={shlex.quote(str(adapters[-1]))}" if adapters else ""


def promote(path: Path) -> None:
    """Gives the state before the name of the last one, which cannot be read, so that no write can lose it."""
    path.with_name(PREVIOUS_FILE).replace(path)


def _load(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The state, or what is wrong with it."""
    if path.exists() and not path.is_file():
        return None, "it is no file"
    try:
        with zipfile.ZipFile(path) as file:  # torch itself does not look at the checksums
            if (part := file.testzip()) is not None:
                return None, f"{part} has other bytes than were written"
        return dict(torch.load(path, map_location="cpu", weights_only=True)), ""
    except FileNotFoundError:
        return None, "it is gone"
    except MemoryError:
        raise
    except Exception as e:  # torch raises many kinds on broken bytes
        return None, type(e).__name__
