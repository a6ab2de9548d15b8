"""The losses, and which pictures a step takes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionlora.data.preprocess import Preprocessing
from visionlora.vision.augment import Augmentation
from visionlora.vision.material import class_weights
from visionlora.vision.task import ClassificationTask, Objective


class Memory:
    """Pictures in memory: each is filled with its own number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def stored(self, indices: list[int]) -> np.ndarray:
        return np.stack([np.full((8, 8, 3), i, np.uint8) for i in indices])


def logits_and_targets(multi_label: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    if multi_label:
        return logits, (torch.rand(6, 4, generator=generator) < 0.4).float()
    return logits, F.one_hot(torch.tensor([0, 1, 2, 3, 1, 0]), 4).float()


def test_one_label_is_cross_entropy() -> None:
    logits, targets = logits_and_targets(False)
    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(logits, targets.argmax(1), reduction="none", label_smoothing=smoothing)
        assert torch.allclose(Objective(label_smoothing=smoothing).losses(logits, targets), want, atol=1e-6)


def test_several_labels_are_binary_cross_entropy() -> None:
    logits, targets = logits_and_targets(True)
    want = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    assert torch.allclose(Objective(True).losses(logits, targets), want, atol=1e-6)


def test_the_weight_of_a_class_multiplies_its_pictures() -> None:
    logits, targets = logits_and_targets(False)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    plain, weighted = Objective().losses(logits, targets), Objective(class_weights=weights).losses(logits, targets)
    assert torch.allclose(weighted, plain * weights[targets.argmax(1)])


def test_with_several_labels_the_weight_is_that_of_pictures_which_have_the_label() -> None:
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    weights = class_weights("auto", targets, ("often", "rare"), True)
    assert weights is not None and weights[1] / weights[0] == pytest.approx([1.0, 3.0])
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    plain = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=torch.tensor([1.0, 3.0]), reduction="none")
    weighted = Objective(True, class_weights=weights).losses(logits, targets)
    assert torch.allclose(weighted, plain.mean(1) * weights[0, 0])
    every = torch.where(targets > 0, weights[1], weights[0])
    assert every.mean() == pytest.approx(1.0)
    named = class_weights({"rare": 5.0}, targets, ("often", "rare"), True)
    assert named is not None and named[1] / named[0] == pytest.approx([1.0, 5.0])


@pytest.mark.parametrize("given", ["auto", {"a": 4.0}])
def test_weights_of_classes_have_the_mean_1_over_the_training_pictures(given: str | dict[str, float]) -> None:
    targets = F.one_hot(torch.tensor([0, 1, 1, 1]), 2).float()
    weights = class_weights(given, targets, ("a", "b"), False)
    assert weights is not None and (targets * weights).sum(1).mean() == pytest.approx(1.0)
    assert weights[0] / weights[1] == pytest.approx(3.0 if given == "auto" else 4.0)


@pytest.mark.parametrize("multi_label", [False, True])
def test_focal_loss_forgets_what_is_well_known(multi_label: bool) -> None:
    logits, targets = logits_and_targets(multi_label)
    plain, focal = (Objective(multi_label, focal_gamma=g).losses(logits, targets) for g in (0.0, 2.0))
    if not multi_label:
        p = logits.softmax(1)[targets > 0]
        assert torch.allclose(focal, plain * (1 - p) ** 2, atol=1e-6)
    assert (focal < plain).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("multi_label", [False, True])
def test_focal_loss_of_what_is_surely_known_has_gradients(multi_label: bool, gamma: float) -> None:
    logits = torch.tensor([[90.0, -90.0], [1.0, 2.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for smoothing in (0.0, 0.1):
        losses = Objective(multi_label, smoothing, gamma).losses(logits, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert torch.isfinite(losses).all() and torch.isfinite(gradient).all() and gradient[1].abs().min() > 0


def task(balanced: bool = False, mixup: float = 0.0) -> ClassificationTask:
    targets = F.one_hot(torch.tensor([0] * 18 + [1] * 2), 2).float()
    augmentation = Augmentation(Preprocessing(8), "none", flip=False)
    return ClassificationTask(Memory(20), tuple(range(20)), targets, augmentation, Objective(), mixup, 0.0, balanced)


class Seen(nn.Module):
    """Remembers its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.x = nn.Parameter(torch.zeros(())), torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return torch.stack([x.mean((1, 2, 3)), self.weight + x.std((1, 2, 3))], 1)


@pytest.mark.parametrize("settings", [{}, {"balanced": True}])
def test_parts_of_a_step_are_the_step(settings: dict) -> None:
    index, model = torch.tensor([3, 1, 19, 7, 0, 2]), Seen()

    def losses(part: slice) -> torch.Tensor:
        return task(**settings).losses(model, index, torch.Generator().manual_seed(4), part)

    whole = losses(slice(0, 6))
    assert torch.equal(torch.cat([losses(slice(0, 2)), losses(slice(2, 6))]), whole)


def test_balanced_sampling_draws_classes_evenly() -> None:
    chosen = task().drawn_evenly(4000, torch.Generator().manual_seed(0))
    assert (chosen >= 18).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_mixup_reaches_the_model_and_the_loss() -> None:
    index, model, seen = torch.tensor([0, 5, 19]), Seen(), {}
    for mixup in (0.0, 1.0):
        seen[mixup] = task(mixup=mixup).losses(model, index, torch.Generator().manual_seed(4), slice(0, 3)), model.x
    assert not torch.equal(seen[0.0][1], seen[1.0][1])
    assert not torch.equal(seen[0.0][0], seen[1.0][0])
