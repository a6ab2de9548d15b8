"""Class folders -> index -> checked pictures -> split -> training -> adapter file -> test -> report and run folder.

The whole of `visionlora classify`, one stage after the other; each stage hands a small frozen object to the next.
Letters in shapes: n pictures, c classes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.pipelines.further import check_first, keep_first, learned_before, named_base, read_first
from visionlora.pipelines.head import Before, linear_probe, new_head

from visionlora.classifier import ClassTask
from visionlora.config import ClassifyConfig, check_kind
from visionlora.config.choices import WHOLE
from visionlora.data.alike import linked
from visionlora.data.cache import default_cache_folder
from visionlora.data.classes import read_labelled
from visionlora.data.decoded import check_pictures
from visionlora.data.learned import Learned
from visionlora.data.splits import Splits, of_two_classes, split
from visionlora.data.wording import count_of, first_names
from visionlora.errors import ConfigError, DataError, ProcessLost, TrainingError
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.further import further_config, method_for
from visionlora.lora.handle import Handle
from visionlora.lora.inject import check_targets, inject
from visionlora.lora.targets import suited_targets
from visionlora.models.vision import VisionModel, open_backbone
from visionlora.report.classify_fitting import Fitting, Header
from visionlora.report.classify_page import Contender
from visionlora.report.classify_run import Finished, header, report
from visionlora.report.listener import Listener, bars
from visionlora.report.resume import Start, base_digest, begin, holding
from visionlora.report.runfolder import RunFolder
from visionlora.training.loop import new_accelerator, process_state
from visionlora.training.settings import (
    adapter_config,
    automatic_ranks,
    in_steps,
    left_aside,
    ranks_state,
    suited,
    suited_rate,
    with_kept_ranks,
)
from visionlora.vision.material import Material, class_weights, targets_of
from visionlora.vision.metrics import AnyMetrics, check_score
from visionlora.vision.probe import Probe
from visionlora.vision.task import Objective

SMALL_FULL_RATE, FULL_RATE = 1e-3, 3e-5
"""Learning rates of full fine-tuning, for small and for large backbones."""


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
    """Of the run, also before it was resumed."""


@holding
def classify(config: ClassifyConfig, listener: Listener | None = None) -> ClassifyResult:
    """Trains one classifier adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after a checkpoint was saved, from which `resume` goes on.
    """
    check_kind(config, ClassifyConfig, "classify", "images='./flowers'")
    main = process_state().is_main_process
    tell = (listener or Listener()) if main else Listener()
    start = begin(config, "classify", tell)
    ready = opened(start, tell)
    material, accelerator = ready.material, ready.accelerator

    # The linear probe: a baseline, and where the head starts
    tell.progress("Linear probe", 0, 1)
    probe, probe_seconds = linear_probe(material)
    tell.progress("Linear probe", 1, 1)

    # Adapter, from here on the run leaves files
    handle, adapter = new_adapter(ready, probe, start.state, tell)
    run = start.open(material.config) if main else RunFolder(start.folder)
    if main:
        keep_first(ready.first, run, start)
    accelerator.wait_for_everyone()

    # Training and baselines
    fitting = Fitting(
        material, handle, accelerator, run, tell, ready.header(adapter, ready.first), start,
        base_digest(ready.fingerprints), ranks_state(adapter),
    )  # fmt: skip
    if start.state is not None:
        fitting.restore(start.state)
    elif material.config.find_rate:
        fitting.find_rate(usual_rates(material))
        ready = dataclasses.replace(ready, material=fitting.material)
    fitting.train()
    try:
        finished = [fitting.finished(run.path / "adapter.safetensors")]
        handle.eject()
        others, missing = baselines(ready, probe, probe_seconds, run.path / "baselines", start, tell)
        finished += others

        # Report
        seconds = fitting.log.seconds
        if main:
            report(run, fitting.material, finished, seconds, tell, fitting.log.changes, missing)
    except KeyboardInterrupt:
        tell.say(f"Interrupted after the training, of which all is kept. {fitting.log.go_on('classify')}")
        raise
    except ProcessLost as e:
        raise ProcessLost(f"{e} All of the training is kept.\n{fitting.log.go_on('classify')}") from e
    accelerator.wait_for_everyone()
    return ClassifyResult(
        run.path, run.path / "adapter.safetensors", run.path / "report.html", material.data.classes,
        finished[0].metrics, tuple(f.contender for f in finished), seconds,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is there


@dataclass(frozen=True)
class Ready:
    """Backbone and pictures, checked and split; nothing has been trained or written."""

    material: Material
    """With settings in which every default is filled in."""
    accelerator: Any
    fingerprints: dict[str, dict[str, str]]
    """Of the backbone."""
    older: dict[str, dict[str, str]]
    """The same as an older version of its library names its parameters."""
    first: Adapter | None
    """What the run learns on from."""
    before: Before | None
    """The same, as far as it is this backbone's."""

    def header(self, adapter: AdapterConfig, first: Adapter | None = None) -> Header:
        """What the file of an adapter with these settings, which learned on from `first`, says about itself."""
        return lambda material, step, temperature: header(
            material, adapter, self.fingerprints, step, temperature, first, self.older
        )


