"""What a run remembers of its steps: in memory, in `metrics.jsonl`, and in the checkpoint from which it goes on."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visionlora.config import TrainingConfig, to_yaml
from visionlora.config.choices import WHOLE
from visionlora.errors import ConfigError, TrainingError
from visionlora.report.listener import Listener
from visionlora.report.resume import LearnedFrom, Start
from visionlora.report.runfolder import RunFolder
from visionlora.report.settings import plain, write_settings
from visionlora.report.trackers import Trackers
from visionlora.training.checkpoint import STATE_FILE, go_back, read_state, write_state
from visionlora.training.loop import MOST_SKIPPED, Fit, NotFinite, Progress, Task, recent_loss
from visionlora.training.noise import noise_lines

TRACKED = ("loss", "learning_rate", "grad_norm", "images_per_second", "noise_scale")
"""What trackers are told of a step; what is not known is left out."""
RUINED = 100
"""So many times the loss that a run began with is no state to learn on from."""


@dataclass
class Logbook:
    """Of one training run."""

    fit: Fit
    run: RunFolder | None
    """Where it is written; None for a process or a baseline that keeps no files."""
    tell: Listener
    data: LearnedFrom
    """What is learned from: a run goes on with the same, or with another by force."""
    config: TrainingConfig
    """The settings with all defaults filled in."""
    start: Start[Any]
    """Where the run began."""
    history: list[Progress] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What was changed by force when the run went on: `step`, and `what` in words."""
    kept: int = 0
    """Step of the last checkpoint."""
    spent: float = 0.0
    """Seconds that the run had taken up to the checkpoint that it went on from."""
    owed: bool = False
    """Whether the step of the last moment was lost, so that the weights have still to be looked at."""

    def __post_init__(self) -> None:
        self.trackers = Trackers(self.fit.accelerator, self.run, self.tell, plain(self.config))

    @property
    def seconds(self) -> float:
        """Of the whole run so far: up to the checkpoint that it went on from, and since it was started again."""
        return self.spent + time.monotonic() - self.start.began

    def measured(self, step: int, **values: float) -> None:
        """Numbers that are not of every step, such as a loss on the validation pictures: told to the trackers alone."""
        self.trackers.log(values, step)

    def due(self, moment: bool) -> bool:
        """Whether to look at the weights after this step: at a moment, or after the first good step since one that was lost.

        After a lost step they may be ruined by the one before.
        """
        self.owed = self.owed or moment
        due = self.owed and not self.fit.skipped
        self.owed = self.owed and not due
        return due

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
        self.trackers.log({k: v for k in TRACKED if (v := getattr(progress, k)) is not None}, progress.step)
        if not math.isfinite(progress.loss):
            self.tell.say(f"Step {progress.step} was skipped: its loss or gradient was not finite.")
        detail = f"loss {recent_loss(self.history):.4f}  {detail}"
        self.tell.progress(what, progress.step, self.fit.config.steps, detail)

    def end(self) -> None:
        """After the last step: ends the trackers and says how noisy the gradient was."""
        self.trackers.close()
        fit = self.fit
        found = None if fit.noise is None else fit.noise.scale()
        if self.run is None or found is None:
            return
        config, averaged = fit.config, fit.ema is not None or fit.averages_itself
        for line in noise_lines(
            found, fit.images_per_step, config.gradient_accumulation, averaged, config.learning_rate
        ):
            self.tell.say(line)

    def stopping(self) -> None:
        """Says that Ctrl-C was heard."""
        self.tell.say("Stopping after this step; once more stops at once.")

    def go_on(self, command: str) -> str:
        """How to go on with a run that was interrupted, and from where when that is not its last step."""
        lost = "" if self.fit.whole else f" from step {self.kept} (the step was cut off)"
        return f"Go on{lost} with: visionlora {command} --resume {shlex.quote(str(self.start.folder))}"

    def go_on_slower(self, command: str) -> str:
        """How to go on with a run whose values became NaN or infinite: at a third of each of its learning rates."""
        rates = {name: value for name, value in plain(self.config).items() if name.endswith("learning_rate") and value}
        words = " ".join(f"{name}={value / 3:.2g}" for name, value in rates.items())
        return f"{self.go_on(command)} --force {words}"

    def is_sound(self, loss: float) -> bool:
        """Whether weights with this loss on the run's first pictures can be learned on from.

        Else the last step that seemed good has ruined them, and they give values that are not finite at any rate.
        """
        before = next((p.loss for p in self.history if math.isfinite(p.loss)), math.inf)
        return math.isfinite(loss) and loss <= RUINED * before

    def check_end(self, task: Task, command: str | None) -> None:
        """After a run whose last step was lost.

        Args:
            task: of the run.
            command: of the run; None of a baseline, which cannot go on.

        Raises:
            TrainingError: when the step before has ruined the weights.
        """
        if not self.is_sound(self.fit.first_loss(task)):
            raise TrainingError(
                "The last step was skipped: its loss or gradient was not finite. "
                + self._after_not_finite(command, None)
            )

    def not_finite(self, error: NotFinite, command: str | None, kept: str | None) -> str:
        """What has ended the run, what is left, and how to go on.

        Args:
            error: that ended it; what usually causes it is left out where it cannot be that.
            command: of the run; None of a baseline, which keeps nothing and cannot go on.
            kept: put after what was kept of the last good step; None where that step had ruined the weights.
        """
        if command is None and self._ever_finite:
            return str(error)
        return f"{error if self._ever_finite else error.event}\n{self._after_not_finite(command, kept)}"

    @property
    def _ever_finite(self) -> bool:
        """Whether any step was good."""
        return any(math.isfinite(p.loss) for p in self.history)

    def _after_not_finite(self, command: str | None, kept: str | None) -> str:
        """The same, without the error."""
        if not self._ever_finite:
            alpha = "" if self.config.method in WHOLE else " the alpha,"
            return (
                "It was so from the first step on, so the learning rate is not the cause, and nothing was learned. Look at the "
                f"precision (in fp16, try --precision bf16),{alpha} the base model and the pictures"
                + ("." if command is None else ", and start a new run.")
            )
        if command is None:
            return "The steps before have ruined the weights."
        if kept is not None:
            return f"All up to the last good step is kept{kept}.\n{self.go_on_slower(command)}"
        path = None if self.run is None else self.run.checkpoints / STATE_FILE
        if path is not None and self.kept > self.fit.step - MOST_SKIPPED:  # written after the step that ruined them
            go_back(path)
            self.kept = int(read_state(path)["fit"]["step"])
        return (
            "The steps before were too large already and have ruined the weights. What was learned up to step "
            f"{self.kept} is kept; should the run end so again at once, start a new one.\n{self.go_on_slower(command)}"
        )

    def checkpoint(self, more: Mapping[str, Any]) -> None:
        """Writes all that the run needs to go on.

        Args:
            more: what the run remembers beside its steps.
        """
        if self.run is None:
            return
        state = {
            "fit": self.fit.state(),
            "history": [dataclasses.asdict(p) for p in self.history],
            "changes": self.changes,
            "settings": plain(self.config),
            "asked": dict(self.start.asked),
            "processes": self.fit.accelerator.num_processes,
            "images_per_step": self.fit.images_per_step,
            "owed": self.owed,
            "run_seconds": self.seconds,
            **self.data.state(),
            **more,
        }
        write_state(self.run.checkpoints / STATE_FILE, state)
        self.kept = self.fit.step

    def another_batch(self, kept: Mapping[str, Any]) -> str:
        """Pictures a step, where another number of processes than that of a checkpoint changes them; empty otherwise."""
        now, images = self.fit.accelerator.num_processes, self.fit.images_per_step
        before, had = (
            int(kept.get("processes", now)),
            int(kept.get("images_per_step", images)),
        )  # older ones have neither
        if before == now or had == images:
            return ""
        return f"pictures a step: {had} on {before} processes -> {images} on {now}"

    def restore(self, kept: Mapping[str, Any]) -> bool:
        """Goes on from a checkpoint.

        Returns:
            Whether something was changed by force: then the next checkpoint should be written at once.

        Raises:
            ConfigError: when the data is not that of the run, and it was not said to go on with other.
        """
        other = self.data.change_since(kept)
        if other and not self.start.force:
            raise ConfigError(
                f"What this run learns from has changed since it was cut off ({other}). Restore it, go on with it by --force, "
                "or start a new run."
            )
        batch = self.another_batch(kept)
        if batch and not self.start.force:
            raise ConfigError(
                f"With another number of processes this run would learn from other batches ({batch}). Start as many as before, "
                "keep the pictures a step by batch_size or gradient_accumulation and --force, or go on so by --force."
            )
        seen = kept["history"][-1]["images_seen"] if kept["history"] else 0  # older checkpoints have it here alone
        if (done := int(kept["fit"]["step"])) > (steps := self.fit.config.steps):
            raise ConfigError(
                f"{done} steps of this run are done already, more than {steps}. Ask for {done} or more, or start a new run."
            )
        self.fit.restore({"images_seen": seen, **kept["fit"]})
        self.kept, self.owed = self.fit.step, bool(kept.get("owed"))
        self.spent = float(kept.get("run_seconds", 0.0))  # older checkpoints do not have it
        self.changes = [dict(change) for change in kept.get("changes", ())]
        what = [*self.start.changes, *filter(None, (other, batch))]
        if what:
            self.changes.append({"step": self.fit.step, "what": what})
            self.tell.say(f"Going on with changes: {'; '.join(what)}.")
        self.history = [Progress(**p) for p in kept["history"]]
        self.tell.say(f"Going on at step {self.fit.step} of {self.fit.config.steps}.")
        if self.run is not None:
            if to_yaml(self.config) != (self.run.path / "config.yaml").read_text(encoding="utf-8"):
                write_settings(self.run, self.start.asked, self.config)
            self.run.write_jsonl("metrics.jsonl", [dataclasses.asdict(p) for p in self.history])
        return bool(what)
