"""Run configurations: frozen, checked at construction, read from YAML files, `key=value` words and flags.

Precedence: defaults < config files < key=value < flags. An unknown key is an error that names the nearest one, and
all problems of a configuration are reported together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from visionlora.errors import ConfigError, nearest

T = TypeVar("T")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainSDConfig:
    """Everything `visionlora train-sd` can be told."""

    images: str = ""
    """Folder of pictures to learn from."""
    prompt: str | None = None
    """One caption for every picture; without it captions come from the folder."""
    model: str = "auto"
    """Base model: auto, emoji-64, a diffusers folder, a .safetensors checkpoint or a Hub id."""
    output: str | None = None
    """Run folder to create; by default a new one under runs/."""
    steps: int | None = None
    """Optimizer steps; by default what suits the base model."""
    method: str = "lora"
    """lora, rslora, lora+, lora-fa, dora, adalora, vera, ia3, or full as a baseline."""
    rank: int | Literal["auto"] = 8
    """Rank of each ΔW; auto measures on the pictures which layers need it and spends `rank_budget` there."""
    rank_budget: str = "8"
    """For rank auto: a mean rank (8), a number of parameters (300k, 1.5M) or a file size (2MB)."""
    alpha: float | None = None
    """Scaling numerator; equal to the rank when not given."""
    targets: str = "attn"
    """What to adapt: roles, names or re:regex, separated by commas."""
    learning_rate: float | None = None
    """Of AdamW, after warm-up; by default what suits the base model."""
    warmup_steps: int = 20
    """Steps over which the rate rises linearly; it then falls to zero along a cosine."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    batch_size: int | None = None
    """Pictures per forward pass and process; by default what suits the base model."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    resolution: int | None = None
    """Width and height in px; the model's own when not given."""
    caption_dropout: float = 0.05
    """Share of captions replaced by the empty one, which keeps guidance working."""
    timestep_range: tuple[int, ...] = (0, 1000)
    """Noise levels that are learned, of 1000: `0,600` leaves composition, which is settled at high noise, to the base."""
    flip: bool = False
    """Mirror half of the pictures (each time anew)."""
    init: str = "kaiming"
    """How the adapter starts: kaiming, gaussian, orthogonal or pissa."""
    basis_index: int = 0
    """Part of the shared basis for init orthogonal; adapters that will be combined take different ones."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: bf16 on a GPU that has it, fp32 on a CPU."""
    seed: int = 0
    """Of everything random."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample grid; by default some captions of the pictures."""
    sample_columns: int = 3
    """Columns of the grid beside the base: the adapter at so many moments of training."""
    sample_steps: int = 20
    """Denoising steps per sample picture."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the samples; by default what suits the base model."""
    skip_broken: bool = False
    """Leave out pictures that cannot be used instead of stopping."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("images", bool(self.images), "name the folder of pictures to learn from: --images ./dog"),
            ("steps", self.steps is None or self.steps >= 1, "it must be at least 1"),
            ("rank", self.rank == "auto" or self.rank >= 1, "it must be at least 1, or auto"),
            (
                "rank_budget",
                budget_of(self.rank_budget) is not None,
                "write a mean rank (8), parameters (300k) or a size (2MB)",
            ),
            ("alpha", self.alpha is None or (math.isfinite(self.alpha) and self.alpha > 0), "it must be positive"),
            ("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "it must be positive"),
            ("warmup_steps", self.warmup_steps >= 0, "it must be 0 or more"),
            ("weight_decay", self.weight_decay >= 0, "it must be 0 or more"),
            ("max_grad_norm", self.max_grad_norm > 0, "it must be positive"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "it must be at least 1"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "it must be at least 1"),
            ("resolution", self.resolution is None or self.resolution >= 1, "it must be at least 1 px"),
            ("caption_dropout", 0 <= self.caption_dropout <= 1, "it must be between 0 and 1"),
            (
                "timestep_range",
                len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1000,
                "it must be two whole numbers, the first below the second, in 0 … 1000",
            ),
            ("dropout", 0 <= self.dropout < 1, "it must be at least 0 and below 1"),
            ("precision", self.precision in PRECISIONS, nearest(self.precision, PRECISIONS)),
            ("sample_columns", self.sample_columns >= 1, "it must be at least 1"),
            ("sample_steps", self.sample_steps >= 1, "it must be at least 1"),
            (
                "guidance_scale",
                self.guidance_scale is None or self.guidance_scale >= 1,
                "it must be at least 1 (no guidance)",
            ),
        ]
        problems = [f"{name} is {getattr(self, name)!r}; {rule}" for name, fine, rule in rules if not fine]
        raise_all(problems)


def budget_of(text: str) -> tuple[str, int] | None:
    """`8` -> ("rank", 8), `300k` or `1.5M` -> ("parameters", …), `2MB` -> ("parameters", …, fp32); None if it is neither.

    >>> budget_of("8"), budget_of("1.5M"), budget_of("2MB"), budget_of("many")
    (('rank', 8), ('parameters', 1500000), ('parameters', 524288), None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|M|MB)?", text.strip())
    if found is None or float(found[1]) <= 0 or (found[2] is None and not float(found[1]).is_integer()):
        return None
    per_unit = {None: 1, "k": 1000, "M": 1_000_000, "MB": 2**20 // 4}[found[2]]
    return ("rank" if found[2] is None else "parameters"), int(float(found[1]) * per_unit)


def raise_all(problems: list[str]) -> None:
    """Raises one ConfigError for all problems, if there are any."""
    if problems:
        raise ConfigError("These settings cannot be used:\n" + "\n".join(f"- {p}" for p in problems))


def build(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """Constructs a configuration from layers of settings, later ones winning.

    Raises:
        ConfigError: for unknown keys and values of the wrong type, all in one message.
    """
    hints, problems, values = get_type_hints(cls), [], {}
    for layer in layers:
        for key, value in layer.items():
            name = key.replace("-", "_")
            if name not in hints:
                problems.append(f"{key} is not a setting. {nearest(name, hints)}")
                continue
            try:
                values[name] = convert(value, hints[name])
            except ValueError as e:
                problems.append(f"{key} is {value!r}; {e}")
    raise_all(problems)
    return cls(**values)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; nothing is cast that could lose meaning (3.7 is not a whole number).

    Raises:
        ValueError: saying what was expected.
    """
    origin = get_origin(hint)
    if origin in (Union, type(int | None)):
        kinds = get_args(hint)
        if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        *first, last = (kind for kind in kinds if kind is not type(None))
        for kind in first:
            with contextlib.suppress(ValueError):
                return convert(value, kind)
        return convert(value, last)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError("expected a list")
        return tuple(convert(item, get_args(hint)[0]) for item in items)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"expected a whole number or {' or '.join(map(str, get_args(hint)))}")
        return value
    if hint is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError("expected true or false")
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError("expected a number") from None
        if hint is int:
            if not number.is_integer():
                raise ValueError("expected a whole number")
            return int(number)
        return number
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected {getattr(hint, '__name__', hint)}")


def recipe_names() -> list[str]:
    """The recipes that are installed with visionlora."""
    folder = resources.files("visionlora.configs")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_yaml(name: str) -> dict[str, Any]:
    """The settings of a config file, given by path or by the name of an installed recipe.

    Raises:
        ConfigError: when there is no such file or recipe, or it is not a YAML mapping.
    """
    path = Path(name).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = (resources.files("visionlora.configs") / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"There is no config file or recipe {name!r}. {nearest(name, recipe_names())}")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as e:
        where = getattr(e, "problem_mark", None)
        raise ConfigError(
            f"{name} is not valid YAML{f' at line {where.line + 1}' if where else ''}: {getattr(e, 'problem', e)}."
        ) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} must hold `key: value` lines; it holds a {type(settings).__name__}.")
    return {str(k): v for k, v in settings.items()}


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """`key=value` words; values are read as YAML, so that numbers, true/false and lists work.

    Raises:
        ConfigError: for a word without `=`.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not understood: settings are written key=value, options start with --.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings


def to_yaml(config: Any) -> str:
    """The resolved configuration; reading the text again gives an equal one."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def pairs_of(text: str, word: str) -> dict[str, float]:
    """`a=1,b=2`.

    Raises:
        ConfigError: when a value is no number.
    """
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"{word}: {part!r} is no name=number, separated by commas.") from None
        if not equals:
            raise ConfigError(f"{word}: {part!r} is no name=number, separated by commas.")
    return found


def parse_region(word: str) -> tuple[str, list[float] | str]:
    """`name=left,top,right,bottom` (each 0 to 1) or `name=mask.png`.

    Raises:
        ConfigError: when it is neither.

    >>> parse_region("dog=0,0,0.5,1"), parse_region("cat=masks/cat.png")
    (('dog', [0.0, 0.0, 0.5, 1.0]), ('cat', 'masks/cat.png'))
    """
    name, equals, value = word.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(
            f"A region is written adapter=left,top,right,bottom or adapter=mask.png; this one is {word!r}."
        )
    try:
        return name.strip(), [float(v) for v in value.split(",")]
    except ValueError:
        return name.strip(), value.strip()


def parse_composition(word: str) -> tuple[str, dict[str, float | int]]:
    """`name[:option=number,…]`.

    Raises:
        ConfigError: when a value is no number.

    >>> parse_composition("switch:tau=2")
    ('switch', {'tau': 2})
    """
    name, colon, options = word.partition(":")
    found = pairs_of(options, word) if colon else {}
    return name, {k: int(v) if v == int(v) else v for k, v in found.items()}
