"""Draws training curves: (step, value) points -> one PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visionlora.report.runfolder import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#444444")
INK = "#1c1e21"
SOFT = "#6a6f76"
SMOOTHED_FROM = 50
"""Series with more points than this get an average on top of the raw line."""
LOG_FROM = 30.0
"""The value axis is logarithmic when the largest value is more than this many times the smallest."""

Points = list[tuple[float, float]]


def draw_curves(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> bool:
    """Draw one line per series; the same input gives the same bytes.

    Args:
        path: The PNG file, replaced as a whole.
        series: Points (x, value) by name. Those that are not finite are left out.
        xlabel: What the horizontal axis shows, with its unit.
        ylabel: What the vertical axis shows, with its unit.
        title: Drawn above the picture.

    Returns:
        Whether any series has a finite point; otherwise nothing is drawn.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=125, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = _draw_line(axes, points, colour)
        ends.append((name, line[-1][1], colour))

    values = [y for points in kept.values() for _, y in points]
    if min(values) > 0 and max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(xlabel, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, color=INK, parse_math=False)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=12, pad=10, parse_math=False)
    axes.grid(True, color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=SOFT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5c9cd")
    axes.margins(x=0.01)
    if len(kept) > 1:
        _label_ends(axes, ends)

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi="figure", metadata={"Software": None})
    write_atomic(path, content.getvalue())
    return True


def average(points: Sequence[tuple[float, float]]) -> Points:
    """Exponential moving average over about a twentieth of the series, without a bias towards its start."""
    keep = 1 - 1 / max(10.0, len(points) / 20)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total = keep * total + y
        weight = keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _draw_line(axes: Axes, points: Points, colour: str) -> Points:
    """Draw one series and return the line that a reader follows."""
    if len(points) > SMOOTHED_FROM:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.25)
        points = average(points)
    marker = "o" if len(points) == 1 else ""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.0, marker=marker, solid_capstyle="round")
    return points


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each name right of the end of its line, moved up where two would touch."""
    line_height = 0.055
    axes.autoscale_view()  # limits are otherwise settled only when drawing, and the heights depend on them
    to_axes = axes.transAxes.inverted()
    placed = -math.inf
    heights = [
        (float(to_axes.transform(axes.transData.transform((0.0, y)))[1]), name, colour) for name, y, colour in ends
    ]
    for height, name, colour in sorted(heights):
        placed = max(height, placed + line_height)
        axes.text(1.015, placed, name, transform=axes.transAxes, color=colour, va="center", parse_math=False)
