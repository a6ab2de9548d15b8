"""The folder of one run: a free path -> a folder whose files are always whole.

A run folder belongs to one run for ever: a folder that holds anything but the beginning of a run that never had a
config.yaml is refused, so no run overwrites another.
Files are written to a temporary name and renamed, so a killed run leaves the old file or the new one, never a half.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from visionlora.atomic import hold, replace_file, sweep
from visionlora.config.choices import WEIGHT_SUFFIXES
from visionlora.data.files import ASKED_FILE
from visionlora.data.images import IMAGE_SUFFIXES
from visionlora.errors import RunFolderError, WriteError

RUN_FILES = ("run.json", "config.yaml", "adapter.safetensors")
"""Any of these marks a folder as the folder of a run."""
SETTINGS_FILES = (ASKED_FILE, "config.yaml")
"""What a run writes before anything else: its settings as they were given and what was filled in, then these alone."""
BEGINNING = re.compile(r"asked\.yaml|\.(asked|config)\.yaml\.\d+\.tmp")
"""Names of what is left of a run that was cut off before its config.yaml was there; nothing of it is worth keeping."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Get a new one from `open_run_folder`; build it directly to go on with an old one."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """``checkpoints/``, made on first use."""
        return self._subfolder("checkpoints")

    @property
    def samples(self) -> Path:
        """``samples/``, made on first use."""
        return self._subfolder("samples")

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all, and return its path."""
        return write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, obj: Any) -> Path:
        """Write a JSON file whole or not at all, and return its path."""
        return self.write_text(name, _to_json(obj, indent=2) + "\n")

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file whole or not at all, and return its path."""
        return write_atomic(self.path / name, content)

    def write_picture(self, name: str, picture: Image.Image) -> Path:
        """Write a PNG whole or not at all, and return its path."""
        content = io.BytesIO()
        picture.save(content, format="PNG")
        return write_atomic(self.path / name, content.getvalue())

    def append_jsonl(self, name: str, obj: Any) -> None:
        """Add one line of JSON to a file."""
        line = _to_json(obj, indent=None) + "\n"
        try:
            with (self.path / name).open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise _cannot_write(self.path / name, error) from None

    def write_jsonl(self, name: str, objs: Iterable[Any]) -> Path:
        """Write a file with one line of JSON per object, whole or not at all."""
        return self.write_text(name, "".join(_to_json(obj, indent=None) + "\n" for obj in objs))

    def keep_newest(self, count: int | None) -> None:
        """Removes the adapters of moments on the way except the last `count`; None keeps all."""
        if count is not None:
            steps = sorted(self.checkpoints.glob("step-*.safetensors"))
            for path in steps[: max(0, len(steps) - count)]:
                path.unlink(missing_ok=True)

    def _subfolder(self, name: str) -> Path:
        folder = self.path / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from None
        return folder


def check_run_folder(path: Path) -> None:
    """Raise RunFolderError unless a new run could go to ``path``. Changes nothing on disk."""
    try:
        _check(path)
    except OSError as error:
        raise RunFolderError(str(_cannot_write(path, error))) from None


def check_place(path: Path) -> None:
    """Raise RunFolderError unless ``path`` is a folder or could become one. Changes nothing on disk."""
    try:
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"The output {_shown(path)} is a file; name a folder with --output.")
        _check_name(path)
        _check_above(path)
    except OSError as error:
        raise RunFolderError(str(_cannot_write(path, error))) from None


def open_run_folder(path: Path) -> RunFolder:
    """Check ``path`` and make the folder, with its parents.

    Raises:
        RunFolderError: The path is a file, holds more than the beginning of a run, or cannot be written.
    """
    check_run_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder that appeared since the check belongs to another run: only one seen before is taken over.
        path.mkdir(exist_ok=path.is_dir() and all(BEGINNING.fullmatch(entry.name) for entry in path.iterdir()))
    except OSError as error:
        raise _cannot_write(path, error) from None
    sweep(path)
    return RunFolder(path)


def default_run_folder(kind: str, subject: str, place: Path = Path("runs")) -> Path:
    """``runs/<kind>-<subject>-<date>-<time>`` that does not exist yet; makes nothing.

    Args:
        kind: What the run does, such as ``sd``.
        subject: What it learns, such as the name of the picture folder. Characters that are awkward in file names
            become dashes.
        place: Instead of ``runs``.
    """
    words = "-".join(word for word in (_slug(kind), _slug(subject)) if word)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return _free(place / (f"{words}-{stamp}" if words else stamp))


