"""The training stage of train-sd: steps, and what is looked at, drawn and kept on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionlora.config import TrainSDConfig
from visionlora.diffusion.task import DenoisingTask
from visionlora.diffusion.validation import AT_ONCE, Evaluation, Validation
from visionlora.errors import ProcessLost, TrainingError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.models.evaluation import in_one_pass
from visionlora.report.environment import began
from visionlora.report.listener import Listener
from visionlora.report.logbook import Logbook
from visionlora.report.resume import LearnedFrom, Start
from visionlora.report.runfolder import RunFolder
from visionlora.report.samples import SampleSheet, sample_moments
from visionlora.training.interrupts import Interrupts
from visionlora.training.learner import JointLearner
from visionlora.training.loop import Fit, NotFinite, Progress, StopTraining
from visionlora.training.settings import loop_config


@dataclass
class Fitting:
    """The training stage: metrics after each step, samples and checkpoints now and then, nothing lost on Ctrl-C."""

    config: TrainSDConfig
    learner: JointLearner
    export: Callable[[], Adapter]
    """The adapter as it is now, with nothing said about itself."""
    accelerator: Any
    run: RunFolder
    sheet: SampleSheet
    tell: Listener
    header: Callable[[int], dict[str, Any]]
    """From a step to what the adapter file says about itself."""
    public: Callable[[int, float], dict[str, str]]
    """From a step, and when the run began, to what other programs show of the file."""
    data: LearnedFrom
    """The pictures and captions."""
    start: Start[TrainSDConfig]
    """Where the run began."""
    validation: Validation | None = None
    """Pictures that are not trained on."""
    ranks: Mapping[str, Any] = field(default_factory=dict)
    """The ranks that were chosen, for the checkpoint."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """On the validation pictures."""
    started: float = field(default_factory=began)
    """When the run began, seconds since 1970; in reproducible builds what they say."""

    def __post_init__(self) -> None:
        self.fit = Fit(self.accelerator, self.learner, loop_config(self.config), self.config.ema_decay)
        self.log = Logbook(self.fit, self.run if self.main else None, self.tell, self.data, self.config, self.start)

    @property
    def main(self) -> bool:
        """Whether this process draws and writes."""
        return bool(self.accelerator.is_main_process)

    def write(self, step: int, path: Path) -> Adapter:
        """Writes the adapter as it is now, with all that a file says, and returns it."""
        adapter = dataclasses.replace(self.export(), info=self.header(step))
        native.write(adapter, path, self.public(step, self.started))
        return adapter

    def keep_adapter(self, step: int) -> Path:
        """Writes the adapter as it is now beside the others of the run."""
        path = self.run.checkpoints / f"step-{step:06d}.safetensors"
        with self.fit.averaged():
            self.write(step, path)
        self.run.keep_newest(self.config.keep_checkpoints)
        return path

    def checkpoint(self) -> None:
        """Writes all that the run needs to go on."""
        self.log.checkpoint(
            {
                "evaluations": [dataclasses.asdict(e) for e in self.evaluations],
                "columns": [label for label, _ in self.sheet.columns],
                "sheet": self.sheet.key,
                "started": self.started,
                **self.ranks,
            }
        )

    def keep(self) -> str:
        """Writes adapter and checkpoint on the way, and returns where the adapter is, to be put after other words."""
        file = self.keep_adapter(self.fit.step)
        self.checkpoint()
        return f"; the adapter so far is in {file}" if file.is_file() else ""

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ConfigError: when the pictures or captions are not those of the run, and it was not said to go on with others.
        """
        changed = self.log.restore(kept)
        self.evaluations = [Evaluation(**e) for e in kept["evaluations"]]
        self.started = float(kept["started"])
        if self.main and kept.get("sheet", self.sheet.key) == self.sheet.key:  # else its columns are drawn anew
            self.sheet.read_columns([str(label) for label in kept["columns"]])
        if changed:
            self.checkpoint()

    def evaluate(self, step: int) -> None:
        """Looks at the validation pictures; the best adapter so far is kept beside the last. All processes see the same."""
        if self.validation is None:
            return
        with self.fit.averaged():
            at_once = in_one_pass(self.fit.config.batch_size, AT_ONCE)
            found = self.validation.evaluate(self.learner.model, step, at_once, self.accelerator)
            best = not self.evaluations or found.loss < min(e.loss for e in self.evaluations)
            self.evaluations.append(found)
            self.log.measured(step, validation_loss=found.loss)
            if self.main:
                self.run.write_jsonl("validation.jsonl", [dataclasses.asdict(e) for e in self.evaluations])
                if best:
                    self.write(step, self.run.checkpoints / "best.safetensors")

    @property
    def enough(self) -> bool:
        """Whether patience is at its end."""
        if self.config.patience is None or not self.evaluations:
            return False
        best = min(self.evaluations, key=lambda e: e.loss)
        return sum(e.step > best.step for e in self.evaluations) >= self.config.patience

    def train(self, task: DenoisingTask) -> list[Progress]:
        """Runs the loop; returns the state after each step."""
        steps = self.fit.config.steps
        drawn, saved = (set(sample_moments(steps, n)) for n in (self.config.sample_columns, self.config.checkpoints))
        kept = drawn or (saved if self.config.keep_checkpoints else set())
        if self.main and drawn and not self.sheet.columns:
            self.sheet.draw_column("base", scale=0.0)
        if not self.evaluations:
            self.evaluate(0)
        if not self.log.history:
            self.checkpoint()

        def on_step(progress: Progress) -> None:
            sound, due = not self.fit.skipped, self.log.due(progress.step in saved)
            if due:
                self.evaluate(progress.step)
            self.log.add(progress, "Training", f"{progress.images_per_second:.1f} images/s")
            if progress.step in kept and self.main and sound:
                self.keep_adapter(progress.step)
            if progress.step in drawn and self.main:
                with self.fit.averaged():
                    self.sheet.draw_column(f"step {progress.step}", scale=1.0)
            if due or (progress.step in drawn and sound):
                self.checkpoint()
            if self.enough:
                raise StopTraining

        try:
            if not self.enough:  # a run that was cut off after it had stopped
                self.fit.run(task, on_step, self.log.stopping)
            if self.log.owed:
                self.log.check_end(task, "train-sd")
                self.evaluate(self.fit.step)
                self.log.owed = False
                self.checkpoint()
        except KeyboardInterrupt:
            if self.log.history and self.main:
                place = self.keep() if self.fit.whole else ""
                self.tell.say(f"Interrupted at step {self.fit.step} of {steps}{place}.\n{self.log.go_on('train-sd')}")
            self.fit.wait_for_saving()
            raise
        except ProcessLost as e:
            with Interrupts():  # the launcher asks this process to end, too
                place = self.keep() if self.log.history and self.main and self.fit.whole else ""
            raise ProcessLost(
                f"{e} It was at step {self.fit.step} of {steps}{place}.\n{self.log.go_on('train-sd')}"
            ) from e
        except NotFinite as e:
            sound = self.log.is_sound(self.fit.first_loss(task))
            place = self.keep() if sound and self.main else ""
            self.accelerator.wait_for_everyone()  # a launcher ends all processes with the first
            raise TrainingError(self.log.not_finite(e, "train-sd", place if sound else None)) from e
        if self.enough:
            best = min(self.evaluations, key=lambda e: e.loss)
            self.tell.say(
                f"Stopped at step {self.fit.step}: no better on the validation pictures since step {best.step}."
            )
        self.log.end()
        return self.log.history
