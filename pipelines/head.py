"""What the head of a classifier starts as: a linear probe, the head of a finished adapter, or at random.

In: the material of a run and what it learns on from. Out: weights for the head that the run trains.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visionlora.classifier import COMPONENT, ClassTask
from visionlora.data.wording import count_of
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.inject import attach
from visionlora.models.vision import VisionModel
from visionlora.report.listener import Listener
from visionlora.vision.material import Material, logits_of
from visionlora.vision.probe import Probe, fit_probe


def linear_probe(material: Material) -> tuple[Probe, float]:
    """A head fitted to the features of the backbone as it is now, and the seconds it took."""
    started = time.monotonic()
    material.backbone.set_head(nn.Identity())
    train, val = (logits_of(material, side) for side in (material.splits.train, material.chosen_by))
    probe = fit_probe(
        train, material.targets[list(material.splits.train)], dataclasses.replace(material.objective, focal_gamma=0.0),
        lambda logits: material.selected(material.measured(logits(val), material.chosen_by)),
    )  # fmt: skip
    return probe, time.monotonic() - started


@torch.no_grad()
def new_head(material: Material, start: Probe | ClassTask | None) -> None:
    """A head that starts as the linear probe (arXiv 2202.10054), as another head, or at random."""
    head = material.backbone.new_head(len(material.data.classes), material.config.seed)
    if start is not None:
        head.weight.copy_(start.weight)
        head.bias.copy_(start.bias)


@dataclass(frozen=True)
class Before:
    """What a run learns on from, as far as it is this backbone's."""

    info: Mapping[str, Any]
    """The header."""
    modules: Mapping[str, AdapterModule]
    """By layer, without the head."""
    task: ClassTask | None
    """Classes and head, of an adapter that has them."""

    @classmethod
    def of(cls, first: Adapter, backbone: VisionModel, where: str) -> Before:
        """Takes an adapter apart.

        Raises:
            ConfigError: when it has parts for several models.
        """
        if len(first.components) != 1:
            raise ConfigError(
                f"{where} has parts for {', '.join(first.components)}, where one for a vision transformer is needed."
            )
        task = ClassTask.of(first, backbone.head) if first.info.get("classifier") else None
        modules = first.component(first.components[0])
        return cls(first.info, {n: m for n, m in modules.items() if not n.startswith(backbone.head + ".")}, task)

    def new_classes(self, material: Material) -> list[str]:
        """The classes that its head does not know; all of them when a picture has one label here and several there."""
        task = self.task
        known = task.classes if task is not None and task.multi_label == material.data.multi_label else ()
        return [name for name in material.data.classes if name not in known]

    def head(self, material: Material, tell: Listener) -> Probe | ClassTask | None:
        """What the head starts as, and why."""
        how, names = material.config.head_init, material.data.classes
        if how == "random":
            return None
        if how == "adapter" and self.task is not None:
            rows = [self.task.classes.index(name) for name in names]
            left = len(self.task.classes) - len(rows)
            tell.say(
                f"The head learns on too: it knows all {len(rows)} classes"
                + (f"; {count_of(left, 'other class is', 'other classes are')} left out." if left else ".")
            )
            return dataclasses.replace(
                self.task, classes=names, weight=self.task.weight[rows], bias=self.task.bias[rows]
            )
        tell.say("The head starts as a linear probe of what the adapter makes of the pictures.")
        handle = attach(material.backbone.model, Adapter({f"{COMPONENT}.{n}": m for n, m in self.modules.items()}))
        probe, _ = linear_probe(material)
        handle.eject()
        return probe
