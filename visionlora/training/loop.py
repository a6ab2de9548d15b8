"""The loop: batch -> loss -> gradients -> step, on accelerate; it knows nothing of diffusion or classification."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visionlora.data.groups import Group
from visionlora.errors import ConfigError, ModelError, TrainingError
from visionlora.lora.damage import damaged
from visionlora.models.devices import process_lost
from visionlora.training.ema import EMA
from visionlora.training.interrupts import Interrupts
from visionlora.training.noise import MOST_PARAMETERS, GradientNoise
from visionlora.training.optimizers import as_evaluated, build_optimizer
from visionlora.training.order import generator_at, positions_at
from visionlora.training.schedules import rate_at


@dataclass(frozen=True)
class LoopConfig:
    """What every kind of training has in common."""

    steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    seed: int
    optimizer: str = "adamw"
    betas: tuple[float, ...] = ()
    """Of the optimizer, when not its own."""
    schedule: str = "cosine"
    schedule_cycles: int = 3
    schedule_power: float = 2.0


@dataclass(frozen=True)
class Progress:
    """The state of the run after a step."""

    step: int
    loss: float
    """Mean over the step's pictures on all processes."""
    learning_rate: float
    """Of the step; with prodigy what it has found times the factor."""
    grad_norm: float
    images_seen: int
    images_per_second: float
    noise_scale: float | None = None
    """Pictures at which gradient noise and signal are equal (see `visionlora.training.noise`); None while unknown."""


class Learner(Protocol):
    """What learns: an adapter on a model (`visionlora.lora.inject.Handle`), or anything with the same methods."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with its rate at the peak of the schedule."""

    def regularisation(self) -> Tensor | None:
        """A term that the loss includes."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, while the gradients are there; steps are counted from 1."""

    def training_state(self) -> dict[str, Tensor]:
        """What training changes, for a checkpoint."""

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts a checkpoint's values back."""


class Task(Protocol):
    """What is trained."""

    @property
    def groups(self) -> Sequence[Group]:
        """The training pictures, by what may share a forward pass."""

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Loss of each picture of `index[part]`; random numbers are drawn for the whole of `index`."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """Accelerate's word for a precision; `auto` is bf16 (or fp16) on cuda, and fp32 on mps and on a CPU.

    Raises:
        ConfigError: for fp16 on a CPU, where it has no fast kernels and its gradients underflow.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision is 'fp16', but training runs on the CPU, which needs fp32 or bf16: --precision bf16."
        )
    return {"fp32": "no"}.get(precision, precision)


def check_launch() -> None:
    """Raises ConfigError where accelerate was told to split the model over processes."""
    from accelerate.utils import parse_flag_from_env

    for name, word in (("DeepSpeed", "DEEPSPEED"), ("FSDP", "FSDP"), ("Megatron-LM", "MEGATRON_LM")):
        if parse_flag_from_env(f"ACCELERATE_USE_{word}"):
            raise ConfigError(
                f"accelerate is set to {name} (ACCELERATE_USE_{word}), which splits the model over processes; here each holds "
                "the frozen base whole and adapters are small. Use plain data parallelism: `accelerate config`, or `accelerate "
                "launch --multi_gpu`. Where a base does not fit, train-sd has base_precision=nf4 and gradient_checkpointing."
            )


def process_state() -> Any:
    """What this process is among those of a run: an `accelerate.PartialState`.

    On a machine without a GPU accelerate must be told so, or several processes each take themselves for the only one.

    Raises:
        ConfigError: see `check_launch`.
    """
    from accelerate import PartialState

    check_launch()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=several and not (torch.cuda.is_available() or torch.xpu.is_available()))


