"""Numbers of a run to TensorBoard, Weights & Biases or trackio, by accelerate; nothing happens where none is configured."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionlora.errors import ConfigError
from visionlora.report.listener import Listener
from visionlora.report.runfolder import RunFolder

PROJECT = "visionlora"


@dataclasses.dataclass
class Trackers:
    """Those that an accelerator was told of (`visionlora.training.loop.new_accelerator`); they start with the first number."""

    accelerator: Any
    run: RunFolder | None
    """None for a process or a baseline that logs nothing."""
    tell: Listener
    settings: Mapping[str, Any]
    """Of the run, shown beside its curves."""
    started: bool = False
    ended: bool = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers to the curves; a tracker that fails on the way is told of once and left alone: the run goes on.

        Args:
            values: by name of the curve.
            step: of the run.

        Raises:
            ConfigError: when a tracker cannot be started.
        """
        if self.run is None or self.ended or not self.accelerator.log_with:
            return
        if not self.started:
            self.start(self.run.path, step)
        try:
            self.accelerator.log(dict(values), step=step)
        except Exception as e:  # of any service or disk
            self.tell.say(f"The trackers failed ({type(e).__name__}: {e}); the run goes on with metrics.jsonl alone.")
            self.ended = True

    def start(self, folder: Path, step: int) -> None:
        """Starts them; a run that goes on goes on in its own curves.

        Raises:
            ConfigError: when one cannot be started.
        """
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        os.environ.setdefault("TRACKIO_DIR", str(logs.resolve() / "trackio"))  # it has no argument for it
        common = {"name": folder.resolve().name, "config": dict(self.settings), "resume": "allow"}
        own: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step},  # what a run wrote after its last checkpoint comes again
            "trackio": common,
        }
        if "wandb" in map(str, self.accelerator.log_with):
            own["wandb"] = {**common, "dir": str(logs), "id": run_id(logs)}
        try:
            self.accelerator.init_trackers(PROJECT, init_kwargs=own)
        except Exception as e:
            names = ", ".join(str(word) for word in self.accelerator.log_with)
            raise ConfigError(
                f"Of the trackers {names}, one cannot be started ({type(e).__name__}: {e}). Leave trackers out; for wandb log "
                "in first (wandb login), or stay offline (WANDB_MODE=offline)."
            ) from None
        self.started = True

    def close(self) -> None:
        """Ends them, so that the next run of this process has its own."""
        if self.started:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers.clear()
        self.started, self.ended = False, True


def run_id(logs: Path) -> str:
    """A name for the run that no other has, kept in its folder."""
    file = logs / "run-id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
