"""What a classify run shows of its pictures."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from visionlora.config import ClassifyConfig
from visionlora.report.classify_run import decisions, warnings_of, what_to_try, wording
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


@pytest.mark.parametrize(
    ("probe", "own", "said"),
    [
        (
            1.0,
            1.0,
            "has a top1 of 1.000 already (baselines/probe.safetensors): on these pictures lora cannot be seen to be",
        ),
        (1.0, 0.9, "lora does not pay on this backbone: top1 is -0.100 against the linear probe"),
        (0.8, 0.8, "lora does not pay on this backbone: top1 is +0.000 against the linear probe"),
        (0.8, 0.9, ""),
    ],
)
def test_an_adapter_is_blamed_only_where_it_could_have_been_better(probe: float, own: float, said: str) -> None:
    judged: Any = SimpleNamespace(
        selected=lambda top1: top1, config=SimpleNamespace(select_by="top1"), splits=SimpleNamespace(test=range(100)),
        data=SimpleNamespace(multi_label=False), looked_at=range(100),
    )  # fmt: skip
    finished: Any = [
        SimpleNamespace(contender=SimpleNamespace(name=name), metrics=top1, step=20)
        for name, top1 in (("lora", own), ("linear-probe", probe))
    ]
    found = warnings_of(judged, finished)
    assert said in "".join(found) and len(found) == bool(said)


@pytest.mark.parametrize(
    ("step", "augment", "said"),
    [
        (20, "light", "Try a higher rank, more targets"),
        (
            0,
            "light",
            "Every step made the validation pictures worse than they were at the start: try without augmentation",
        ),
        (0, "none", "at the start: try at a third of the learning_rate."),
    ],
)
def test_after_a_training_in_vain_the_first_thing_to_try_is_named(step: int, augment: str, said: str) -> None:
    config = ClassifyConfig(images="pets", augment=augment, flip=False)
    own: Any = SimpleNamespace(step=step)
    assert said in what_to_try(cast(Any, SimpleNamespace(config=config)), own)