def new_accelerator(
    precision: str, trackers: Sequence[str] = (), folder: Path | None = None, parts_stop: bool = False
) -> Any:
    """An `accelerate.Accelerator`, also when the last run of this process had another precision.

    Args:
        precision: see `resolve_precision`.
        trackers: words of accelerate; they are started when the first number is logged.
        folder: of the run, under whose logs/ they write.
        parts_stop: whether some of what trains stops on the way, which several processes must expect.

    Raises:
        ConfigError: see `resolve_precision` and `check_launch`.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    mixed_precision = resolve_precision(precision, process_state().device)
    AcceleratorState._reset_state()  # it remembers the first precision; the processes' own state is left alone
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if parts_stop else []
    more: dict[str, Any] = {}
    if trackers and folder is not None:
        from accelerate.utils import ProjectConfiguration

        more["log_with"] = list(trackers)
        more["project_config"] = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs"))
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, **more)
    # The environment may name others, by which `backward` would divide: `Fit` divides by those of the settings itself.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


class NotFinite(TrainingError):
    """A loss or gradient that is NaN or infinite; the weights are as before the step."""

    def __init__(self, what: str, value: float, step: int, rate: float) -> None:
        self.event = f"The {what} became {value} at step {step}."
        """What happened, without its causes."""
        super().__init__(
            f"{self.event} The usual causes: a learning rate that is too high (now {rate:g}; try a third of it), fp16 (try "
            "--precision bf16), or a picture that is not like the others."
        )
        self.value = value
        """NaN or infinite."""


MOST_SKIPPED = 3
"""Steps in a row that may be lost to values that are not finite."""
MOST_OVERFLOWS = 20
"""Steps in a row that the scaler of fp16 may leave out while it looks for its scale: by then 2^16 has become less than 1."""
RECENT = 50
"""Steps over which a loss is averaged before it is told."""


def recent_loss(history: Sequence[Progress]) -> float:
    """Mean loss over the last steps, without those that were skipped."""
    last = [p.loss for p in history[-RECENT:] if math.isfinite(p.loss)]
    return sum(last) / len(last) if last else math.nan


def into_training(model: nn.Module) -> None:
    """Training mode, but for batch normalisation: its running statistics are the base's, which adapters do not hold."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()


class StopTraining(Exception):
    """Raised by `on_step` when enough was learned: the run ends as if its steps were done."""


