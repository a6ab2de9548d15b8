"""What is adapted, how strongly and with how many parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from visionlora.config.choices import PISSA_METHODS, RUN_INITS
from visionlora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("lora", "rslora", "lora+", "lora-fa", "tlora", "dora", "adalora", "vera", "ia3", "full", "linear-probe")
INITS = (*RUN_INITS, "eva")
PLUGIN_GROUPS = {"method": "visionlora.methods", "init": "visionlora.inits"}
LORA_PLUS_RATIO = 16.0

V = TypeVar("V")


def known(what: str) -> tuple[str, ...]:
    """The methods or inits there are, with those of installed plug-ins."""
    from visionlora.plugins import names

    return ({"method": METHODS, "init": INITS}[what]) + tuple(names(PLUGIN_GROUPS[what]))


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of one adapter, checked at construction.

    Raises:
        ConfigError: naming every field that is out of range, in one message.
    """

    method: str = "lora"
    """lora, rslora, lora+, lora-fa, tlora, dora, adalora, vera, ia3; full (every parameter) and linear-probe (the head alone)
    are the baselines. See `visionlora.lora.methods`."""
    rank: int = 8
    """Rank r of each ΔW, 1 or more and at most the smaller side of the layer; of AdaLoRA the mean rank at the end."""
    alpha: float | None = None
    """Numerator of the scaling alpha/rank; equal to the rank when not given, so that the scaling is 1."""
    targets: str | tuple[str, ...] = "attn"
    """Roles (`attn`, `attn.q`, `mlp`, `conv`, `all` …), module names, dot-boundary suffixes, or `re:` and a regex."""
    exclude: str | tuple[str, ...] = ()
    """Targets that are left out again."""
    dropout: float = 0.0
    """Share of the inputs of an adapter that is zeroed while training, 0 up to but not including 1."""
    init: str = "kaiming"
    """How A starts: kaiming, gaussian, orthogonal, pissa or eva; B starts so that training starts as the identity."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of their own by target word; the first that matches a module counts, `rank` elsewhere."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of their own by target word; elsewhere `alpha`, or the module's rank when that is not given."""
    lr_ratio: float | None = None
    """Learning rate of B over that of A (LoRA+); 16 for method `lora+`, 1 otherwise."""
    train: str | tuple[str, ...] = ()
    """Modules trained in full beside the adapter and stored with it, such as a classifier's head."""
    basis_index: int = 0
    """Which part of the shared basis init `orthogonal` takes; give adapters that will be combined different numbers."""
    projection_seed: int = 0
    """Of VeRA's shared projections."""
    initial_rank_factor: float = 1.5
    """How much wider than `rank` AdaLoRA starts, 1 or more."""
    min_rank: int | None = None
    """Of tlora: components that act at every timestep, at the noisiest alone; half of each rank when not given."""
    spectra: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    """Directions of the inputs by module name, for init `eva`: see `visionlora.lora.rank.input_spectra`."""
    save_memory: bool = True
    """Let frozen layers between the adapted ones keep only what backward needs; the outputs are the same bits."""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in known("method"):
            problems.append(f"method is {self.method!r}. {nearest(self.method, known('method'))}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            problems.append(f"rank is {self.rank!r}; it must be a whole number of at least 1.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha is {self.alpha!r}; it must be a positive number (equal to the rank for scaling 1).")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        if self.init not in known("init"):
            problems.append(f"init is {self.init!r}. {nearest(str(self.init), known('init'))}")
        elif self.init == "pissa" and self.method not in PISSA_METHODS:
            problems.append(f"init 'pissa' starts both factors of a LoRA; method {self.method!r} cannot use it.")
        if not self.target_list and self.method not in ("full", "linear-probe"):
            problems.append("targets is empty; `attn` is a good start.")
        if self.method == "linear-probe" and not self.train_list:
            problems.append("method 'linear-probe' trains nothing but `train`: name the head, train='head'.")
        for word, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                problems.append(f"rank_pattern[{word!r}] is {rank!r}; it must be a whole number of at least 1.")
        for word, alpha in self.alpha_pattern.items():
            if not (math.isfinite(alpha) and alpha > 0):
                problems.append(f"alpha_pattern[{word!r}] is {alpha!r}; it must be a positive number.")
        if self.lr_ratio is not None and not (math.isfinite(self.lr_ratio) and self.lr_ratio > 0):
            problems.append(f"lr_ratio is {self.lr_ratio!r}; it must be a positive number.")
        if self.min_rank is not None and (self.method != "tlora" or not 1 <= self.min_rank <= self.rank):
            problems.append(f"min_rank is {self.min_rank!r}; it is for method 'tlora', and between 1 and the rank.")
        if self.basis_index < 0:
            problems.append(f"basis_index is {self.basis_index!r}; it must be 0 or more.")
        if not self.initial_rank_factor >= 1:
            problems.append(f"initial_rank_factor is {self.initial_rank_factor!r}; it must be at least 1.")
        if problems:
            raise ConfigError("This adapter cannot be built:\n" + "\n".join(f"- {p}" for p in problems))

    @property
    def target_list(self) -> tuple[str, ...]:
        """The targets, one by one."""
        return words(self.targets)

    @property
    def exclude_list(self) -> tuple[str, ...]:
        """The targets left out again, one by one."""
        return words(self.exclude)

    @property
    def train_list(self) -> tuple[str, ...]:
        """The modules trained in full, one by one."""
        return words(self.train)

    def rank_of(self, name: str) -> int:
        """Rank of the module of this name."""
        return first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha of the module of this name, with its default resolved."""
        default = self.rank_of(name) if self.alpha is None else self.alpha
        return float(first_match(self.alpha_pattern, name, default))

    def scaling_of(self, name: str) -> float:
        """The factor s of W + s·B·A of the module of this name."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.method == "rslora" else rank)

    @property
    def effective_alpha(self) -> float:
        """Alpha where no pattern says otherwise, with its default resolved."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scaling(self) -> float:
        """The factor s where no pattern says otherwise."""
        return self.effective_alpha / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def effective_lr_ratio(self) -> float:
        """Learning rate of B over that of A, with its default resolved."""
        if self.lr_ratio is not None:
            return float(self.lr_ratio)
        return LORA_PLUS_RATIO if self.method == "lora+" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON header; measured spectra are left out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "spectra"}
        lists = {n: list(words(plain[n])) for n in ("targets", "exclude", "train")}
        patterns = {n: dict(plain[n]) for n in ("rank_pattern", "alpha_pattern")}
        return {**plain, **lists, **patterns, "alpha": self.effective_alpha}


def words(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """`"a, b"` or `("a", "b")`, one by one."""
    parts = split_outside_regex(given) if isinstance(given, str) else given
    return tuple(t.strip() for t in parts if t.strip())


def split_outside_regex(text: str) -> list[str]:
    """Splits at commas; a text that starts with `re:` is one expression, commas and all."""
    return [text] if text.startswith("re:") else text.split(",")


def first_match(pattern: Mapping[str, V], name: str, default: V) -> V:
    """The value of the name itself, or of the first word that matches: its end on a dot boundary, or `re:` and a regex."""
    if name in pattern:
        return pattern[name]
    for word, value in pattern.items():
        if word.startswith("re:"):
            if re.fullmatch(word[3:], name):
                return value
        elif name == word or name.endswith("." + word):
            return value
    return default
