"""Image folder -> checked pictures -> latents and text -> training -> adapter file -> sample grid -> run folder.

The whole of `visionlora train-sd`, one stage after the other; each stage hands a small frozen object to the next.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionlora.config import TrainSDConfig, to_yaml
from visionlora.data.folder import ImageFolder, ImageItem, read_image_folder
from visionlora.diffusion.encode import cut_captions, encode_dataset
from visionlora.diffusion.sampling import SamplingConfig
from visionlora.diffusion.task import DenoisingTask
from visionlora.diffusion.validation import Evaluation, Validation, hold_out, verdict
from visionlora.errors import DataError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.lora.inject import Handle, check_targets, inject
from visionlora.models.base import open_base
from visionlora.report.listener import Listener, bars
from visionlora.report.logbook import Logbook
from visionlora.report.resume import resumed_config
from visionlora.report.runfolder import RunFolder, check_run_folder, default_run_folder, open_run_folder
from visionlora.report.samples import SampleSheet, sample_moments
from visionlora.report.sd_run import data_hash, header, public_metadata, report
from visionlora.training.checkpoint import STATE_FILE, read_state
from visionlora.training.loop import Fit, Progress, StopTraining, new_accelerator, process_state, recent_loss
from visionlora.training.settings import adapter_config, automatic_ranks, loop_config


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    grid: Path
    first_loss: float
    last_loss: float
    seconds: float


def train_sd(config: TrainSDConfig, listener: Listener | None = None) -> RunResult:
    """Trains one adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after adapter and state were saved under `checkpoints/`, from which `resume` goes on.
    """
    started = time.monotonic()
    tell = (listener or Listener()) if process_state().is_main_process else Listener()

    # Pictures and output folder
    if config.resume is None:
        target = Path(config.output) if config.output else default_run_folder("sd", Path(config.images).resolve().name)
        check_run_folder(target)
    else:
        target = Path(config.resume)
        config = resumed_config(target, config)
    folder = read_image_folder(
        Path(config.images),
        config.prompt,
        skip_broken=config.skip_broken,
        progress=lambda done, total: tell.progress("Checking pictures", done, total),
    )
    for note in folder.notes:
        tell.say(note)
    tell.say(folder.caption_source)
    folder, apart = held_out(folder, config)
    if apart:
        tell.say(f"{len(folder.items)} pictures to train on, {len(apart)} apart to see whether it learned.")

    # Base model and adapter
    base = open_base(config.model)
    tell.say(base.why)
    chosen_for_user = {k: v for k, v in base.suggested.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **chosen_for_user)
    loop = loop_config(config)
    size = config.resolution or base.resolution
    base.check_resolution(size)
    accelerator = new_accelerator(config.precision)
    for part in (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder):
        part.to(accelerator.device)
    fingerprints = base.fingerprints()
    adapter = adapter_config(config)
    check_targets(base.pipe.unet, adapter)
    for caption, lost in cut_captions(base, [item.caption for item in folder.items]):
        tell.say(f"The caption {caption!r} is longer than the model reads; it never sees: {lost}")

    # Latents and text, from here on the run leaves files
    data = encode_dataset(base, folder.items, size, config.flip, progress=tell.progress)
    validation = None
    if apart:
        kept = encode_dataset(base, apart, size, flip=False, progress=tell.progress)
        validation = Validation(kept, base.pipe.scheduler, config.seed)
    task = DenoisingTask(data, base.pipe.scheduler, config.caption_dropout, config.timestep_range)
    if config.rank == "auto":
        choice = automatic_ranks(
            base.pipe.unet, adapter, task, config, lambda done, total: tell.progress("Measuring layers", done, total)
        )
        tell.say("Mean rank by block:\n" + bars(choice.by_block()))
        adapter = choice.config
    handle = inject(base.pipe.unet, adapter, seed=config.seed)
    tell.say(f"Adapter: {handle.report}.")
    run = RunFolder(target)
    if accelerator.is_main_process and config.resume is None:
        run = open_run_folder(target)
        run.write_text("config.yaml", to_yaml(dataclasses.replace(config, output=None, resume=None)))
    accelerator.wait_for_everyone()

    # Training
    prompts = config.sample_prompts or default_prompts(folder)
    settings = SamplingConfig(config.sample_steps, config.guidance_scale or 1.0, config.seed)
    sheet = SampleSheet(base, handle, prompts, size, settings, run, tell)
    fitting = Fitting(
        config,
        handle,
        accelerator,
        run,
        sheet,
        tell,
        lambda step: header(config, adapter, loop, base, fingerprints, folder, size, step),
        data_hash(folder),
        validation,
    )
    if config.resume is not None:
        fitting.restore(read_state(run.path / "checkpoints" / STATE_FILE))
    history = fitting.train(task)

    # Adapter, grid and report
    adapter_path = run.path / "adapter.safetensors"
    if accelerator.is_main_process:
        with fitting.fit.averaged():
            native.write(
                fitting.adapter(history[-1].step),
                adapter_path,
                public_metadata(config, adapter, loop, base, folder, size, fitting.started),
            )
        seconds = time.monotonic() - started
        report(run, config, loop, base, folder, handle, sheet, history, fitting.evaluations, seconds)
        if fitting.evaluations:
            tell.say(verdict(fitting.evaluations))
    seconds = time.monotonic() - started
    return RunResult(run.path, adapter_path, run.path / "grid.png", history[0].loss, recent_loss(history), seconds)


@dataclass
class Fitting:
    """The training stage: metrics after each step, samples and checkpoints now and then, nothing lost on Ctrl-C."""

    config: TrainSDConfig
    handle: Handle
    accelerator: Any
    run: RunFolder
    sheet: SampleSheet
    tell: Listener
    header: Callable[[int], dict[str, Any]]
    """From a step to what the adapter file says about itself."""
    data: str
    """Tells the pictures and captions."""
    validation: Validation | None = None
    """Pictures that are not trained on."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """On the validation pictures."""
    started: float = field(default_factory=lambda: float(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    """When the run began, seconds since 1970; in reproducible builds what they say."""

    def __post_init__(self) -> None:
        self.fit = Fit(self.accelerator, self.handle, loop_config(self.config), self.config.ema_decay)
        self.log = Logbook(self.fit, self.run if self.main else None, self.tell, self.data, "The pictures or captions")

    @property
    def main(self) -> bool:
        """Whether this process draws and writes."""
        return bool(self.accelerator.is_main_process)

    def adapter(self, step: int) -> Adapter:
        """The adapter as it is now."""
        return Adapter(self.handle.modules("unet"), self.header(step))

    def keep_adapter(self, step: int) -> Path:
        """Writes the adapter as it is now beside the others of the run."""
        path = self.run.checkpoints / f"step-{step:06d}.safetensors"
        with self.fit.averaged():
            native.write(self.adapter(step), path)
        return path

    def checkpoint(self) -> None:
        """Writes all that the run needs to go on."""
        self.log.checkpoint(
            {
                "evaluations": [dataclasses.asdict(e) for e in self.evaluations],
                "columns": [label for label, _ in self.sheet.columns],
                "started": self.started,
            }
        )

    def restore(self, kept: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ConfigError: when the pictures or captions are not those of the run.
        """
        self.log.restore(kept)
        self.evaluations = [Evaluation(**e) for e in kept["evaluations"]]
        self.started = float(kept["started"])
        if self.main:
            self.sheet.read_columns([str(label) for label in kept["columns"]])

    def evaluate(self, step: int) -> None:
        """Looks at the validation pictures; the best adapter so far is kept beside the last. All processes see the same."""
        if self.validation is None:
            return
        with self.fit.averaged():
            found = self.validation.evaluate(self.handle.model, step)
            best = not self.evaluations or found.loss < min(e.loss for e in self.evaluations)
            self.evaluations.append(found)
            if self.main:
                self.run.write_jsonl("validation.jsonl", [dataclasses.asdict(e) for e in self.evaluations])
                if best:
                    native.write(self.adapter(step), self.run.checkpoints / "best.safetensors")

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
        if self.main and not self.sheet.columns:
            self.sheet.draw_column("base", scale=0.0)
        if not self.evaluations:
            self.evaluate(0)
        if not self.log.history:
            self.checkpoint()

        def on_step(progress: Progress) -> None:
            if progress.step in saved:
                self.evaluate(progress.step)
            self.log.add(progress, "Training", f"{progress.images_per_second:.1f} images/s")
            if progress.step in drawn and self.main:
                self.keep_adapter(progress.step)
                with self.fit.averaged():
                    self.sheet.draw_column(f"step {progress.step}", scale=1.0)
            if progress.step in drawn | saved:
                self.checkpoint()
            if self.enough:
                raise StopTraining

        try:
            if not self.enough:  # a run that was cut off after it had stopped
                self.fit.run(task, on_step)
        except KeyboardInterrupt:
            if self.log.history and self.main:
                kept = self.keep_adapter(self.fit.step)
                self.checkpoint()
                self.tell.say(
                    f"Interrupted at step {self.fit.step} of {steps}; the adapter so far is in {kept}.\n"
                    f"Go on with: visionlora train-sd --resume {self.run.path}"
                )
            raise
        if self.enough:
            best = min(self.evaluations, key=lambda e: e.loss)
            self.tell.say(
                f"Stopped at step {self.fit.step}: no better on the validation pictures since step {best.step}."
            )
        return self.log.history


def held_out(folder: ImageFolder, config: TrainSDConfig) -> tuple[ImageFolder, tuple[ImageItem, ...]]:
    """The pictures to train on, and those that are kept apart."""
    if config.val_share:
        return hold_out(folder, config.val_share, config.seed)
    if config.validation is None:
        return folder, ()
    apart = read_image_folder(Path(config.validation), config.prompt, skip_broken=config.skip_broken)
    known = {item.sha256: item.path for item in folder.items}
    if doubles := [item.path.name for item in apart.items if item.sha256 in known]:
        raise DataError(
            f"{len(doubles)} pictures of {config.validation} are also among those to train on (first {doubles[0]}), so they "
            "cannot tell whether it learned. Take them out of one folder."
        )
    return folder, apart.items


def default_prompts(folder: ImageFolder) -> tuple[str, ...]:
    """Up to four different captions of the training pictures."""
    return tuple(dict.fromkeys(item.caption for item in folder.items))[:4]
