"""What a classify run shows of its pictures."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from visionlora.config import ClassifyConfig
from visionlora.report.classify_run import decisions, warnings_of, what_to_try, wording
from visionlora.vision.material import Material
from visionlora.vision.metrics import evaluate_multi_label
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


def warned_of(select_by: str, probe: float, own: float) -> tuple[str, ...]:
    """The warnings about an adapter beside a probe, with these figures on a hundred pictures."""
    judged: Any = SimpleNamespace(
        selected=lambda figure: -figure if select_by == "loss" else figure,
        config=ClassifyConfig(images="pets", select_by=select_by),
        looked_at=range(100),
    )
    finished: Any = [
        SimpleNamespace(contender=SimpleNamespace(name=name), metrics=figure, step=20)
        for name, figure in (("lora", own), ("linear-probe", probe))
    ]
    return warnings_of(judged, finished)


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
    found = warned_of("top1", probe, own)
    assert said in "".join(found) and len(found) == bool(said)


@pytest.mark.parametrize(
    ("probe", "own", "said"),
    [
        (0.2, 0.3, "lora does not pay on this backbone: loss is +0.100 against the linear probe"),
        (0.2, 0.2, "lora does not pay on this backbone: loss is +0.000 against the linear probe"),
        (0.003, 0.004, "has a loss of 0.003 already"),
        (0.3, 0.2, ""),
    ],
)
def test_a_loss_is_told_as_it_is_and_zero_is_the_best_there_is(probe: float, own: float, said: str) -> None:
    found = warned_of("loss", probe, own)
    assert said in "".join(found) and len(found) == bool(said)


@pytest.mark.parametrize(("select", "warned"), [("map", True), ("micro_f1", False)])
def test_a_moment_that_ranks_well_but_gives_wrong_labels_is_told(select: str, warned: bool) -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]] * 50)
    probe, own = (evaluate_multi_label((targets - by).numpy(), targets.numpy(), CLASSES) for by in (0.5, -0.5))
    judged: Any = SimpleNamespace(
        selected=lambda found: found.mean_average_precision, config=ClassifyConfig(images="pets", select_by=select),
        looked_at=range(100),
    )  # fmt: skip
    finished: Any = [
        SimpleNamespace(contender=SimpleNamespace(name=name), metrics=found, step=20)
        for name, found in (("lora", own), ("linear-probe", probe))
    ]
    said = "worse than the linear probe's: micro_f1 is 0.667 against 1.000. The best moment was chosen by map"
    assert (said in "".join(warnings_of(judged, finished))) == warned


def test_a_single_picture_to_judge_by_is_counted_as_one() -> None:
    judged: Any = SimpleNamespace(looked_at=range(1), looked_at_side="test", config=ClassifyConfig(images="pets"))
    own: Any = SimpleNamespace(contender=SimpleNamespace(name="lora"))
    assert warnings_of(judged, [own]) == ("Only 1 test picture: the figures are uncertain.",)


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
