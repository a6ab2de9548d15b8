"""What every kind of training can be told."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from visionlora.config.choices import (
    OPTIMIZERS,
    PISSA_METHODS,
    RUN_INITS,
    SCHEDULES,
    TRACKERS,
    WITHOUT_INIT,
    WITHOUT_RANKS,
    optimizer_problem,
    tracker_problem,
)
from visionlora.config.reading import raise_all, take
from visionlora.errors import nearest

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

MOST_RATE = 1000
"""The highest learning rate that is taken."""
LARGEST = 1e30
"""Numbers beyond are as good as infinite: products of two would be, in fp32."""

RESUME_AUTO = "auto"
"""As `resume`: whichever run was cut off last."""

Rule = tuple[str, bool, str]
"""A setting, whether its value is fine, and what it must be."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that train-sd and classify share, checked at construction.

    Raises:
        ConfigError: naming every setting that is out of range, in one message.
    """

    images: str = ""
    """Folder of pictures to learn from."""
    model: str = "auto"
    """What is fine-tuned; `auto` takes the embedded model where there is no CUDA GPU."""
    output: str | None = None
    """Run folder to create; by default a new one under runs/."""
    steps: int | None = None
    """Optimizer steps; by default what suits the base model."""
    epochs: float | None = None
    """Passes over the training pictures, each as often as it repeats, instead of `steps`."""
    method: str = "lora"
    """lora, rslora, lora+, lora-fa, tlora, dora, adalora, vera, ia3, or full as a baseline; of classify also linear-probe."""
    rank: int | Literal["auto"] = 8
    """Rank of each ΔW; auto measures on the pictures which layers need it and spends `rank_budget` there."""
    rank_budget: str = "8"
    """For rank auto: a mean rank (8), a number of parameters that train (300k, 1.5M) or a size of the file (2MB, without its
    header). Text encoders that train have their part of it, a classifier's head has not."""
    alpha: float | None = None
    """Scaling numerator; equal to the rank when not given. With rank auto it is over the mean rank of `rank_budget`, or 8,
    in every layer."""
    targets: str = "attn"
    """What to adapt: roles, names or re:regex, separated by commas."""
    learning_rate: float | None = None
    """Of the optimizer, after warm-up; by default what suits it and the base model (for prodigy 1, a factor)."""
    warmup_steps: int = 20
    """Steps over which the rate rises linearly, at most a tenth of the run; then comes the schedule."""
    optimizer: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, lion, schedulefree or sgd."""
    betas: tuple[float, ...] = ()
    """Of the optimizer, when not its own: two numbers; for sgd the momentum, for adafactor a beta1 that it lacks by default."""
    schedule: str | None = None
    """cosine, constant, linear, cosine-restarts or polynomial; by default cosine, for prodigy and schedulefree constant."""
    schedule_cycles: int = 3
    """Of cosine-restarts: how often the rate falls to zero."""
    schedule_power: float = 2.0
    """Of polynomial: the rate falls as the share of steps that are left to this power."""
    weight_decay: float = 0.01
    """Of the optimizer, times the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    batch_size: int | None = None
    """Pictures per forward pass and process; by default what suits the base model."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    init: str = "kaiming"
    """How the adapter starts: kaiming, gaussian, orthogonal or pissa; adalora, vera, ia3 and full have a start of their own."""
    basis_index: int = 0
    """Part of the shared basis for init orthogonal; adapters that will be combined take different ones."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: bf16 on a GPU that has it, fp32 on a CPU."""
    save_memory: bool | None = None
    """Keep of the layers between the adapted ones only what the backward pass needs; by default unless the base model is small,
    which then learns faster than it saves."""
    seed: int = 0
    """Of everything random."""
    patience: int | None = None
    """Stop after so many evaluations without a better one."""
    ema_decay: float | None = None
    """Keep a running average of what trains, and use it; 0.99 to 0.9999."""
    trackers: tuple[str, ...] = ()
    """Also log to tensorboard, wandb or trackio, under logs/ of the run folder; metrics.jsonl is always written."""
    start_from: str | None = None
    """Adapter to learn on from, of any trainer: a file, a run or a PEFT folder. Layers, ranks, scalings and a learned word are
    its own then, and with model auto the base."""
    resume: str | None = None
    """Run folder to go on with, or `auto`: the newest unfinished run of these pictures, a new one where there is none."""
    force: bool = False
    """Go on with other settings or pictures than the run had, where that makes sense."""
    skip_broken: bool = False
    """Leave out pictures that cannot be used instead of stopping."""

    def __post_init__(self) -> None:
        take(self)
        for name in ("trackers", "baselines"):
            words = [word.strip() for given in getattr(self, name, ()) for word in given.split(",")]
            if words:
                object.__setattr__(self, name, tuple(words))
        for name in ("output", "resume"):
            object.__setattr__(self, name, at_home(getattr(self, name)))
        rule = f"it must be a finite number, of at most {LARGEST:g}"
        wild = {f.name: rule for f in fields(self) if not _finite(getattr(self, f.name))}
        rules = [*wild.items(), *((name, rule) for name, fine, rule in self.rules() if not fine and name not in wild)]
        raise_all([f"{name} is {getattr(self, name)!r}; {rule}" for name, rule in rules])

    @property
    def title(self) -> str:
        """What the pictures are called: the name of their folder or table, of several the first."""
        folders = getattr(self, "folders", ())
        path = Path(folders[0].path if folders else self.images).expanduser().resolve()
        name = path.name if path.is_dir() else path.stem
        # Archives of other systems leave bytes in names that are no UTF-8, which no file of a run could hold.
        return name.encode("utf-8", "ignore").decode("utf-8") or "pictures"

    def rules(self) -> list[Rule]:
        """What must hold."""
        return [
            ("images", bool(self.images), "name the folder of pictures to learn from: --images ./dog"),
            ("steps", self.steps is None or self.steps >= 1, "it must be at least 1"),
            ("epochs", self.epochs is None or self.epochs > 0, "it must be positive"),
            (
                "epochs",
                self.epochs is None or self.steps is None,
                "give epochs or steps, not both (steps=none leaves out those of a config file)",
            ),
            ("rank", self.rank == "auto" or self.rank >= 1, "it must be at least 1, or auto"),
            (
                "rank",
                self.rank != "auto" or self.method not in WITHOUT_RANKS,
                f"method {self.method} has no ranks that could be spread: leave rank=auto out",
            ),
            (
                "rank_budget",
                budget_of(self.rank_budget) is not None,
                "write a mean rank (8), parameters (300k) or a size (2MB)",
            ),
            ("alpha", self.alpha is None or (math.isfinite(self.alpha) and self.alpha > 0), "it must be positive"),
            rate_rule("learning_rate", self.learning_rate),
            ("warmup_steps", self.warmup_steps >= 0, "it must be 0 or more"),
            *self.optimizer_rules(),
            ("weight_decay", self.weight_decay >= 0, "it must be 0 or more"),
            ("max_grad_norm", self.max_grad_norm > 0, "it must be positive"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "it must be at least 1"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "it must be at least 1"),
            *self.init_rules(),
            ("dropout", 0 <= self.dropout < 1, "it must be at least 0 and below 1"),
            ("patience", self.patience is None or self.patience >= 1, "it must be at least 1"),
            ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "it must be at least 0 and below 1"),
            ("precision", self.precision in PRECISIONS, nearest(self.precision, PRECISIONS)),
            (
                "start_from",
                self.start_from is None or self.rank != "auto",
                "the ranks are the adapter's: leave rank=auto out",
            ),
            (
                "start_from",
                self.start_from is None or self.method not in ("full", "adalora", "linear-probe"),
                f"{self.method} cannot go on from an adapter: leave the method out",
            ),
            ("seed", 0 <= self.seed < 2**63, "it must be between 0 and 2^63 - 1"),
            *self.tracker_rules(),
        ]

    def init_rules(self) -> list[Rule]:
        """What must hold of the start of the adapter."""
        suits = [word for word in RUN_INITS if word != "pissa" or self.method in PISSA_METHODS]
        return [
            (
                "basis_index",
                self.basis_index == 0 or self.init == "orthogonal",
                "it is for init orthogonal, which has a basis: give that too, or leave it out",
            ),
            (
                "init",
                self.init == "kaiming" or self.method not in WITHOUT_INIT,
                f"method {self.method} has a start of its own: leave init out",
            ),
            (
                "init",
                self.init != "eva" or self.method in WITHOUT_INIT,
                f"it needs inputs that are measured before, with vl.input_spectra in Python: take {' or '.join(suits)}",
            ),
            (
                "init",
                self.init != "pissa" or self.method in (*PISSA_METHODS, *WITHOUT_INIT),
                f"it starts both factors of a LoRA, which method {self.method} has not so: take {' or '.join(suits)}",
            ),
        ]

    def optimizer_rules(self) -> list[Rule]:
        """What must hold of the optimizer and its schedule, also that it is installed."""
        schedule = (
            ("schedule", self.schedule is None or self.schedule in SCHEDULES, nearest(self.schedule or "", SCHEDULES)),
            ("schedule_cycles", self.schedule_cycles >= 1, "it must be at least 1"),
            ("schedule_power", 0 < self.schedule_power < math.inf, "it must be positive"),
        )
        if self.optimizer not in OPTIMIZERS:
            return [("optimizer", False, nearest(self.optimizer, OPTIMIZERS)), *schedule]
        word, problem = OPTIMIZERS[self.optimizer], optimizer_problem(self.optimizer)
        lowest = 0 if not word.averages else 1e-3  # what it averages is found by a division by the first beta
        return [
            ("optimizer", problem is None, problem or ""),
            (
                "optimizer",
                not (self.method == "adalora" and word.averages),
                "adalora prunes what this one averages; take another optimizer",
            ),
            (
                "ema_decay",
                not (self.method == "adalora" and self.ema_decay is not None),
                "adalora prunes what it averages, which then never becomes zero: leave one of them out",
            ),
            (
                "patience",
                not (self.method == "adalora" and self.patience is not None),
                "adalora reaches its budget in the end alone: leave one of them out",
            ),
            (
                "betas",
                len(self.betas) in (0, word.betas) and all(lowest <= beta < 1 for beta in self.betas),
                f"{self.optimizer} takes {('one number', 'two numbers')[word.betas - 1]}, at least {lowest:g} and below 1",
            ),
            (
                "ema_decay",
                self.ema_decay is None or not word.averages,
                f"{self.optimizer} keeps an average of its own: leave ema_decay out",
            ),
            *schedule,
        ]

    def tracker_rules(self) -> list[Rule]:
        """What must hold of the trackers, also that they are installed."""
        unknown = next((word for word in self.trackers if word not in TRACKERS), None)
        problem = tracker_problem(self.trackers)
        return [
            ("trackers", unknown is None, nearest(unknown or "", TRACKERS)),
            ("trackers", problem is None, problem or ""),
        ]


