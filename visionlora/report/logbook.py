"""What a run remembers of its steps: in memory, in `metrics.jsonl`, and in the checkpoint from which it goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visionlora.errors import ConfigError
from visionlora.report.listener import Listener
from visionlora.report.runfolder import RunFolder
from visionlora.training.checkpoint import STATE_FILE, write_state
from visionlora.training.loop import Fit, Progress, recent_loss


@dataclass
class Logbook:
    """Of one training run."""

    fit: Fit
    run: RunFolder | None
    """Where it is written; None for a process or a baseline that keeps no files."""
    tell: Listener
    data: str
    """Tells the data apart: a run goes on with the same alone."""
    what: str = "The pictures"
    """What the data is, for the message when it has changed."""
    history: list[Progress] = field(default_factory=list)

    def add(self, progress: Progress, what: str, detail: str) -> None:
        """One step: kept, written and told.

        Args:
            progress: the state after it.
            what: is trained.
            detail: told after the loss.
        """
        self.history.append(progress)
        if self.run is not None:
            self.run.append_jsonl("metrics.jsonl", dataclasses.asdict(progress))
        if not math.isfinite(progress.loss):
            self.tell.say(f"Step {progress.step} was skipped: its loss or gradient was not finite.")
        detail = f"loss {recent_loss(self.history):.4f}  {detail}"
        self.tell.progress(what, progress.step, self.fit.config.steps, detail)

    def checkpoint(self, more: Mapping[str, Any]) -> None:
        """Writes all that the run needs to go on.

        Args:
            more: what the run remembers beside its steps.
        """
        if self.run is None:
            return
        history = [dataclasses.asdict(p) for p in self.history]
        state = {"fit": self.fit.state(), "history": history, "data": self.data, **more}
        write_state(self.run.checkpoints / STATE_FILE, state)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ConfigError: when the data is not that of the run.
        """
        if kept["data"] != self.data:
            raise ConfigError(
                f"{self.what} have changed since this run was cut off, so it cannot go on with them. Restore them, or start a "
                "new run."
            )
        self.fit.restore(kept["fit"])
        self.history = [Progress(**p) for p in kept["history"]]
        self.tell.say(f"Going on at step {self.fit.step} of {self.fit.config.steps}.")
        if self.run is not None:
            self.run.write_jsonl("metrics.jsonl", [dataclasses.asdict(p) for p in self.history])
