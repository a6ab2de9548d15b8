"""Classification as a task of the training loop.

Letters in shapes: n pictures of a step, m of them in one forward pass, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.models.heads import as_logits
from visionlora.vision.augment import Augmentation, mixed

SMALLEST = torch.finfo(torch.float32).eps / 2
"""The least that 1 - p can be in fp32, but for zero, whose powers below 1 have no gradient."""


class StoredPictures(Protocol):
    """Squares before the crop, wherever they are kept."""

    def __len__(self) -> int:
        """How many."""

    def stored(self, indices: list[int]) -> npt.NDArray[np.uint8]:
        """uint8 (n, s, s, 3)."""


@dataclass(frozen=True)
class Objective:
    """What the loss is."""

    multi_label: bool = False
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    class_weights: Tensor | None = None
    """(c,); with several labels (2, c), of pictures without and with the label. See `visionlora.vision.material`."""

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each picture, (m,).

        Args:
            logits: (m, c).
            targets: (m, c): shares of the classes, or 0 and 1 of each label.
        """
        logits, c = logits.float(), logits.shape[-1]
        if self.multi_label:
            soft = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
            terms = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
            p = logits.sigmoid()
            right = torch.where(targets > 0.5, p, 1 - p)
        else:
            soft = targets * (1 - self.label_smoothing) + self.label_smoothing / c
            log_p = logits.log_softmax(-1)
            terms, right = -soft * log_p, log_p.exp()
        if self.focal_gamma:  # arXiv 1708.02002, eq. 4
            terms = terms * (1 - right).clamp(min=SMALLEST) ** self.focal_gamma
        if self.class_weights is not None:
            weights = self.class_weights.to(terms.device)
            terms = terms * (torch.lerp(weights[0], weights[1], targets) if self.multi_label else weights)
        return terms.mean(-1) if self.multi_label else terms.sum(-1)


@dataclass(frozen=True)
class ClassificationTask:
    """The training pictures and the objective."""

    pictures: StoredPictures
    train: tuple[int, ...]
    """Positions of the training pictures."""
    targets: Tensor
    """(all pictures, c): one-hot, or 0 and 1 of each label."""
    augmentation: Augmentation
    objective: Objective
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False
    """Draw classes evenly, then a picture of the class."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All pictures have one size."""
        return (Group(tuple(range(len(self.train))), len(self.train)),)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Random numbers are drawn for the whole step and cut to `part`, so that every process draws the same."""
        chosen = self.drawn_evenly(len(index), generator) if self.balanced else self.positions[index]
        seeds = torch.randint(2**62, (len(index),), generator=generator)
        own, targets = chosen[part].tolist(), self.targets[chosen[part]]
        stored = torch.from_numpy(self.pictures.stored(own)).permute(0, 3, 1, 2)
        x = self.augmentation(stored, seeds[part].tolist())
        mixing = torch.Generator().manual_seed(int(seeds[part][0]))
        x, targets = mixed(x, targets, self.mixup, self.cutmix, mixing)
        device = next(model.parameters()).device
        return self.objective.losses(as_logits(model(x.to(device))), targets.to(device))

    def drawn_evenly(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions of pictures, every class as likely as any other."""
        return self.positions[torch.multinomial(self.chances, count, replacement=True, generator=generator)]

    @cached_property
    def positions(self) -> Tensor:
        """`train` as a tensor."""
        return torch.tensor(self.train)

    @cached_property
    def chances(self) -> Tensor:
        """Of each training picture to be drawn when classes are drawn evenly, not scaled."""
        own = self.targets[self.positions]
        weights = (own / own.sum(0).clamp(min=1)).sum(1)
        return torch.where(weights > 0, weights, weights.mean())  # a picture without any label
