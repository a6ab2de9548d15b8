"""The loop on a problem small enough to check by hand."""

import math
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.errors import ConfigError, ModelError, ProcessLost, TrainingError
from visionlora.training.loop import (
    Fit,
    LoopConfig,
    Progress,
    StopTraining,
    new_accelerator,
    process_state,
    resolve_precision,
    train,
)
from visionlora.training.schedules import rate_at

from ...doubles import Learner, become_process

CONFIG = LoopConfig(steps=20, batch_size=2, gradient_accumulation=1, learning_rate=0.1, warmup_steps=2,
                    weight_decay=0.0, max_grad_norm=1.0, seed=0)  # fmt: skip


class Regression:
    """y = 3x, learned by one weight."""

    groups = (Group(tuple(range(8)), 8),)

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


class Broken(Regression):
    """Its losses are not finite at some calls, counted from 0; or its gradients."""

    def __init__(self, calls: tuple[int, ...], factor: float = float("nan")) -> None:
        self.calls, self.factor, self.count = calls, factor, 0

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        found, self.count = super().losses(model, index, generator, part), self.count + 1
        if self.count - 1 not in self.calls:
            return found
        if self.factor == 0:  # sqrt at zero: the value is fine, its gradient is not
            return found + (model.weight.sum() * 0).sqrt()
        return found * self.factor


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(factor: float) -> None:
    torch.manual_seed(0)
    learner, weights, losses = Learner(nn.Linear(1, 1, bias=False)), [], []

    def on_step(progress: Progress) -> None:
        weights.append(learner.model.weight.item())
        losses.append(progress.loss)

    train(Accelerator(cpu=True), learner, Broken((3, 4, 9), factor), CONFIG, on_step)
    assert weights[2] == weights[3] == weights[4] != weights[5] and weights[8] == weights[9] != weights[10]
    assert len(losses) == CONFIG.steps
    if factor:
        assert [i for i, loss in enumerate(losses) if not math.isfinite(loss)] == [3, 4, 9]


def test_three_in_a_row_stop_the_run_at_the_last_good_weights() -> None:
    torch.manual_seed(0)
    learner, weights = Learner(nn.Linear(1, 1, bias=False)), []
    with pytest.raises(TrainingError, match=r"The loss became nan at step 8\. The usual causes: a learning rate"):
        train(Accelerator(cpu=True), learner, Broken((5, 6, 7)), CONFIG,
              lambda _: weights.append(learner.model.weight.item()))  # fmt: skip
    assert learner.model.weight.item() == weights[4]


@pytest.mark.parametrize(
    ("word", "name"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")]
)
def test_a_model_is_not_split_over_processes(word: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{word}", "true")
    with pytest.raises(ConfigError, match=rf"^accelerate is set to {name} \(ACCELERATE_USE_{word}\), which splits"):
        process_state()
    monkeypatch.setenv(f"ACCELERATE_USE_{word}", "false")
    assert process_state().num_processes == 1


def test_batch_normalisation_stays_the_bases() -> None:
    """Its running statistics are in no adapter: were they to move, the file would mean another base than the one there is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
    before = {n: b.clone() for n, b in model.named_buffers()}
    train(Accelerator(cpu=True), Learner(model), Regression(), CONFIG, lambda _: None)
    assert model[1].training and all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    """Signals come at any moment; a step, and what is looked at after it, is kept whole or not at all."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told, done = [], []

    class Interrupted(Regression):
        def losses(self, *arguments) -> Tensor:
            if len(done) == 4:
                signal.raise_signal(signal.SIGINT)
            return super().losses(*arguments)

    fit = Fit(Accelerator(cpu=True), Learner(nn.Linear(1, 1, bias=False)), CONFIG)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit.run(Interrupted(), lambda p: done.append(p.step), lambda: told.append("heard"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [1, 2, 3, 4, 5] and fit.step == 5 and fit.whole and told == ["heard"]
    with pytest.raises(ZeroDivisionError):
        fit.run(Regression(), lambda p: 1 / 0)
    assert fit.step == 6 and not fit.whole, "nobody has seen that step"


class Gone(Regression):
    """Ends in an error from the fifth step on."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def losses(self, *arguments) -> Tensor:
        self.calls += 1
        if self.calls > 4:
            raise self.error
        return super().losses(*arguments)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")]
)  # fmt: skip
def test_what_cuts_a_step_off_before_the_weights_change_costs_that_step_alone(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ProcessLost
    fit = Fit(Accelerator(cpu=True), Learner(nn.Linear(1, 1, bias=False)), CONFIG)
    become_process(monkeypatch, 0)
    with pytest.raises(expected):
        fit.run(Gone(error), lambda p: None)
    assert fit.step == 4 and fit.whole


def test_other_errors_stay_what_they_are() -> None:
    error = RuntimeError("shapes do not fit")
    fit = Fit(Accelerator(cpu=True), Learner(nn.Linear(1, 1, bias=False)), CONFIG)
    with pytest.raises(RuntimeError) as caught:
        fit.run(Gone(error), lambda p: None)
    assert caught.value is error


@pytest.mark.parametrize("enough", [4, CONFIG.steps + 1])
def test_ctrl_c_in_the_last_step_is_not_forgotten(enough: int) -> None:
    """In the one where patience ends neither: it was said that the run stops after this step."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    last = min(enough, CONFIG.steps)

    def on_step(progress: Progress) -> None:
        if progress.step == last:
            signal.raise_signal(signal.SIGINT)
        if progress.step == enough:
            raise StopTraining

    fit = Fit(Accelerator(cpu=True), Learner(nn.Linear(1, 1, bias=False)), CONFIG)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit.run(Regression(), on_step)
    finally:
        signal.signal(signal.SIGINT, before)
    assert fit.step == last and fit.whole


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


@pytest.mark.parametrize(("there", "expected"), [(True, "bf16"), (False, "fp16")])
def test_precision_on_a_gpu_that_has_bf16_or_imitates_it(there: bool, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: there or including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("given", "expected"), [("auto", "no"), ("fp32", "no"), ("bf16", "bf16")])
def test_precision_on_a_cpu(given: str, expected: str) -> None:
    assert resolve_precision(given, torch.device("cpu")) == expected


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision is 'fp16', but training runs on the CPU"):
        resolve_precision("fp16", torch.device("cpu"))


def test_the_environment_does_not_divide_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own setting, of a job script or a config file of its, made every gradient smaller without a word."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    new_accelerator("fp32").backward(3 * weight)
    assert weight.grad == 3


def test_one_process_may_train_in_one_precision_after_another() -> None:
    kinds = [new_accelerator(precision).mixed_precision for precision in ("fp32", "bf16", "fp32")]
    assert kinds == ["no", "bf16", "no"]


def test_a_base_that_holds_nan_is_named_at_the_first_step() -> None:
    """No learning rate helps there, and nothing is worth keeping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    model[0].weight.data.fill_(torch.nan)
    learner = Learner(model)
    learner.parameter_groups = lambda lr, weight_decay: [{"params": [model[1].weight], "lr": lr}]
    with pytest.raises(ModelError, match=r"hold NaN or infinite values: 1 tensor of Sequential \(first '0\.weight'\)"):
        train(Accelerator(cpu=True), learner, Regression(), CONFIG, lambda _: None)


@pytest.mark.parametrize(("xpu", "cpu"), [(True, False), (False, True)])
def test_several_processes_stay_on_the_gpus_of_intel(xpu: bool, cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    become_process(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    monkeypatch.setattr("accelerate.PartialState", dict)
    assert process_state() == {"cpu": cpu}
