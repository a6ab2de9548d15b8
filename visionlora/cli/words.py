"""Words of the command line that several verbs read: `path:scale`, sizes, formats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from visionlora.config import pairs_of
from visionlora.errors import ConfigError

if TYPE_CHECKING:
    from visionlora.lora.arithmetic import Result, Size

FORMATS = "visionlora, kohya, diffusers, diffusers-folded, peft"


def parse_lora(word: str) -> tuple[str, float]:
    """`path` or `path:scale`.

    Raises:
        ConfigError: when the scale is not a finite number.
    """
    path, colon, scale = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        number = float(scale)
    except ValueError:
        raise ConfigError(f"{word}: {scale!r} is not a number; write path or path:scale.") from None
    if not math.isfinite(number):
        raise ConfigError(f"{word}: a scale must be a finite number, such as 0.8; this one is {scale!r}.")
    return path, number


def parse_lora_use(word: str) -> tuple[str, float, dict[str, float]]:
    """`path[:scale][@block=factor,…]`.

    Raises:
        ConfigError: when a number is none.

    >>> parse_lora_use("dog.safetensors:0.8@up=1.2,mid=0")
    ('dog.safetensors', 0.8, {'up': 1.2, 'mid': 0.0})
    """
    head, at, tail = word.rpartition("@")
    in_name = Path(word).exists() or (":" in tail and Path(word.rpartition(":")[0]).exists())
    if not at or "=" not in tail or in_name:
        return (*parse_lora(word), {})
    return (*parse_lora(head), {k: float(v) for k, v in pairs_of(tail, word).items()})


def parse_size(rank: int | None, energy: float | None) -> Size:
    """The size that two options name."""
    from visionlora.lora.arithmetic import Size

    return Size(rank, energy)


def describe(result: Result, method: str = "sum") -> str:
    """The ranks and what was lost, in a line; of combinations other than the sum, what cutting the rank lost."""
    ranks = sorted(r for r in result.ranks.values() if r)
    modules = {n: e for n, e in result.errors.items() if n in result.adapter.modules}
    left_out = len(result.errors) - len(modules)
    text = f"{len(result.adapter.modules)} modules"
    if ranks:
        text += f", rank {ranks[0]}" + (
            f" to {ranks[-1]} (median {ranks[len(ranks) // 2]})" if ranks[0] != ranks[-1] else ""
        )
    if modules:
        worst = max(modules, key=lambda n: modules[n])
        mean = sum(modules.values()) / len(modules)
        text += ("; exact" if method == "sum" else "") if modules[worst] == 0 else (
            f"; relative error of ΔW {mean:.3f} on average, at most {modules[worst]:.3f} ({worst})"
        )  # fmt: skip
    return text + (f"; {left_out} vectors changed and were left out" if left_out else "")
