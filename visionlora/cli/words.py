"""Words of the command line that several verbs read and write: sizes, formats, results."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionlora.lora.arithmetic import Result, Size

FORMATS = "visionlora, kohya, diffusers, diffusers-folded, peft"


def parse_size(rank: int | None, energy: float | None) -> Size:
    """The size that two options name."""
    from visionlora.lora.arithmetic import Size

    return Size(rank, energy)


def describe(result: Result, method: str = "sum") -> str:
    """The ranks and what was lost, in a line; of combinations other than the sum, what cutting the rank lost."""
    ranks = sorted(r for r in result.ranks.values() if r)
    modules = {n: e for n, e in result.errors.items() if n in result.adapter.modules}
    left_out = [n for n in result.errors if n not in modules]
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
    return text + (
        f"; {len(left_out)} vectors and tables changed and were left out, the first {left_out[0]}" if left_out else ""
    )