def at_home(path: str | None) -> str | None:
    """A path with ~ for the home folder resolved; None when it is empty.

    >>> at_home("runs/a"), at_home(" ")
    ('runs/a', None)
    """
    if path is None or not path.strip():
        return None
    return str(Path(path).expanduser()) if path.startswith("~") else path


def rate_rule(name: str, rate: float | None) -> Rule:
    """What must hold of a learning rate; far above, its product with a gradient is no number any more."""
    return name, rate is None or 0 < rate <= MOST_RATE, f"it must be above 0 and at most {MOST_RATE}"


def _finite(value: Any) -> bool:
    """Whether the numbers of a setting, or in it, can be computed with."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or abs(value) <= LARGEST


def budget_of(text: str) -> tuple[str, int] | None:
    """`8` -> ("rank", 8), `300k` or `1.5M` -> ("parameters", …), `2MB` -> ("numbers", …) of fp32; None if it is neither.

    >>> budget_of("8"), budget_of("1.5M"), budget_of("2MB"), budget_of("many")
    (('rank', 8), ('parameters', 1500000), ('numbers', 524288), None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|M|MB)?", text.strip())
    if found is None or float(found[1]) <= 0 or (found[2] is None and not float(found[1]).is_integer()):
        return None
    per_unit = {None: 1, "k": 1000, "M": 1_000_000, "MB": 2**20 // 4}[found[2]]
    kind = {None: "rank", "MB": "numbers"}.get(found[2], "parameters")
    return kind, int(float(found[1]) * per_unit)
