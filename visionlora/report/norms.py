"""Draws how strongly an adapter changes each block of its model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from visionlora.atomic import replace_file
from visionlora.report.curves import COLOURS, INK, SOFT

BARS = "▏▎▍▌▋▊▉█"


def bar(share: float, width: int = 30) -> str:
    """A bar of characters, 0 to 1 of the width.

    >>> bar(0.5, 4), bar(0.0, 4)
    ('██', '')
    """
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (BARS[eighths % 8 - 1] if eighths % 8 else "")


def draw_norms(blocks: Mapping[str, float], title: str, path: Path) -> None:
    """Writes a bar chart of ‖ΔW‖ by block (PNG), atomically.

    Args:
        blocks: ‖ΔW‖ by block, drawn from top to bottom.
        title: above it.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(blocks)), dpi=125, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values = list(blocks), list(blocks.values())
    axes.barh(range(len(names)), values, color=COLOURS[0], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8, color=INK, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("‖ΔW‖ of the block", fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, loc="left", color=INK, parse_math=False)
    axes.tick_params(axis="x", labelsize=8, colors=SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    replace_file(path, data.getvalue())
