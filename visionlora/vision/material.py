"""What a classification run works on: pictures, their sides, what is asked about them, and the backbone.

Letters in shapes: n pictures, c classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visionlora.config import ClassifyConfig
from visionlora.data.decoded import Checked
from visionlora.data.labelled import LabelledData
from visionlora.data.splits import Splits
from visionlora.errors import ConfigError, nearest
from visionlora.models.evaluation import evaluating
from visionlora.models.heads import as_logits
from visionlora.models.vision import VisionModel
from visionlora.vision.augment import Augmentation
from visionlora.vision.metrics import AnyMetrics, evaluate, evaluate_multi_label, score
from visionlora.vision.task import ClassificationTask, Objective

PICTURES_AT_ONCE, PIXELS_AT_ONCE = 64, 64 * 224**2
"""That are looked at in one forward pass at most; whatever the batch, on which the rounding of features would hang."""


@dataclass(frozen=True)
class Material:
    """Everything that stays the same for an adapter and its baselines."""

    checked: Checked
    splits: Splits
    targets: Tensor
    """(n, c): one-hot, or 0 and 1 of each label."""
    objective: Objective
    backbone: VisionModel
    config: ClassifyConfig

    @property
    def data(self) -> LabelledData:
        """The labelled pictures."""
        return self.checked.data

    @property
    def chosen_by(self) -> tuple[int, ...]:
        """The pictures that choose the best moment and the temperature."""
        return self.splits.val

    @property
    def looked_at(self) -> tuple[int, ...]:
        """The pictures that the report is about: those of the test, or of the validation where there are no others."""
        return self.splits.test or self.splits.val

    @property
    def looked_at_side(self) -> str:
        """Their name."""
        return "test" if self.splits.test else "val"

    @property
    def task(self) -> ClassificationTask:
        """For the training loop."""
        config, preprocessing = self.config, self.backbone.preprocessing
        augmentation = Augmentation(preprocessing, config.augment, bool(config.flip), config.erasing)
        return ClassificationTask(
            self.checked.pictures, self.splits.train, self.targets, augmentation, self.objective, config.mixup,
            config.cutmix, config.balanced_sampling,
        )  # fmt: skip

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over the pictures, their labels and their sides."""
        sides = {i: side for side in ("train", "val", "test") for i in getattr(self.splits, side)}
        lines = [
            f"{digest} {item.labels} {sides.get(i)}"
            for i, (digest, item) in enumerate(zip(self.checked.sha256, self.data.items, strict=True))
        ]
        return hashlib.sha256("\n".join([*self.data.classes, *lines]).encode()).hexdigest()

    def labels(self, side: Sequence[int]) -> npt.NDArray[np.int64]:
        """(n,) of one label each, or (n, c) of 0 and 1."""
        own = self.targets[list(side)]
        return (own if self.data.multi_label else own.argmax(1)).numpy().astype(np.int64)

    def measured(self, logits: Tensor, side: Sequence[int], temperature: float = 1.0) -> AnyMetrics:
        """Metrics of logits (n, c) for the pictures of a side."""
        measure = evaluate_multi_label if self.data.multi_label else evaluate
        return measure(logits.double().numpy(), self.labels(side), self.data.classes, temperature)

    def selected(self, found: AnyMetrics) -> float:
        """What the best moment is chosen by; larger is better."""
        return score(found, self.config.select_by or "top1")


def targets_of(data: LabelledData) -> Tensor:
    """(n, c): 1 for every label of a picture."""
    targets = torch.zeros(len(data.items), len(data.classes))
    for row, item in zip(targets, data.items, strict=True):
        row[list(item.labels)] = 1.0
    return targets


def class_weights(
    given: str | Mapping[str, float] | None, targets: Tensor, classes: Sequence[str], multi_label: bool
) -> Tensor | None:
    """(c,), scaled so that the mean over the training pictures is 1.

    With several labels (2, c): of pictures without and with the label, scaled so that the mean over pictures and labels is 1.

    Args:
        given: `auto` (n divided by the count of the class; with several labels, pictures without it divided by those with it)
            or class -> weight, 1 where not named; with several labels, of the pictures that have it.
        targets: of the training pictures, (n, c).
        classes: names.
        multi_label: a picture may have several labels.

    Raises:
        ConfigError: for a class that does not exist, or a weight that is not positive.
    """
    if given is None:
        return None
    counts = targets.sum(0)
    if isinstance(given, str):
        others = (len(targets) - counts).clamp(min=1) if multi_label else counts.sum()
        weights = others / counts.clamp(min=1)
    else:
        for name, weight in given.items():
            if name not in classes:
                raise ConfigError(f"class_weights names {name!r}, which is no class. {nearest(name, classes)}")
            if not 0 < weight < float("inf"):
                raise ConfigError(f"The weight of class {name!r} is {weight!r}; it must be positive.")
        weights = torch.tensor([float(given.get(name, 1.0)) for name in classes])
    if multi_label:
        both = torch.stack([torch.ones_like(weights), weights])
        return both / (both * torch.stack([len(targets) - counts, counts])).sum() * targets.numel()
    return weights * counts.sum() / (weights * counts).sum()


@torch.no_grad()
def logits_of(material: Material, side: Sequence[int], accelerator: Any = None) -> Tensor:
    """What the model says of pictures without any random change, fp32 (n, c) on the CPU; features where it has no head.

    Args:
        material: with the model as it is now.
        side: positions of the pictures.
        accelerator: its processes share the pictures, and each gets the logits of all.
    """
    model, preprocessing = material.backbone.model, material.backbone.preprocessing
    processes = accelerator.num_processes if accelerator is not None else 1
    share = -(-len(side) // processes)
    padded = [*side, *[side[0]] * (share * processes - len(side))]
    own = padded if accelerator is None else padded[accelerator.process_index * share :][:share]
    at_once = max(1, min(PICTURES_AT_ONCE, PIXELS_AT_ONCE // preprocessing.size**2))
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(own), at_once):
            x = preprocessing.batch(material.checked.pictures.stored(own[start : start + at_once]))
            found.append(as_logits(model(x.to(device))).float())
    whole = torch.cat(found)
    return (whole if processes == 1 else accelerator.gather(whole)).cpu()[: len(side)]
