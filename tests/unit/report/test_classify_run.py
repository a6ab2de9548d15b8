"""What a classify run shows of its pictures."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from visionlora.report.classify_run import decisions, wording
from visionlora.vision.material import Material
from visionlora.vision.task import Objective

CLASSES = ("red", "round", "big")


def material(targets: Tensor, multi_label: bool) -> Material:
    """All pictures are the test's."""
    items = [SimpleNamespace(labels=tuple(row.nonzero()[:, 0].tolist())) for row in targets]
    data = SimpleNamespace(classes=CLASSES, multi_label=multi_label, items=items)
    side: Any = SimpleNamespace(test=tuple(range(len(targets))), val=())
    checked: Any = SimpleNamespace(data=data)
    nothing: Any = None
    return Material(checked, side, targets, Objective(multi_label), nothing, nothing)


def test_a_mistake_with_several_labels_is_one_label_that_is_said_or_missed_wrongly() -> None:
    probabilities = torch.tensor([[0.98, 0.08, 0.3], [0.91, 0.2, 0.1], [0.4, 0.1, 0.2]])
    shown = material(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), True)
    found = decisions(shown, probabilities.logit())
    assert [(d.row, CLASSES[d.label], d.right) for d in found] == [
        (0, "red", True), (0, "round", False), (1, "red", False),
    ]  # fmt: skip
    assert [wording(shown, d, sure=True) for d in found] == ["red 98 %", "misses round (8 %)", "says red 91 %, is none"]
    assert [wording(shown, d, sure=False) for d in found] == ["red", "misses round", "says red, is none"]


def test_a_mistake_with_one_label_is_a_picture_of_another_class() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    shown = material(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), False)
    found = decisions(shown, probabilities.log())
    assert [(d.row, d.probability, d.right) for d in found] == [
        (1, pytest.approx(0.8), False), (0, pytest.approx(0.5), True),
    ]  # fmt: skip
    assert [wording(shown, d, sure=True) for d in found] == ["round 80 %, is red", "red 50 %"]
    assert wording(shown, found[0], sure=False) == "round, is red"