def write_atomic(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    Raises:
        RunFolderError: The file cannot be written; an older file of that name is left as it was.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise _cannot_write(path, error) from None
    return path


def _check(path: Path) -> None:
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir())
        if not all(map(BEGINNING.fullmatch, held)):
            raise _in_use(path, held)
        if held and not hold(path):  # a run that begins right now
            raise taken(path)
    elif path.exists() or path.is_symlink():
        raise RunFolderError(
            f"The output {_shown(path)} is a file, and a run needs a folder of its own. "
            f"Try --output {_shown(_free(path))}."
        )
    _check_name(path)
    _check_above(path)


def _check_name(path: Path) -> None:
    """A folder that is not there yet must not be named like a file."""
    kinds = {**dict.fromkeys(IMAGE_SUFFIXES, "a picture"), **dict.fromkeys(WEIGHT_SUFFIXES, "a file of weights")}
    if (kind := kinds.get(path.suffix.lower())) is not None and not path.is_dir():
        raise RunFolderError(
            f"The output {_shown(path)} is named like {kind}, but would be a folder; name one with --output, such as "
            f"{_shown(path.with_suffix(''))}."
        )


def _check_above(path: Path) -> None:
    """What is there of a path must be a folder in which one may write."""
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise RunFolderError(
            f"The output {_shown(path)} cannot be made because {_shown(above)} is a file. "
            "Choose an --output inside a folder."
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"The output {_shown(path)} cannot be made because {_shown(above)} is not writable. "
            "Choose an --output where you may write, or change the permissions of that folder."
        )


def is_unstarted(folder: Path) -> bool:
    """Whether a run was cut off in it before its first checkpoint, so that nothing in it is worth keeping."""
    if not folder.is_dir():
        return False
    worth = ("run.json", "adapter.safetensors", "checkpoints/state*.pt", "checkpoints/step-*.safetensors")
    if any(True for pattern in worth for _ in folder.glob(pattern)):
        return False
    names = [entry.name for entry in folder.iterdir()]
    return any(name in SETTINGS_FILES for name in names) or bool(names and all(map(BEGINNING.fullmatch, names)))


def taken(path: Path) -> RunFolderError:
    """What to say of a folder that another process holds."""
    return RunFolderError(
        f"Another process is training in {_shown(path)} right now. Wait for it, end it, or choose another --output."
    )


def _in_use(path: Path, held: list[str]) -> RunFolderError:
    if not hold(path):
        return taken(path)
    shown = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
    what = "already holds a run" if any(name in RUN_FILES for name in held) else "is not empty"
    if "run.json" not in held and (path / "checkpoints" / "state.pt").is_file():
        what = "already holds a run that is not finished"
        choice = f"Go on with it: --resume {shlex.quote(str(path))}. Or choose another, such as --output {_shown(_free(path))}."
    elif ASKED_FILE in held and is_unstarted(path):
        what = "already holds a run that was ended before its first checkpoint"
        choice = (
            f"Start it anew: --resume auto --output {shlex.quote(str(path))}. Or choose another, such as --output "
            f"{_shown(_free(path))}."
        )
    else:
        choice = f"Choose another one, such as --output {_shown(_free(path))}, or remove the folder."
    message = f"The output folder {_shown(path)} {what} ({shown}), and a run never overwrites anything. {choice}"
    return RunFolderError(message)


def _cannot_write(path: Path, error: OSError) -> WriteError:
    reason = error.strerror or type(error).__name__
    return WriteError(
        f"{_shown(path)} cannot be written: {reason}. Choose another --output, or free space and permissions there; a run that "
        "had begun goes on with --resume."
    )


def _free(path: Path) -> Path:
    """The path itself, or the first of path-2, path-3, ... that does not exist."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.resolve().name}-{number}")
    return free


def _shown(path: Path) -> str:
    """The path as one writes it in a shell with forward slashes; quoted when it holds spaces."""
    text = path.as_posix()
    return repr(text) if not text or re.search(r"\s", text) else text


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-._")[:40].rstrip("-._")


def _to_json(obj: Any, indent: int | None) -> str:
    """Strict JSON: paths become text, numbers that are not finite become null."""
    return json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False, default=os.fspath)


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    return obj
