"""Class folders -> index -> checked pictures -> split -> training -> adapter file -> test -> report and run folder.

The whole of `visionlora classify`, one stage after the other; each stage hands a small frozen object to the next.
Letters in shapes: n pictures, c classes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from visionlora.pipelines.further import check_first, keep_first, learned_before, named_base, read_first
from visionlora.pipelines.head import Before, linear_probe, new_head

from visionlora.classifier import ClassTask
from visionlora.config import ClassifyConfig, to_yaml
from visionlora.data.alike import linked
from visionlora.data.cache import default_cache_folder
from visionlora.data.classes import read_labelled
from visionlora.data.decoded import check_pictures
from visionlora.data.learned import Learned
from visionlora.data.splits import split
from visionlora.data.wording import first_names
from visionlora.errors import ConfigError, DataError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.further import further_config, method_for
from visionlora.lora.handle import Handle
from visionlora.lora.inject import check_targets, inject
from visionlora.models.vision import VisionModel, open_backbone
from visionlora.report.classify_page import Contender
from visionlora.report.classify_run import Finished, header, learned_from, overlay_sheet, report
from visionlora.report.curves import draw_curves
from visionlora.report.listener import Listener, bars
from visionlora.report.logbook import Logbook
from visionlora.report.resume import Start, base_digest, begin, holding
from visionlora.report.runfolder import RunFolder
from visionlora.training.learner import LayeredLearner, rates_by_depth
from visionlora.training.loop import Fit, Progress, StopTraining, new_accelerator, process_state
from visionlora.training.rate import find_rate
from visionlora.training.settings import (
    adapter_config,
    automatic_ranks,
    loop_config,
    ranks_state,
    suited,
    suited_rate,
    with_kept_ranks,
)
from visionlora.vision.material import Material, class_weights, logits_of, targets_of
from visionlora.vision.metrics import AnyMetrics, fit_temperature
from visionlora.vision.probe import Probe
from visionlora.vision.task import Objective

SMALL_FULL_RATE, FULL_RATE = 1e-3, 3e-5
"""Learning rates of full fine-tuning, for small and for large backbones."""


Header = Callable[[Material, int, float], dict[str, Any]]
"""From material, step and temperature to what an adapter file says about itself."""


@dataclass(frozen=True)
class ClassifyResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    report: Path
    classes: tuple[str, ...]
    metrics: AnyMetrics
    """On the test pictures; on the validation pictures where there are no others."""
    contenders: tuple[Contender, ...]
    """What was trained, then the baselines."""
    seconds: float


@holding
def classify(config: ClassifyConfig, listener: Listener | None = None) -> ClassifyResult:
    """Trains one classifier adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after a checkpoint was saved, from which `resume` goes on.
    """
    started = time.monotonic()
    main = process_state().is_main_process
    tell = (listener or Listener()) if main else Listener()
    start = begin(config, "classify", tell)
    config = start.config

    # Backbone, pictures, split
    first = read_first(start)
    model, weights = named_base(config, first)
    backbone = open_backbone(model, config.weights or weights)
    tell.say(backbone.why)
    accelerator = new_accelerator(config.precision, config.trackers, start.folder)
    backbone.model.to(accelerator.device)
    fingerprints = backbone.fingerprints()
    before = None
    if first is not None:
        check_first(first, config, backbone.id, fingerprints, tell)
        before = Before.of(first, backbone, str(config.start_from))
        config = dataclasses.replace(config, method=method_for(before.modules, config.method, str(config.start_from)))
    learned, not_known = learned_before(first, config)
    material = prepare(config, backbone, learned, not_known, tell)
    config = resolved(material, before, tell)
    material = dataclasses.replace(material, config=config)

    # The linear probe: a baseline, and where the head starts
    tell.progress("Linear probe", 0, 1)
    probe, probe_seconds = linear_probe(material)
    tell.progress("Linear probe", 1, 1)

    # Adapter, from here on the run leaves files
    start_of_head: Probe | ClassTask | None = probe if config.head_init == "probe" else None
    adapter = adapter_config(config, train=backbone.head)
    if before is not None:
        adapter = further_config(adapter, before.modules, before.info)
        start_of_head = before.head(material, tell)
    new_head(material, start_of_head)
    if before is None and config.method != "linear-probe":
        check_targets(backbone.model, adapter)
    if config.rank == "auto" and (kept := with_kept_ranks(adapter, start.state)) is not None:
        adapter = kept
    elif config.rank == "auto":
        choice = automatic_ranks(
            backbone.model, adapter, material.task, config,
            lambda done, total: tell.progress("Measuring layers", done, total),
        )  # fmt: skip
        tell.say("Mean rank by block:\n" + bars(choice.by_block()))
        adapter = choice.config
    handle = inject(backbone.model, adapter, seed=config.seed, start_from=None if before is None else before.modules)
    tell.say(f"Adapter: {handle.report}.")
    run = start.open(config) if main else RunFolder(start.folder)
    if main:
        keep_first(first, run, start)
    accelerator.wait_for_everyone()

    def about(method: AdapterConfig, further: Adapter | None = None) -> Header:
        return lambda own, step, temperature: header(own, method, fingerprints, step, temperature, further)

    # Training and baselines
    fitting = Fitting(
        material,
        handle,
        accelerator,
        run,
        tell,
        about(adapter, first),
        start,
        base_digest(fingerprints),
        ranks_state(adapter),
    )
    if start.state is not None:
        fitting.restore(start.state)
    elif config.find_rate:
        fitting.find_rate()
        material = fitting.material
    finished = [fitting.finished(run.path / "adapter.safetensors")]
    handle.eject()
    if "probe" in config.baselines and config.method != "linear-probe":
        alone = AdapterConfig(method="linear-probe", train=backbone.head)
        new_head(material, probe)
        head = inject(backbone.model, alone)
        fixed = Fitting(material, head, accelerator, None, tell, about(alone), start)
        finished.append(
            fixed.finished(run.path / "baselines" / "probe.safetensors", trained=False, before=probe_seconds)
        )
        head.eject()
    if "full" in config.baselines and config.method != "full":
        untouched = None if config.head_init == "random" else probe
        finished.append(full_fine_tuning(material, untouched, accelerator, run, tell, about, start))

    # Report
    seconds = time.monotonic() - started
    if main:
        report(run, material, finished, seconds, tell, fitting.log.changes)
    accelerator.wait_for_everyone()
    return ClassifyResult(
        run.path, run.path / "adapter.safetensors", run.path / "report.html", material.data.classes,
        finished[0].metrics, tuple(f.contender for f in finished), seconds,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- settings


def resolved(material: Material, before: Before | None, tell: Listener) -> ClassifyConfig:
    """Every default filled in that depends on the backbone, the pictures, or what the run learns on from.

    Raises:
        ConfigError: when the head cannot start as it was said to.
    """
    config, small = material.config, material.backbone.small
    new = [] if before is None else before.new_classes(material)
    if config.head_init == "adapter" and new:
        raise ConfigError(
            f"head_init is 'adapter', but the head of {config.start_from} does not know {first_names(new)}: leave it out."
        )
    if config.head_init is None:
        config = dataclasses.replace(config, head_init="probe" if before is None or new else "adapter")
    suits: dict[str, Any] = (
        {"epochs": 30.0, "learning_rate": 1e-2, "head_learning_rate": 1e-3, "batch_size": 32}
        if small
        else {"epochs": 10.0, "learning_rate": 1e-3, "head_learning_rate": 1e-3, "batch_size": 32}
    )
    suits["save_memory"] = not small
    if config.method == "full":
        suits["learning_rate"] = suits["head_learning_rate"] = SMALL_FULL_RATE if small else FULL_RATE
    if config.find_rate:
        del suits["learning_rate"], suits["head_learning_rate"]
    if config.steps is not None:
        del suits["epochs"]
    config, notes = suited(config, suits)
    for note in notes:
        tell.say(note)
    if config.epochs is not None:
        per_step = (config.batch_size or 1) * config.gradient_accumulation * process_state().num_processes
        config = dataclasses.replace(
            config, steps=max(1, round(config.epochs * len(material.splits.train) / per_step)), epochs=None
        )
    return config


# --------------------------------------------------------------------------------------------------------------- data


def prepare(
    config: ClassifyConfig, backbone: VisionModel, learned: Learned, not_known: str, tell: Listener
) -> Material:
    """The pictures, checked and split; those that were learned from before are trained on again, and judge nothing."""
    data = read_labelled(
        Path(config.images),
        table=Path(config.table) if config.table else None,
        path_column=config.path_column,
        label_column=config.label_column,
        label_columns=config.label_columns,
        group_column=config.group_column,
        split_column=config.split_column,
        skip_broken=config.skip_broken,
    )
    tell.say(data.source)
    checked = check_pictures(
        data,
        backbone.preprocessing,
        default_cache_folder() if config.cache else None,
        skip_broken=config.skip_broken,
        progress=lambda done, total: tell.progress("Checking pictures", done, total),
    )
    data = checked.data
    groups = [item.group for item in data.items]
    components = linked(checked.hashes, checked.thumbnails, checked.sha256, groups, config.near_duplicates)
    trained, chosen = learned.positions(checked.sha256)
    barred = {"val": trained, "test": trained | chosen}
    splits = split(data, components, config.val_share, config.test_share, config.seed, barred)
    sizes = Counter(components.tolist()).values()
    largest, together = max(sizes), ""
    if tied := sum(size for size in sizes if size > 1):
        together = (
            f"{tied} pictures stay with others on one side (near duplicates or a group); the largest set has {largest}"
        )
    more = tuple(line for line in (together, not_known) if line)
    splits = dataclasses.replace(splits, notes=(*splits.notes, *more))
    for note in (*data.notes, *checked.notes, *splits.notes):
        tell.say(note)
    tell.say(
        f"{len(data.classes)} classes; {len(splits.train)} pictures to train on, {len(splits.val)} to choose by, "
        f"{len(splits.test)} to test on."
    )
    if not splits.val and trained:
        raise DataError(
            f"{config.start_from} has learned from {len(trained)} of the {len(data.items)} pictures, and with those that are "
            "linked to them nothing is left that could choose the best moment: add new pictures, or give some in a folder val/."
        )
    if not splits.val and config.val_share and 2 * largest > len(data.items):
        raise DataError(
            f"There are no validation pictures, by which the best moment is chosen: {largest} of {len(data.items)} pictures "
            "are tied to each other, as near duplicates or by their group, and have to stay on one side. Where all of them "
            "look alike and yet differ, near_duplicates=false ties equal files alone; or give the sides as folders train/ and "
            "val/."
        )
    if not splits.val:
        raise DataError(
            "There are no validation pictures, by which the best moment is chosen: give a larger val_share, or a folder val/."
        )
    targets = targets_of(data)
    objective = Objective(
        data.multi_label,
        config.label_smoothing,
        config.focal_gamma,
        class_weights(config.class_weights, targets[list(splits.train)], data.classes),
    )
    select = config.select_by or ("map" if data.multi_label else "top1")
    return Material(checked, splits, targets, objective, backbone, dataclasses.replace(config, select_by=select))


# ---------------------------------------------------------------------------------------------------------- baselines


def full_fine_tuning(
    material: Material, probe: Probe | None, accelerator: Any, run: RunFolder, tell: Listener,
    about: Callable[[AdapterConfig], Header], start: Start[ClassifyConfig],
) -> Finished:  # fmt: skip
    """The baseline in which everything trains."""
    rate = suited_rate(SMALL_FULL_RATE if material.backbone.small else FULL_RATE, material.config.optimizer)
    config = dataclasses.replace(
        material.config, method="full", learning_rate=rate, head_learning_rate=rate, init="kaiming", start_from=None,
        head_init="random" if material.config.head_init == "random" else "probe",
    )  # fmt: skip
    own = dataclasses.replace(material, config=config)
    adapter = adapter_config(config, train=material.backbone.head)
    new_head(material, probe)
    handle = inject(material.backbone.model, adapter)
    fitting = Fitting(own, handle, accelerator, None, tell, about(adapter), start)
    found = fitting.finished(run.path / "baselines" / "full.safetensors")
    handle.eject()
    return found


# ----------------------------------------------------------------------------------------------------------- training


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

    def __post_init__(self) -> None:
        self.prepare()

    def prepare(self) -> None:
        """The loop with the settings as they are now."""
        config = self.material.config
        if config.learning_rate is None:  # the search for one starts from any
            config = dataclasses.replace(config, find_rate=False, learning_rate=1.0, head_learning_rate=1.0)
        rate, head = config.learning_rate or 1.0, config.head_learning_rate or 1.0
        backbone = self.material.backbone
        depths = [d for n, _ in backbone.model.named_parameters() if (d := backbone.depth_of(n)) is not None]
        rate_of = rates_by_depth(
            backbone.depth_of, max(depths, default=-1) + 1, config.layer_decay, backbone.head, head / rate
        )
        self.fit = Fit(self.accelerator, LayeredLearner(self.handle, rate_of), loop_config(config), config.ema_decay)
        self.log = Logbook(
            self.fit, self.written, self.tell, learned_from(self.material, self.base), self.material.config, self.start
        )

    @property
    def written(self) -> RunFolder | None:
        """The run folder, for the process that writes."""
        return self.run if self.accelerator.is_main_process else None

    def find_rate(self) -> None:
        """Sweeps the learning rate and takes what it finds; the head learns at the same."""
        sweep = find_rate(
            self.fit, self.material.task,
            on_step=lambda done, total: self.tell.progress("Finding the rate", done, total),
        )  # fmt: skip
        self.tell.say(f"Learning rate: {sweep.rate:.1e}, a tenth of where the loss was lowest (rate.png).")
        config = dataclasses.replace(
            self.material.config, learning_rate=sweep.rate, head_learning_rate=sweep.rate, find_rate=False
        )
        self.material = dataclasses.replace(self.material, config=config)
        self.prepare()
        if (run := self.written) is not None:
            points = [(math.log10(rate), loss) for rate, loss in sweep.points]
            draw_curves(
                run.path / "rate.png", {"loss": points}, xlabel="learning rate, power of ten", ylabel="loss",
                title=f"Taken: {sweep.rate:.1e}",
            )  # fmt: skip
            run.write_text("config.yaml", to_yaml(config))

    def evaluate(self, step: int) -> None:
        """Looks at the validation pictures; the best moment so far is kept."""
        material = self.material
        with self.fit.averaged():
            found = material.measured(logits_of(material, material.chosen_by, self.accelerator), material.chosen_by)
            value = material.selected(found), -found.loss
            self.evaluations.append((step, value[0], found.loss))
            self.log.measured(step, validation_loss=found.loss)
            latest = material.config.method == "adalora"  # pruned to its budget in the end alone
            if self.best is None or latest or value > self.best[1]:
                self.best = (step, value, {n: t.clone() for n, t in self.handle.training_state().items()})

    def moments(self) -> set[int]:
        """Steps after which the validation pictures are looked at."""
        steps, count = self.fit.config.steps, min(self.material.config.evaluations, self.fit.config.steps)
        return {round(steps * (k + 1) / count) for k in range(count)}

    @property
    def enough(self) -> bool:
        """Whether patience is at its end."""
        patience = self.material.config.patience
        if patience is None or self.best is None:
            return False
        return sum(step > self.best[0] for step, _, _ in self.evaluations) >= patience

    def train(self) -> None:
        """Runs the loop to its end, or until nothing gets better."""
        moments, select = self.moments(), self.material.config.select_by
        if not self.evaluations:
            self.evaluate(0)
            self.checkpoint()

        def on_step(progress: Progress) -> None:
            if progress.step in moments:
                self.evaluate(progress.step)
            score = abs(self.evaluations[-1][1])  # a loss counts negative
            self.log.add(progress, f"Training {self.material.config.method}", f"{select} {score:.3f}")
            if progress.step in moments:
                self.checkpoint()
            if self.enough:
                raise StopTraining

        try:
            if not self.enough:  # a run that was cut off after it had stopped
                self.fit.run(self.material.task, on_step, self.log.stopping)
        except KeyboardInterrupt:
            if self.log.history and self.written is not None:
                if self.fit.whole:
                    self.checkpoint()
                self.tell.say(
                    f"Interrupted at step {self.fit.step} of {self.fit.config.steps}. {self.log.go_on('classify')}"
                )
            raise
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
        best = kept["best"]
        self.best = (int(best["step"]), (float(best["value"][0]), float(best["value"][1])), dict(best["state"]))
        if changed:
            self.checkpoint()

    # ---------------------------------------------------------------------------------------------------------- end

    def finished(self, path: Path, trained: bool = True, before: float = 0.0) -> Finished:
        """Trains, goes back to the best moment, calibrates, tests once and writes the adapter.

        Args:
            path: of the adapter file.
            trained: False for a head that is fitted already.
            before: seconds that were spent on it already.
        """
        started = time.monotonic()
        if trained:
            self.train()
        else:
            self.evaluate(0)
        assert self.best is not None and self.handle.config is not None
        step, (value, _), state = self.best
        self.handle.load_training_state(state)
        material = self.material
        val = logits_of(material, material.chosen_by, self.accelerator)
        temperature = fit_temperature(val.numpy(), material.labels(material.chosen_by), material.data.multi_label)
        seconds = time.monotonic() - started + before
        logits = logits_of(material, material.looked_at, self.accelerator)
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            native.write(Adapter(self.handle.modules("model"), self.header(material, step, temperature)), path)
        explained = overlay_sheet(material, logits) if self.written is not None else None
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

    @property
    def head_names(self) -> set[str]:
        """Parameters of the head, which every contender trains."""
        return {f"{self.material.backbone.head}.{n}" for n in ("weight", "bias")}
