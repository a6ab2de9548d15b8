"""Settings of classify -> what the run would do, how long it would take and how much memory: no run folder is written.

All is checked that the run would check. The time is measured: two steps, and one look at a batch of validation pictures.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from visionlora.pipelines.classify import Ready, new_adapter, opened
from visionlora.pipelines.timing import cost_of_step, seconds_of_step, timed, with_rank

from visionlora.config import ClassifyConfig
from visionlora.data.images import printable
from visionlora.report.classify_fitting import Fitting
from visionlora.report.listener import Listener
from visionlora.report.resume import begin, holding
from visionlora.training.loop import process_state
from visionlora.training.memory import Room, peak_memory, room_for
from visionlora.training.settings import adapter_config, targets_of
from visionlora.vision.material import logits_of

NAMED = 8
"""Classes that are listed with their pictures."""


@dataclass(frozen=True)
class ClassifyEstimate:
    """What a run would do."""

    model: str
    size: int
    """Of its pictures, px."""
    targets: str
    layers: int
    trained_parameters: int
    classes: dict[str, int]
    """Class -> pictures."""
    train: int
    """Pictures to train on, to choose by, to test on."""
    val: int
    test: int
    steps: int
    pictures_per_step: int
    step_seconds: float
    looks: int
    """At the validation pictures."""
    look_seconds: float
    peak_bytes: int
    """Of the process, or of the GPU where there is one."""
    too_large: str
    """What is said of a batch that does not fit in memory: its peak is computed then."""
    device: str

    @property
    def seconds(self) -> float:
        """Of training, without baselines."""
        return self.steps * self.step_seconds + self.looks * self.look_seconds

    def lines(self) -> list[str]:
        """For a person."""
        named = ", ".join(f"{printable(name)} {n}" for name, n in list(self.classes.items())[:NAMED])
        more = f", and {len(self.classes) - NAMED} more" if len(self.classes) > NAMED else ""
        passes = self.steps * self.pictures_per_step / self.train
        layers = f"{self.layers} layers, " if self.layers else ""
        return [
            f"Model       {self.model}, pictures of {self.size} px",
            f"Targets     {self.targets}: {layers}{self.trained_parameters:,} parameters train",
            f"Pictures    {self.train} to train on, {self.val} to choose by, {self.test} to test on",
            f"Classes     {len(self.classes)}, with pictures: {named}{more}",
            f"Steps       {self.steps} of {self.pictures_per_step} pictures, {passes:.1f} times over those to train on",
            f"Time        {self.seconds / 60:.1f} minutes without baselines: {self.step_seconds:.2f} s a step, "
            f"{self.look_seconds:.1f} s each of {self.looks} times for the pictures to choose by",
            f"Memory      {self.peak_bytes / 2**30:.2f} GiB at the peak, of the {self.device}{self.too_large}",
        ]


@holding
def classify_dry_run(config: ClassifyConfig, listener: Listener | None = None) -> ClassifyEstimate:
    """Checks everything that `classify` checks before it trains, and measures a little.

    Raises:
        VisionLoRAError: as `classify` would.
    """
    tell = (listener or Listener()) if process_state().is_main_process else Listener()
    start = begin(config, "classify", tell)
    ready = opened(start, tell)
    config = dataclasses.replace(ready.material.config, head_init="random")
    backbone = ready.material.backbone
    config = with_rank(config, [(backbone.model, adapter_config(config, train=backbone.head))], tell)
    material = dataclasses.replace(ready.material, config=config)
    ready = dataclasses.replace(ready, material=material)
    handle, adapter = new_adapter(ready, None, None, Listener())
    task, chosen_by = material.task, material.chosen_by

    def fitted(batch: int) -> Fitting:
        own = dataclasses.replace(material, config=dataclasses.replace(config, batch_size=batch))
        return Fitting(own, handle, ready.accelerator, None, tell, ready.header(adapter), start)

    fitting = fitted(config.batch_size or 1)
    room = room_of(ready)
    step = cost_of_step(fitting.fit.config.batch_size, room, lambda batch: seconds_of_step(fitted(batch).fit, task))
    some = chosen_by[: config.batch_size]
    look_seconds = timed(lambda: logits_of(material, some, ready.accelerator), ready.accelerator) / len(some)
    found = ClassifyEstimate(
        model=ready.material.backbone.id,
        size=material.backbone.preprocessing.size,
        targets=targets_of(config),
        layers=len(handle.report.hits),
        trained_parameters=handle.report.trained_parameters,
        classes=pictures_of(material.data),
        train=len(material.splits.train),
        val=len(material.splits.val),
        test=len(material.splits.test),
        steps=fitting.fit.config.steps,
        pictures_per_step=fitting.fit.images_per_step,
        step_seconds=step.seconds,
        looks=len(fitting.moments()) + 1,
        look_seconds=look_seconds * len(chosen_by),
        peak_bytes=peak_memory() + step.more_bytes,
        too_large=step.note(),
        device="GPU" if torch.cuda.is_available() else "process",
    )
    handle.eject()
    return found


def room_of(ready: Ready) -> Room:
    """What a picture keeps, and the memory there is."""
    material, accelerator = ready.material, ready.accelerator
    model, config = material.backbone.model, material.config

    def two() -> Tensor:  # which mixup needs
        generator = torch.Generator().manual_seed(config.seed)
        with accelerator.autocast():
            losses: Tensor = material.task.losses(model, torch.tensor([0, 0]), generator, slice(0, 2))
        return losses.sum()

    return room_for(model, two, config.optimizer, config.ema_decay is not None, accelerator.device, pictures=2)


def pictures_of(data: Any) -> dict[str, int]:
    """Class -> pictures that have it."""
    counts = Counter(label for item in data.items for label in item.labels)
    return {name: counts[i] for i, name in enumerate(data.classes)}
