"""Several adapters that learn together."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.training.learner import JointLearner, Part
from visionlora.training.loop import Fit, LoopConfig

CONFIG = LoopConfig(steps=8, batch_size=4, gradient_accumulation=1, learning_rate=0.05, warmup_steps=1,
                    weight_decay=0.01, max_grad_norm=1.0, seed=3)  # fmt: skip


class Task:
    """Learn zero."""

    groups = (Group(tuple(range(8)), 8),)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        return model(torch.randn(len(index), 8, generator=generator)[part]).square().mean(1)


def joint(stop: float = 1.0, factor: float = 0.5) -> JointLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
    handles = [inject(part, AdapterConfig(rank=2, targets=("0",))) for part in (nn.Sequential(model[0]), model[1])]
    return JointLearner(model, [Part("one", handles[0]), Part("two", handles[1], factor, stop)])


def values(learner: JointLearner) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in learner.training_state().items()}


def test_each_part_has_its_rate() -> None:
    groups = joint().parameter_groups(1.0, 0.1)
    assert {(g["name"], g["lr"]) for g in groups} == {
        ("one adapter", 1.0), ("one lora_B", 1.0), ("two adapter", 0.5), ("two lora_B", 0.5),
    }  # fmt: skip


def test_a_part_that_has_stopped_stays_and_a_resumed_run_knows() -> None:
    learner, seen = joint(stop=0.5), []
    Fit(Accelerator(cpu=True), learner, CONFIG).run(Task(), lambda _: seen.append(values(learner)))
    two = [v for v in seen[0] if v.startswith("two/0")]
    one = [v for v in seen[0] if v.startswith("one/0")]
    assert all(torch.equal(seen[3][n], seen[7][n]) for n in two)
    assert all(not torch.equal(seen[2][n], seen[3][n]) for n in two)
    assert all(not torch.equal(seen[6][n], seen[7][n]) for n in one)
    assert not bool(seen[2]["two/stopped"]) and bool(seen[3]["two/stopped"])


@pytest.mark.parametrize("at", [2, 6])
def test_it_goes_on_in_the_same_bits(at: int) -> None:
    import copy

    whole = Fit(Accelerator(cpu=True), joint(stop=0.5), CONFIG)
    kept = {}

    def on_step(progress) -> None:
        if progress.step == at:
            kept.update(copy.deepcopy(whole.state()))

    whole.run(Task(), on_step)
    again = Fit(Accelerator(cpu=True), joint(stop=0.5), CONFIG)
    again.restore(kept)
    again.run(Task(), lambda _: None)
    one, two = values(whole.learner), values(again.learner)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_without_the_adapter_it_is_the_base() -> None:
    learner, x = joint(), torch.randn(3, 8)
    before = learner.model(x)
    for part in learner.parts:
        for m in part.learning.methods.values():
            nn.init.normal_(m.lora_B)
    after = learner.model(x)
    with learner.without_adapter():
        assert torch.equal(learner.model(x), before)
    assert torch.equal(learner.model(x), after) and not torch.equal(after, before)