class Fit:
    """One training run: the optimizer and all that has to be kept for the run to go on later as if never cut off."""

    def __init__(self, accelerator: Any, learner: Learner, config: LoopConfig, ema_decay: float | None = None) -> None:
        """Nothing is trained yet.

        Args:
            accelerator: of accelerate.
            learner: what learns.
            config: steps, rates, batch.
            ema_decay: keep an average of the parameters with this decay (see `visionlora.training.ema`).
        """
        # Of an earlier training; a scaler of fp16 would scale the gradients that both know back twice.
        accelerator.free_memory()
        self.accelerator, self.learner, self.config = accelerator, learner, config
        groups = learner.parameter_groups(config.learning_rate, config.weight_decay)
        self.trained = [p for group in groups for p in group["params"]]
        optimizer = build_optimizer(groups, config)
        self.peaks = [group["lr"] / config.learning_rate for group in optimizer.param_groups]
        self.averages_itself = hasattr(optimizer, "eval")
        """Whether what the optimizer has learned is not what it trains at."""
        self.model, self.optimizer = accelerator.prepare(learner.model, optimizer)
        self.ema = EMA(self.trained, ema_decay) if ema_decay is not None else None
        small = sum(p.numel() for p in self.trained) <= MOST_PARAMETERS
        self.noise = GradientNoise(self.trained, self.images_per_step) if small else None
        self.step = 0
        """Steps done."""
        self.images_seen = 0
        """Pictures in them; counted, not computed, as a run may go on with another batch."""
        self.skipped = 0
        """Steps in a row, up to now, that were lost."""
        self.overflows = 0
        """Steps in a row, up to now, that the scaler of fp16 left out."""
        self.whole = True
        """Whether the last step is done with all that follows from it, so that its state may be kept."""
        self.together = False
        """Whether all processes end now, as one of them was asked to."""

    @property
    def images_per_step(self) -> int:
        """On all processes together."""
        config = self.config
        return int(config.batch_size * config.gradient_accumulation * self.accelerator.num_processes)

    def run(
        self, task: Task, on_step: Callable[[Progress], None], on_interrupt: Callable[[], None] | None = None
    ) -> None:
        """Runs the steps that are left; `on_step` is called after each, and an exception it raises ends the run.

        Ctrl-C waits for the end of a step and its `on_step`, after `on_interrupt` was called; a second one does not. In the
        last step, too, it ends in KeyboardInterrupt: what comes after the loop may be long. Whichever process of several heard
        it, all end after the same step.

        Each step sees batch_size x gradient_accumulation pictures on every process; all processes draw the random numbers
        of the whole step and take their share, so the curve is the same on one process and on several. A step whose loss
        or gradient is NaN or infinite changes nothing; its `Progress` has such a loss.

        Raises:
            NotFinite: when three steps in a row are so; the weights are those of the last good one, and may be kept.
            ProcessLost: when another process has ended.
        """
        into_training(self.model)
        with Interrupts(on_interrupt, self._any) as interrupts:
            try:
                self._run(task, on_step, interrupts)
            except RuntimeError as e:
                if (lost := process_lost(e)) is None:
                    raise
                raise lost from e

    def _any(self, asked: bool) -> bool:
        """Whether any process was asked to end: one alone would leave the others waiting, with what they have learned."""
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            asked = bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum"))
            self.together = asked
        return asked

    def wait_for_saving(self) -> None:
        """Where all processes end together: waits until all has been saved, as a launcher ends all with the first that ends."""
        if self.together:
            self.accelerator.wait_for_everyone()

    def _run(self, task: Task, on_step: Callable[[Progress], None], interrupts: Interrupts) -> None:
        first, spent = self.step, 0.0
        while self.step < self.config.steps:
            interrupts.check()
            start = time.monotonic()
            try:
                loss, norm = self.advance(task, rate_at(self.step, self.config))
                self.skipped = 0
            except NotFinite as e:
                self.skipped += 1
                self.optimizer.zero_grad()
                if self.skipped >= MOST_SKIPPED:
                    self.skipped, self.whole = 0, True  # kept so, the run may go on at another rate
                    raise
                self.whole = False
                self._count()
                loss, norm = e.value, math.nan
            spent += time.monotonic() - start  # what `on_step` draws and writes is not training
            speed = (self.step - first) * self.images_per_step / max(1e-9, spent)
            try:
                rate = rate_at(self.step - 1, self.config) * float(self.optimizer.param_groups[0].get("d", 1.0))
                on_step(Progress(self.step, loss, rate, norm, self.images_seen, speed, self.noise_scale))
            except StopTraining:
                self.whole = True
                break
            self.whole = True
        interrupts.check()

    def advance(self, task: Task, rate: float) -> tuple[float, float]:
        """One step at this learning rate: (loss, norm of the gradient)."""
        config, accelerator = self.config, self.accelerator
        micro, shares = config.batch_size, config.gradient_accumulation
        turn = micro * accelerator.num_processes
        images_seen = -(-self.images_seen // turn) * turn  # the same, unless the batch was changed on the way
        index = positions_at(config.seed, images_seen, self.images_per_step, turn, task.groups)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = rate * peak
        total = torch.zeros((), device=accelerator.device)
        for share in range(shares):
            with accelerator.no_sync(self.model) if share < shares - 1 else nullcontext():
                total += self._backward(task, index, images_seen, share)
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise self._base_damaged() or NotFinite("loss", mean, self.step + 1, rate)
        norm = accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)
        if accelerator.scaler is None and not math.isfinite(norm):  # a scaler of fp16 skips such steps by itself
            raise self._base_damaged() or NotFinite("gradient", float(norm), self.step + 1, rate)
        self.whole = False  # up to here the state is that of the step before
        if self.noise is not None:
            self.noise.add(float(norm), max(1.0, (float(norm) + 1e-6) / config.max_grad_norm))
        self.optimizer.step()
        # Of kernels that leave the step out by themselves accelerate does not see that it was.
        skipped = accelerator.optimizer_step_was_skipped or not math.isfinite(norm)
        self.overflows = self.overflows + 1 if skipped else 0
        if self.overflows >= MOST_OVERFLOWS:
            raise NotFinite("gradient", float(norm), self.step + 1, rate)
        self._count()
        self.learner.after_step(self.step, config.steps)
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.trained)
        return mean, float(norm)

    def _base_damaged(self) -> ModelError | None:
        """What is said where the base itself holds NaN, so that no learning rate helps."""
        model = self.learner.model
        return damaged("The weights of the base", {type(model).__name__: model}, self.trained)

    def _backward(self, task: Task, index: Tensor, images_seen: int, share: int) -> Tensor:
        """Adds the gradients of one share of a step's pictures on this process; its part of the loss, in fp32."""
        config, accelerator = self.config, self.accelerator
        micro, shares = config.batch_size, config.gradient_accumulation
        first = (accelerator.process_index * shares + share) * micro
        # Of dropout and the like, which take the global generator.
        torch.manual_seed(generator_at(config.seed, images_seen + first, "dropout").initial_seed())
        with accelerator.autocast():
            losses = task.losses(self.model, index, generator_at(config.seed, images_seen), slice(first, first + micro))
        loss = losses.mean() / shares
        penalty = self.learner.regularisation()
        accelerator.backward(loss if penalty is None else loss + penalty / shares)
        return loss.detach().float()

    def first_loss(self, task: Task) -> float:
        """The mean loss of the run's first pictures with the weights as they are; NaN where a gradient's norm is not finite.

        Of as many steps as may be lost in a row: weights that are ruined still give some pictures a finite gradient.
        """
        accelerator, config = self.accelerator, self.config
        turn, total = config.batch_size * accelerator.num_processes, torch.zeros((), device=accelerator.device)
        for images_seen in range(0, MOST_SKIPPED * turn, turn):
            self.optimizer.zero_grad()
            index = positions_at(config.seed, images_seen, self.images_per_step, turn, task.groups)
            total += self._backward(task, index, images_seen, 0) * config.gradient_accumulation / MOST_SKIPPED
            gradients = [p.grad for p in self.trained if p.grad is not None]
            if accelerator.scaler is None and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
                total += math.nan
        self.optimizer.zero_grad()
        return float(accelerator.reduce(total, "mean"))

    def _count(self) -> None:
        """One step more is done."""
        self.step, self.images_seen = self.step + 1, self.images_seen + self.images_per_step

    @property
    def noise_scale(self) -> float | None:
        """Of the gradient, in pictures; None while it cannot be told."""
        found = None if self.noise is None else self.noise.scale()
        return None if found is None or found.at_least else found.pictures

    def averaged(self) -> AbstractContextManager[None]:
        """The running average, of ours or of the optimizer, stands in for the parameters meanwhile, where there is one."""
        if self.ema is not None:
            return self.ema.in_place_of(self.trained)
        return as_evaluated(self.optimizer, self.trained) if self.averages_itself else nullcontext()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on; the random numbers follow from the seed and the step."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "learner": dict(self.learner.training_state()),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state(),
            "noise": None if self.noise is None else self.noise.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ConfigError: when it is of another adapter.
        """
        self.learner.load_training_state(state["learner"])
        decays = [group.get("weight_decay") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            if decay is not None:  # it may have been changed; the rate is set at each step
                group["weight_decay"] = decay
        if self.ema is not None and state["ema"] is not None:
            self.ema.restore(state["ema"])
        if self.noise is not None and state.get("noise") is not None:  # older checkpoints have none
            self.noise.restore(state["noise"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self.overflows = int(state["step"]), int(state["skipped"]), 0
        self.images_seen = int(state["images_seen"])


def train(
    accelerator: Any,
    learner: Learner,
    task: Task,
    config: LoopConfig,
    on_step: Callable[[Progress], None],
) -> None:
    """Runs `config.steps` optimizer steps; see `Fit.run`."""
    Fit(accelerator, learner, config).run(task, on_step)