def opened(start: Start[ClassifyConfig], tell: Listener) -> Ready:
    """Opens the backbone, reads and splits the pictures, and checks all settings against both."""
    config, first = start.config, read_first(start)
    for note in left_aside(config):
        tell.say(note)
    model, weights, named_by = named_base(config, first)
    if config.image_size is None and first is not None:
        config = dataclasses.replace(config, image_size=(first.info.get("base") or {}).get("image_size"))
    backbone = open_backbone(model, config.weights or weights, config.image_size, named_by)
    tell.say(backbone.why)
    if config.layer_decay != 1 and not backbone.blocks:
        raise ConfigError(
            f"layer_decay is {config.layer_decay:g}, but the layers of {backbone.id} do not say by numbers which block they "
            "are of, so that none would learn slower than another: leave layer_decay out."
        )
    whole = "full" in (config.method, *config.baselines, None if first is None else first.info.get("method"))
    # Of all parameters some may never be used, such as the mask token of DINOv2.
    accelerator = new_accelerator(config.precision, config.trackers, start.folder, parts_stop=whole)
    backbone.model.to(accelerator.device)
    fingerprints, older = backbone.fingerprints(), backbone.fingerprints(older=True)
    before = None
    if first is not None:
        check_first(first, config, backbone.id, fingerprints, tell, older)
        before = Before.of(first, backbone, str(config.start_from))
        config = dataclasses.replace(config, method=method_for(before.modules, config.method, str(config.start_from)))
    learned, not_known = learned_before(first, config)
    material = prepare(config, backbone, learned, not_known, tell)
    material = dataclasses.replace(material, config=resolved(material, before, tell))
    return Ready(material, accelerator, fingerprints, older, first, before)


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
    if config.targets == "auto" and config.method not in WHOLE:
        config = dataclasses.replace(config, targets=suited_targets(material.backbone.model))
        if config.targets == "all" and before is None:
            tell.say(f"Targets: all, as no attention is known of {material.backbone.id}; attn.qv where there is.")
    suits: dict[str, Any] = {"epochs": 30.0 if small else 10.0, "batch_size": 32}
    suits["save_memory"] = not small
    suits["flip"] = config.augment not in ("none", "affine")
    if not config.find_rate:
        suits |= adamw_rates(config.method, small)
    if config.steps is not None:
        del suits["epochs"]
    config, notes = suited(config, suits)
    for note in notes:
        tell.say(note)
    return in_steps(config, len(material.splits.train), process_state().num_processes)


def adamw_rates(method: str, small: bool) -> dict[str, float]:
    """The learning rates that suit a method on a backbone, for AdamW."""
    if method == "full":
        rate = SMALL_FULL_RATE if small else FULL_RATE
        return {"learning_rate": rate, "head_learning_rate": rate}
    return {"learning_rate": 1e-2 if small else 1e-3, "head_learning_rate": 1e-3}


def usual_rates(material: Material) -> dict[str, float]:
    """The learning rates of a run that does not search for its own."""
    config = material.config
    rates = adamw_rates(config.method, material.backbone.small)
    return {name: suited_rate(rate, config.optimizer) for name, rate in rates.items()}


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
        progress=lambda done, total: tell.progress("Unpacking pictures", done, total),
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
    components = linked(
        checked.hashes, checked.thumbnails, checked.sha256, groups, config.near_duplicates, config.near_duplicates
    )
    trained, chosen = learned.positions(checked.sha256)
    barred = {"val": trained, "test": trained | chosen}
    splits = split(data, components, config.val_share, config.test_share, config.seed, barred)
    largest = max(Counter(components.tolist()).values())
    more = [together(components.tolist(), splits), not_known]
    if config.near_duplicates:
        own = linked(checked.hashes, checked.thumbnails, checked.sha256, [None] * len(groups))
        more += of_two_classes(data, own)
    splits = dataclasses.replace(splits, notes=(*splits.notes, *filter(None, more)))
    for note in (*data.notes, *checked.notes, *splits.notes):
        tell.say(note)
    classes = count_of(len(data.classes), "class", "classes")
    tell.say(
        f"{classes}; {len(splits.train)} pictures to train on, {len(splits.val)} to choose by, {len(splits.test)} to test on."
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
        class_weights(config.class_weights, targets[list(splits.train)], data.classes, data.multi_label),
    )
    select = config.select_by or ("map" if data.multi_label else "top1")
    check_score(select, data.multi_label)
    return Material(checked, splits, targets, objective, backbone, dataclasses.replace(config, select_by=select))


