"""The training stage of classify: steps, the best moment by the validation pictures, and what is kept on the way."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionlora.config import ClassifyConfig
from visionlora.errors import ProcessLost, TrainingError
from visionlora.formats import native
from visionlora.lora.handle import Handle
from visionlora.report.classify_page import Contender
from visionlora.report.classify_run import Finished, learned_from, overlay_sheet
from visionlora.report.curves import draw_curves
from visionlora.report.listener import Listener
from visionlora.report.logbook import Logbook
from visionlora.report.resume import Start
from visionlora.report.runfolder import RunFolder
from visionlora.report.settings import write_settings
from visionlora.training.interrupts import Interrupts
from visionlora.training.learner import LayeredLearner, rates_by_depth
from visionlora.training.loop import Fit, NotFinite, Progress, StopTraining
from visionlora.training.rate import find_rate
from visionlora.training.settings import loop_config
from visionlora.vision.material import Material, logits_of
from visionlora.vision.metrics import fit_temperature

Header = Callable[[Material, int, float], dict[str, Any]]
"""From material, step and temperature to what an adapter file says about itself."""


@dataclass
class Fitting:
    """Training one adapter: evaluations, the best moment, checkpoints, nothing lost on Ctrl-C."""

    material: Material
    handle: Handle
    accelerator: Any
    run: RunFolder | None
    """Where metrics and checkpoints go; a baseline keeps none."""
    tell: Listener
    header: Header
    start: Start[ClassifyConfig]
    """Where the run began."""
    base: str = ""
    """Tells the weights of the backbone apart from any others."""
    ranks: Mapping[str, Any] = field(default_factory=dict)
    """The ranks that were chosen, for the checkpoint."""
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, score, loss) on the validation pictures."""
    best: tuple[int, tuple[float, float], dict[str, torch.Tensor]] | None = None
    """Step, (score, negative loss) and values at the best moment: of equal scores the lower loss counts."""

    spent: float = 0.0
    """Seconds of training up to the checkpoint that the run goes on from."""
    started: float = field(default_factory=time.monotonic)
    """When this session's training began."""

    def __post_init__(self) -> None:
        self.prepare()

    def prepare(self) -> None:
        """The loop with the settings as they are now."""
        config = self.material.config
        if config.learning_rate is None:  # the search for one starts from any
            config = dataclasses.replace(config, find_rate=False, learning_rate=1.0, head_learning_rate=1.0)
        rate, head = config.learning_rate or 1.0, config.head_learning_rate or 1.0
        backbone = self.material.backbone
        rate_of = rates_by_depth(backbone.depth_of, backbone.blocks, config.layer_decay, backbone.head, head / rate)
        self.fit = Fit(self.accelerator, LayeredLearner(self.handle, rate_of), loop_config(config), config.ema_decay)
        self.log = Logbook(
            self.fit, self.written, self.tell, learned_from(self.material, self.base), self.material.config, self.start
        )

    @property
    def written(self) -> RunFolder | None:
        """The run folder, for the process that writes."""
        return self.run if self.accelerator.is_main_process else None

    def find_rate(self, usual: Mapping[str, float]) -> None:
        """Sweeps the learning rate and takes what it finds; the head learns at the same.

        Args:
            usual: learning_rate and head_learning_rate, for when it finds none.
        """
        sweep = find_rate(
            self.fit, self.material.task,
            on_step=lambda done, total: self.tell.progress("Finding the rate", done, total),
        )  # fmt: skip
        if sweep.rate is not None:
            rate, head, why = sweep.rate, sweep.rate, "a tenth of where the loss was lowest (rate.png)."
        else:
            rate, head = usual["learning_rate"], usual["head_learning_rate"]
            why = (
                "the usual one: none of those tried lowered the loss by more than it varies from batch to batch (rate.png). "
                f"A batch_size above {self.fit.config.batch_size} may tell them apart."
            )
        self.tell.say(f"Learning rate: {rate:.1e}, {why}")
        config = dataclasses.replace(self.material.config, learning_rate=rate, head_learning_rate=head, find_rate=False)
        self.material = dataclasses.replace(self.material, config=config)
        self.prepare()
        if (run := self.written) is not None:
            points = [(math.log10(rate), loss) for rate, loss in sweep.points]
            draw_curves(
                run.path / "rate.png", {"loss": points}, xlabel="learning rate, power of ten", ylabel="loss",
                title=f"Taken: {rate:.1e}",
            )  # fmt: skip
            write_settings(run, self.start.asked, config)

    def evaluate(self, step: int) -> None:
        """Looks at the validation pictures; the best moment so far is kept."""
        material = self.material
        with self.fit.averaged():
            found = material.measured(logits_of(material, material.chosen_by, self.accelerator), material.chosen_by)
            value = material.selected(found), -found.loss
            self.evaluations.append((step, value[0], found.loss))
            select = material.config.select_by
            self.log.measured(step, **{"validation_loss": found.loss, f"validation_{select}": abs(value[0])})
            self.write_evaluations()
            latest = material.config.method == "adalora"  # pruned to its budget in the end alone
            if self.best is None or latest or value > self.best[1]:
                self.best = (step, value, {n: t.clone() for n, t in self.handle.training_state().items()})

    def write_evaluations(self) -> None:
        """`validation.jsonl`: step, loss and what the best moment is chosen by."""
        if (run := self.written) is not None:
            select = self.material.config.select_by
            run.write_jsonl(
                "validation.jsonl", [{"step": n, "loss": loss, select: abs(s)} for n, s, loss in self.evaluations]
            )

    def moments(self) -> set[int]:
        """Steps after which the validation pictures are looked at."""
        steps, count = self.fit.config.steps, min(self.material.config.evaluations, self.fit.config.steps)
        return {round(steps * (k + 1) / count) for k in range(count)}

    @property
    def seconds(self) -> float:
        """Of training, also before the run was cut off."""
        return self.spent + time.monotonic() - self.started

    @property
    def enough(self) -> bool:
        """Whether patience is at its end."""
        patience = self.material.config.patience
        if patience is None or self.best is None:
            return False
        return sum(step > self.best[0] for step, _, _ in self.evaluations) >= patience

    def train(self) -> None:
        """Runs the loop to its end, or until nothing gets better."""
        self.started = time.monotonic()
        moments, select = self.moments(), self.material.config.select_by
        if not self.evaluations:
            self.evaluate(0)
            self.checkpoint()

        def on_step(progress: Progress) -> None:
            if due := self.log.due(progress.step in moments):
                self.evaluate(progress.step)
            score = abs(self.evaluations[-1][1])  # a loss counts negative
            self.log.add(progress, f"Training {self.material.config.method}", f"{select} {score:.3f}")
            if due:
                self.checkpoint()
            if self.enough:
                raise StopTraining

        try:
            if not self.enough:  # a run that was cut off after it had stopped
                self.fit.run(self.material.task, on_step, self.log.stopping)
            if self.log.owed:
                self.log.check_end(self.material.task, None if self.run is None else "classify")
                self.evaluate(self.fit.step)
                self.log.owed = False
                self.checkpoint()
        except KeyboardInterrupt:
            if self.log.history and self.written is not None:
                if self.fit.whole:
                    self.checkpoint()
                self.tell.say(
                    f"Interrupted at step {self.fit.step} of {self.fit.config.steps}. {self.log.go_on('classify')}"
                )
            self.fit.wait_for_saving()
            raise
        except ProcessLost as e:
            if self.run is None:
                raise
            with Interrupts():  # the launcher asks this process to end, too
                if self.log.history and self.fit.whole:
                    self.checkpoint()
            where = f"It was at step {self.fit.step} of {self.fit.config.steps}."
            raise ProcessLost(f"{e} {where}\n{self.log.go_on('classify')}") from e
        except NotFinite as e:
            if self.run is None:  # of a baseline
                raise TrainingError(self.log.not_finite(e, None, None)) from e
            sound = self.log.is_sound(self.fit.first_loss(self.material.task))
            if sound and self.written is not None:
                self.checkpoint()
            self.accelerator.wait_for_everyone()  # a launcher ends all processes with the first
            raise TrainingError(self.log.not_finite(e, "classify", "" if sound else None)) from e
        if self.enough and self.best is not None:
            self.tell.say(f"Stopped at step {self.fit.step}: no better since step {self.best[0]}.")
        self.log.end()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self) -> None:
        """Writes all that the run needs to go on."""
        assert self.best is not None
        step, value, state = self.best
        self.log.checkpoint(
            {
                "evaluations": [list(e) for e in self.evaluations],
                "seconds": self.seconds,
                "best": {"step": step, "value": list(value), "state": state},
                **self.ranks,
            }
        )

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ConfigError: when the pictures are not those of the run, and it was not said to go on with others.
        """
        changed = self.log.restore(kept)
        self.evaluations = [(int(s), float(v), float(loss)) for s, v, loss in kept["evaluations"]]
        self.write_evaluations()
        self.spent = float(kept.get("seconds", 0.0))
        best = kept["best"]
        self.best = (int(best["step"]), (float(best["value"][0]), float(best["value"][1])), dict(best["state"]))
        if changed:
            self.checkpoint()

    # ---------------------------------------------------------------------------------------------------------- end

    def finished(self, path: Path, before: float = 0.0) -> Finished:
        """Goes back to the best moment, calibrates, tests once and writes the adapter.

        Args:
            path: of the adapter file.
            before: seconds that were spent on it before this began.
        """
        if self.best is None:  # not trained, as the head is fitted already
            self.started = time.monotonic()
            self.evaluate(0)
        assert self.best is not None and self.handle.config is not None
        step, (value, _), state = self.best
        self.handle.load_training_state(state)
        material = self.material
        val = logits_of(material, material.chosen_by, self.accelerator)
        temperature = fit_temperature(val.numpy(), material.labels(material.chosen_by), material.data.multi_label)
        seconds = self.seconds + before
        logits = logits_of(material, material.looked_at, self.accelerator)
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            native.write(self.handle.adapter("model", self.header(material, step, temperature)), path)
        explained = self.explained(logits) if self.written is not None else None
        self.accelerator.wait_for_everyone()
        head = sum(p.numel() for n, p in material.backbone.model.named_parameters() if n in self.head_names)
        contender = Contender(
            self.handle.config.method,
            self.handle.report.trained_parameters - head,
            material.backbone.parameters,
            value,
            material.measured(logits, material.looked_at, temperature),
            seconds,
            path.stat().st_size if path.is_file() else None,
        )
        return Finished(
            contender, path, logits, temperature, step, tuple(self.log.history), tuple(self.evaluations), explained
        )

    def explained(self, logits: torch.Tensor) -> Image.Image | None:
        """What the model looks at; a run that has trained does not end because it cannot be drawn."""
        try:
            return overlay_sheet(self.material, logits)
        except Exception as error:
            self.tell.say(f"Warning: what the model looks at cannot be shown ({type(error).__name__}: {error}).")
            return None

    @property
    def head_names(self) -> set[str]:
        """Parameters of the head, which every contender trains."""
        return {f"{self.material.backbone.head}.{n}" for n in ("weight", "bias")}
