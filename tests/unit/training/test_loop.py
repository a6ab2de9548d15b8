"""The loop on a problem small enough to check by hand."""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.errors import ConfigError, TrainingError
from visionlora.training.loop import LoopConfig, Progress, rate_at, resolve_precision, train

CONFIG = LoopConfig(steps=20, batch_size=2, gradient_accumulation=1, learning_rate=0.1, warmup_steps=2,
                    weight_decay=0.0, max_grad_norm=1.0, seed=0)  # fmt: skip


class Learner:
    """All parameters of a model, in one group."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.told = model, []

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        return [{"params": list(self.model.parameters()), "lr": lr, "weight_decay": weight_decay}]

    def regularisation(self) -> None:
        return None

    def after_step(self, step: int, steps: int) -> None:
        self.told.append((step, steps, all(p.grad is not None for p in self.model.parameters())))


class Regression:
    """y = 3x, learned by one weight."""

    def __len__(self) -> int:
        return 8

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        x = torch.randn(len(index), 1, generator=generator)[part] + index[part, None]
        return (model(x) - 3 * x).square().mean(1)


def run(config: LoopConfig, task=None) -> tuple[nn.Linear, list[Progress]]:
    torch.manual_seed(0)
    learner, history = Learner(nn.Linear(1, 1, bias=False)), []
    train(Accelerator(cpu=True), learner, task or Regression(), config, history.append)
    assert learner.told == [(i + 1, config.steps, True) for i in range(config.steps)]
    return learner.model, history


def test_it_learns() -> None:
    from dataclasses import replace

    model, history = run(replace(CONFIG, steps=100))
    assert history[-1].loss < 0.05 * history[0].loss
    assert abs(model.weight.item() - 3) < 0.1


def test_two_runs_give_the_same_curve() -> None:
    assert [p.loss for p in run(CONFIG)[1]] == [p.loss for p in run(CONFIG)[1]]


def test_accumulation_gives_the_curve_of_the_larger_batch() -> None:
    from dataclasses import replace

    whole = run(replace(CONFIG, batch_size=4))[1]
    parts = run(replace(CONFIG, batch_size=1, gradient_accumulation=4))[1]
    assert [p.images_seen for p in whole] == [p.images_seen for p in parts]
    assert [p.loss for p in parts] == pytest.approx([p.loss for p in whole], rel=1e-5)


def test_warm_up_then_cosine_to_zero() -> None:
    from dataclasses import replace

    rates = [rate_at(i, replace(CONFIG, steps=100, warmup_steps=10)) for i in range(100)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 1e-4


def test_a_short_run_is_not_all_warm_up() -> None:
    from dataclasses import replace

    assert rate_at(1, replace(CONFIG, steps=10, warmup_steps=500)) == pytest.approx(0.1, rel=0.05)


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_weights() -> None:
    class Broken(Regression):
        def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
            return super().losses(model, index, generator, part) * float("nan")

    with pytest.raises(TrainingError, match="The loss became nan at step 1"):
        run(CONFIG, Broken())


def test_groups_keep_their_ratio_to_the_schedule_and_the_penalty_counts() -> None:
    class Two(Learner):
        def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
            one, other = self.model.parameters()
            return [{"params": [one], "lr": lr}, {"params": [other], "lr": 16 * lr}]

        def regularisation(self) -> Tensor:
            return 100 * self.model.bias.square().sum()

        def after_step(self, step: int, steps: int) -> None:
            self.told.append(self.model.bias.grad.item())

    torch.manual_seed(0)
    learner = Two(nn.Linear(1, 1))
    start = learner.model.bias.item()
    train(Accelerator(cpu=True), learner, Regression(), CONFIG, lambda progress: None)
    assert abs(learner.model.bias.item()) < abs(start)


@pytest.mark.parametrize(("given", "expected"), [("auto", "no"), ("fp32", "no"), ("bf16", "bf16")])
def test_precision_on_a_cpu(given: str, expected: str) -> None:
    assert resolve_precision(given, torch.device("cpu")) == expected


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision is 'fp16', but training runs on the CPU"):
        resolve_precision("fp16", torch.device("cpu"))