def together(components: Sequence[int], splits: Splits) -> str:
    """How many pictures stay with others on one side; empty for none. Sides that the data names may tear some apart."""
    sets: dict[int, Counter[str]] = {}
    for side in ("train", "val", "test"):
        for i in getattr(splits, side):
            sets.setdefault(components[i], Counter())[side] += 1
    sizes = [size for held in sets.values() if len(held) == 1 and (size := held.total()) > 1]
    if not sizes:
        return ""
    return f"{sum(sizes)} pictures stay with others on one side (near duplicates or a group); the largest set has {max(sizes)}"


# ------------------------------------------------------------------------------------------------ adapter, baselines


def new_adapter(
    ready: Ready, probe: Probe | None, kept: Mapping[str, Any] | None, tell: Listener
) -> tuple[Handle, AdapterConfig]:
    """Puts head and adapter on the backbone as the run starts with them; the ranks of a run that goes on are its own."""
    material, before = ready.material, ready.before
    config, backbone = material.config, material.backbone
    start_of_head: Probe | ClassTask | None = probe if config.head_init == "probe" else None
    adapter = adapter_config(config, train=backbone.head)
    if before is not None:
        adapter = further_config(adapter, before.modules, before.info)
        start_of_head = before.head(material, tell)
    new_head(material, start_of_head)
    if before is None and config.method != "linear-probe":
        check_targets(backbone.model, adapter)
    if config.rank == "auto":
        adapter = with_kept_ranks(adapter, kept) or measured_ranks(material, adapter, tell)
    handle = inject(backbone.model, adapter, seed=config.seed, start_from=None if before is None else before.modules)
    tell.say(f"Adapter: {handle.report}.")
    return handle, adapter


def measured_ranks(material: Material, adapter: AdapterConfig, tell: Listener) -> AdapterConfig:
    """The adapter with a rank for each layer, from gradients on the pictures to train on."""
    choice = automatic_ranks(
        material.backbone.model, adapter, material.task, material.config,
        lambda done, total: tell.progress("Measuring layers", done, total),
    )  # fmt: skip
    tell.say("Mean rank by block:\n" + bars(choice.by_block()))
    return choice.config


def baselines(
    ready: Ready, probe: Probe, probe_seconds: float, folder: Path, start: Start[ClassifyConfig], tell: Listener
) -> tuple[list[Finished], list[str]]:
    """What the adapter is compared with: the linear probe, and training everything, where asked for.

    Returns:
        Those that could be had, and of each other why not: what was trained before is not lost with them.
    """
    material, accelerator = ready.material, ready.accelerator
    config, backbone = material.config, material.backbone
    found: list[Finished] = []
    missing: list[str] = []

    def judge(
        material: Material, handle: Handle, adapter: AdapterConfig, file: str, fitted_in: float | None = None
    ) -> None:
        fitting = Fitting(material, handle, accelerator, None, tell, ready.header(adapter), start)
        try:
            if fitted_in is None:
                fitting.train()
            found.append(fitting.finished(folder / file, fitted_in or 0.0))
        except ProcessLost:
            raise
        except TrainingError as error:
            missing.append(f"The baseline {adapter.method} is missing: {error}")
        handle.eject()

    if "probe" in config.baselines and config.method != "linear-probe":
        alone = AdapterConfig(method="linear-probe", train=backbone.head)
        new_head(material, probe)
        judge(material, inject(backbone.model, alone), alone, "probe.safetensors", probe_seconds)
    if "full" in config.baselines and config.method != "full":
        rate = suited_rate(SMALL_FULL_RATE if backbone.small else FULL_RATE, config.optimizer)
        at_random = config.head_init == "random"
        config = dataclasses.replace(
            config, method="full", learning_rate=rate, head_learning_rate=rate, init="kaiming", start_from=None,
            head_init="random" if at_random else "probe", rank=8, basis_index=0,  # what only adapters may be told
        )  # fmt: skip
        everything = adapter_config(config, train=backbone.head)
        new_head(material, None if at_random else probe)
        own = dataclasses.replace(material, config=config)
        judge(own, inject(backbone.model, everything), everything, "full.safetensors")
    return found, missing
