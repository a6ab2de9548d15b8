"""Going on where a run was cut off, averages, an early end, and the search for a rate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.config import OPTIMIZERS
from visionlora.data.groups import Group
from visionlora.errors import ConfigError, RunFolderError, TrainingError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.lora.inject import inject
from visionlora.training.checkpoint import read_state, write_state
from visionlora.training.ema import EMA
from visionlora.training.learner import LayeredLearner, rates_by_depth
from visionlora.training.loop import Fit, LoopConfig, Progress, StopTraining
from visionlora.training.rate import find_rate
from visionlora.training.settings import suited_rate

CONFIG = LoopConfig(steps=12, batch_size=4, gradient_accumulation=1, learning_rate=0.05, warmup_steps=2,
                    weight_decay=0.01, max_grad_norm=1.0, seed=3)  # fmt: skip


class Task:
    """Tell which of two halves of the input is larger."""

    groups = (Group(tuple(range(16)), 16),)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        x = torch.randn(len(index), 8, generator=generator)[part]
        target = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long()
        return nn.functional.cross_entropy(model(x), target, reduction="none")


def model_with(method: str) -> Handle:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 2))
    return inject(model, AdapterConfig(method=method, rank=2, targets=("0",), train="3", dropout=0.1))


def fit_of(handle: Handle, config: LoopConfig = CONFIG, ema: float | None = None) -> Fit:
    return Fit(
        Accelerator(cpu=True), LayeredLearner(handle, lambda name: 3.0 if name.startswith("3") else 1.0), config, ema
    )


def values(handle: Handle) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in handle.training_state().items()}


def test_pictures_are_counted_as_they_were_seen_also_with_another_batch() -> None:
    """They went back to what the steps would be with the new one, and those pictures came up again."""

    class Watched(Task):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
            self.seen += index.tolist()
            return super().losses(model, index, generator, part)

    task, first, counted = Watched(), fit_of(model_with("lora"), replace(CONFIG, steps=2)), []
    first.run(task, lambda progress: counted.append(progress.images_seen))
    for batch, steps in ((2, 4), (8, 5)):
        second = fit_of(model_with("lora"), replace(CONFIG, batch_size=batch, steps=steps))
        second.restore(first.state())
        second.run(task, lambda progress: counted.append(progress.images_seen))
        first = second
    assert counted == [4, 8, 10, 12, 20]
    assert sorted(task.seen[:12]) == sorted(set(task.seen[:12])), "none of sixteen twice"


def check_resumes(method: str, config: LoopConfig, ema: float | None, tmp_path: Path) -> None:
    """A run that is cut off after seven steps and looked at, then goes on, is the run that was left alone."""
    whole = fit_of(model_with(method), config, ema)
    whole.run(Task(), lambda _: None)

    class Killed(Exception):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 7:
            raise Killed

    first = fit_of(model_with(method), config, ema)
    with pytest.raises(Killed):
        first.run(Task(), kill)
    with first.averaged():
        first.learner.handle.training_state()
    write_state(tmp_path / "state.pt", first.state())
    torch.rand(17)  # whatever else the process did
    second = fit_of(model_with(method), config, ema)
    second.restore(read_state(tmp_path / "state.pt"))
    steps: list[int] = []
    second.run(Task(), lambda progress: steps.append(progress.step))
    assert steps == list(range(8, config.steps + 1))
    assert second.noise.last == whole.noise.last and second.noise.squares == whole.noise.squares > 0
    one, two = values(whole.learner.handle), values(second.learner.handle)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    if ema is not None:
        assert all(torch.equal(a, b) for a, b in zip(whole.ema.averages, second.ema.averages, strict=True))
    with whole.averaged(), second.averaged():  # what is written
        one, two = values(whole.learner.handle), values(second.learner.handle)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("method", ["lora", "adalora", "dora", "vera", "ia3", "full"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(method: str, ema: float | None, tmp_path: Path) -> None:
    check_resumes(method, CONFIG, ema, tmp_path)


@pytest.mark.parametrize("method", ["lora+", "dora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_it_does_with_every_optimizer(method: str, optimizer: str, tmp_path: Path) -> None:
    if OPTIMIZERS[optimizer].package is not None:
        pytest.importorskip(OPTIMIZERS[optimizer].package)
    config = replace(CONFIG, steps=27, optimizer=optimizer, learning_rate=suited_rate(0.05, optimizer))
    check_resumes(method, replace(config, schedule=OPTIMIZERS[optimizer].schedule), None, tmp_path)


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing() -> None:
    lora, wider = model_with("lora"), model_with("lora")
    other = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), AdapterConfig(rank=4, targets=("0", "1")))
    before = values(lora)
    for state in (other.training_state(), {n: t[:1] for n, t in wider.training_state().items()}, {}):
        with pytest.raises(ConfigError, match="checkpoint"):
            lora.load_training_state(state)
    after = values(lora)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_missing_or_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="There is no checkpoint"):
        read_state(tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"half")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_state(tmp_path / "state.pt")


def test_enough_learned_ends_the_run_without_an_error() -> None:
    fit, seen = fit_of(model_with("lora")), []

    def on_step(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step == 5:
            raise StopTraining

    fit.run(Task(), on_step)
    assert seen == [1, 2, 3, 4, 5] and fit.step == 5


def test_an_average_lags_behind_and_steps_aside() -> None:
    p = nn.Parameter(torch.zeros(3))
    ema = EMA([p], 0.5)
    for value in (1.0, 1.0, 1.0):
        with torch.no_grad():
            p.fill_(value)
        ema.update([p])
    # Decays 2/11, 3/12, 4/13: what is left of the start is their product.
    assert ema.averages[0].tolist() == pytest.approx([1 - 2 / 11 * 3 / 12 * 4 / 13] * 3)
    with ema.in_place_of([p]):
        assert torch.equal(p.detach(), ema.averages[0])
    assert torch.equal(p.detach(), torch.ones(3))


def test_the_search_for_a_rate_finds_one_that_learns_and_changes_nothing() -> None:
    handle, config = model_with("lora"), replace(CONFIG, batch_size=16)
    fit, before = fit_of(handle, config), values(handle)
    sweep = find_rate(fit, Task(), steps=60)
    after = values(handle)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert fit.step == 0 and not fit.optimizer.state_dict()["state"]
    assert sweep.rate is not None and 1e-4 < sweep.rate < 1
    losses: list[float] = []
    fit_of(model_with("lora"), replace(config, learning_rate=sweep.rate, steps=60)).run(
        Task(), lambda progress: losses.append(progress.loss)
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Noise(Task):
    """Losses vary from batch to batch, the first being the lowest by chance, and no rate lowers them."""

    def __init__(self) -> None:
        self.steps = 0

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        self.steps += 1
        level = 0.1 if self.steps == 1 else 1 + torch.rand((), generator=generator)
        return super().losses(model, index, generator, part) * 1e-6 + level


def test_the_search_finds_no_rate_where_only_chance_lowers_the_loss() -> None:
    """It took a tenth of the lowest it tried, at which nothing learns, when the first batch happened to be an easy one."""
    sweep = find_rate(fit_of(model_with("lora")), Noise(), steps=60)
    assert sweep.rate is None and len(sweep.points) == 60


def test_an_easy_first_batch_does_not_hide_the_rate_that_learns() -> None:
    class Easy(Task):
        steps = 0

        def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
            self.steps += 1
            return super().losses(model, index, generator, part) * (0.01 if self.steps == 1 else 1)

    sweep = find_rate(fit_of(model_with("lora"), replace(CONFIG, batch_size=16)), Easy(), steps=60)
    assert sweep.rate is not None and 1e-4 < sweep.rate < 1


def test_rates_fall_with_depth_and_the_head_has_its_own() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "head": nn.Linear(4, 2)})
    handle = inject(model, AdapterConfig(rank=1, targets=("0", "1", "2"), train="head"))
    rate_of = rates_by_depth(lambda n: int(n.split(".")[1]) if n.startswith("blocks") else None, 3, 0.5, "head", 10.0)
    groups = LayeredLearner(handle, rate_of).parameter_groups(1.0, 0.1)
    assert {(g["name"], g["lr"]) for g in groups} == {
        ("adapter", 1.0), ("adapter x 0.5", 0.5), ("adapter x 0.25", 0.25),
        ("lora_B", 1.0), ("lora_B x 0.5", 0.5), ("lora_B x 0.25", 0.25),
        ("full x 10", 10.0), ("full_1d x 10", 10.0),
    }  # fmt: skip


class Lost(Task):
    """From the fifth step on the loss is no number."""

    def __init__(self) -> None:
        self.steps = 0

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        self.steps += 1
        return super().losses(model, index, generator, part) * (float("nan") if self.steps == 5 else 1.0)


def test_the_search_for_a_rate_forgets_what_adalora_has_measured() -> None:
    """It ended in an error: a state of before the first step lacks the sensitivities."""
    handle = model_with("adalora")
    fit, before = fit_of(handle), values(handle)
    find_rate(fit, Task(), steps=20)
    after = values(handle)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_a_sweep_that_ends_in_nan_leaves_no_gradients() -> None:
    fit = fit_of(model_with("lora"))
    find_rate(fit, Lost(), steps=20)
    assert all(p.grad is None for p in fit.trained)
    seen: list[Progress] = []
    fit.run(Task(), seen.append)
    assert all(torch.isfinite(torch.tensor(p.grad_norm)) for p in seen)


@pytest.mark.parametrize(("every", "ends"), [(1, True), (2, False)])
def test_gradients_that_no_scale_of_fp16_makes_finite_end_the_run(every: int, ends: bool) -> None:
    """It went to its end with an adapter that had not learned; a step that is left out now and then is as it should be."""

    class Overflowing(Task):
        steps = 0

        def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
            self.steps += 1
            found = super().losses(model, index, generator, part)
            endless = (model(torch.ones(1, 8)) * 0).abs().sum().sqrt()  # 0, with a gradient that is no number
            return found + endless if self.steps % every == 0 else found

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    config = replace(CONFIG, steps=40)
    fit, seen = Fit(accelerator, LayeredLearner(model_with("lora"), lambda name: 1.0), config), []
    if ends:
        with pytest.raises(TrainingError, match="The gradient became nan at step 22"):
            fit.run(Overflowing(), seen.append)
    else:
        fit.run(Overflowing(), seen.append)
    assert len(seen) == (21 if ends else 40)
    assert all(bool(p.isfinite().all()) for p in fit.trained)


def test_a_second_training_is_the_only_one_that_the_accelerator_knows() -> None:
    accelerator, handle = Accelerator(cpu=True), model_with("lora")
    for _ in range(2):
        fit = Fit(accelerator, LayeredLearner(handle, lambda name: 1.0), CONFIG)
    assert [o.optimizer for o in accelerator._optimizers] == [fit.optimizer.optimizer]
