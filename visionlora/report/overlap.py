"""Draws how much adapters share, block by block, as a heat map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from visionlora.atomic import replace_file
from visionlora.formats.inspection import block_of, in_order
from visionlora.lora.overlap import PairOverlap
from visionlora.report.curves import INK, SOFT


def by_block(pair: PairOverlap) -> dict[str, float]:
    """The shared energy of a pair in each block, by how strong both are there."""
    sums: dict[str, list[float]] = {}
    for layer in pair.layers:
        entry = sums.setdefault(block_of(layer.name), [0.0, 0.0])
        entry[0] += layer.shared * layer.weight
        entry[1] += layer.weight
    return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}


def draw_overlap(pairs: Sequence[PairOverlap], path: Path) -> None:
    """Writes a heat map (PNG), atomically: rows are pairs, columns blocks, 0 to 1 of the energy in common directions.

    Args:
        pairs: as `visionlora.lora.overlap.overlap` gives them.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [by_block(p) for p in pairs]
    blocks = list(in_order({b: 0.0 for blocks in found for b in blocks}))
    figure = Figure(
        figsize=(2.6 + 0.62 * len(blocks), 1.5 + 0.5 * len(pairs)), dpi=125, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [[blocks_of.get(b, float("nan")) for b in blocks] for blocks_of in found]
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(blocks)), blocks, rotation=40, ha="right", fontsize=8, color=INK, parse_math=False)
    names = [f"{p.first} + {p.second}" for p in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8, color=INK, parse_math=False)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value == value:
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 0.6 else INK,
                )
    axes.set_title("Share of ΔW in directions that both write to", fontsize=10, loc="left", color=INK)
    axes.tick_params(length=0)
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=SOFT)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    replace_file(path, data.getvalue())
