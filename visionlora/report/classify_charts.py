"""Draws what a classifier confuses and how far its confidence can be trusted: counts and bins -> PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visionlora.data.images import printable
from visionlora.report.curves import COLOURS, INK, SOFT
from visionlora.report.fonts import characters, families
from visionlora.vision.metrics import Bin, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COUNTED = 30
"""Classes up to which every count is written; above, only those off the diagonal."""
MOST_CLASSES = 60
"""Classes up to which all are drawn."""
MOST_CONFUSED = 40
"""How many are drawn of more classes than that."""
LONGEST_NAME = 26
SHADES = ((0.0, "#ffffff"), (0.25, "#d3e5f2"), (0.6, COLOURS[0]), (1.0, "#00263d"))
DARK = 0.5
"""Shade from which the writing in a cell is white."""
EMPTY = "#eceef0"
"""Of rows without pictures."""


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """A heat map of which class is taken for which; the same input gives the same bytes.

    The shade is the share of the row, on a square-root scale so that rare mistakes are seen. Of many classes only those
    with most mistakes, made and received, are drawn.

    Args:
        confusion: pictures by true class (row) and predicted class (column).
        classes: their names. A name that no installed font can write is drawn as #n, its place in the list.

    Raises:
        ValueError: names and counts do not belong together.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    if not len(classes) or counts.shape != (len(classes), len(classes)):
        raise ValueError(f"{len(classes)} classes need as many rows and columns of counts; got {counts.shape}.")
    pictures = counts.sum(axis=1)
    shares = counts / np.where(pictures, pictures, 1)[:, None]
    shares[pictures == 0] = np.nan
    kept = _most_confused(counts)
    title = "Predictions by true class"
    if len(kept) < len(classes):
        title = f"The {len(kept)} most confused of {len(classes)} classes"
    if not pictures[kept].all():
        title += " (grey: no pictures)"

    side = len(kept) * (0.42 if len(kept) <= 12 else 0.28 if len(kept) <= COUNTED else 0.21)
    labels = [_label(classes[i], i) for i in kept]
    room = 0.085 * max(map(len, labels))
    figure = _figure(max(side, 1.6) + room + 2.2, max(side, 1.6) + room + 1.2)
    axes = figure.add_subplot()

    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shade = LinearSegmentedColormap.from_list("share", SHADES).with_extremes(bad=EMPTY)
    picture = axes.imshow(shares[np.ix_(kept, kept)], norm=PowerNorm(0.5, 0, 1), cmap=shade)
    size = 8 if len(kept) <= COUNTED else 6.5
    for write, angle in ((axes.set_xticks, 90), (axes.set_yticks, 0)):
        write(range(len(kept)), labels, rotation=angle, fontsize=size, family=families(), color=INK, parse_math=False)
    axes.set_xticks(np.arange(len(kept) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(kept) + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color=EMPTY, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_color(EMPTY)
    _write_counts(axes, counts, shares, kept)
    axes.set_xlabel("predicted", color=SOFT)
    axes.set_ylabel("true", color=SOFT)
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=8, parse_math=False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.5, aspect=25, pad=0.02, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "20 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=7, colors=SOFT, length=0)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=SOFT, fontsize=8)
    return _png(figure)


def draw_reliability(
    before: Sequence[Bin], after: Sequence[Bin], ece_before: float | None, ece_after: float | None
) -> bytes:
    """How often predictions are right by how sure they are, before and after the temperature; a panel for each.

    Args:
        before: bins at temperature 1.
        after: bins at the fitted temperature; empty for one panel only.
        ece_before: calibration error of `before`, written above it.
        ece_after: calibration error of `after`.

    Raises:
        ValueError: there are no bins.
    """
    panels = [
        (name, bins, error)
        for name, bins, error in (("as trained", before, ece_before), ("with the temperature", after, ece_after))
        if bins
    ]
    if not panels:
        raise ValueError("There is nothing to draw: no bins.")
    figure = _figure(3.9 * len(panels) + 0.4, 4.7)
    grid = figure.add_gridspec(2, len(panels), height_ratios=[4, 1])
    most = max(b.count / max(1, sum(b.count for b in bins)) for _, bins, _ in panels for b in bins)
    for column, (name, bins, error) in enumerate(panels):
        upper, lower = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        _draw_bins(upper, bins)
        total = max(1, sum(b.count for b in bins))
        lower.bar(
            [b.low for b in bins],
            [b.count / total for b in bins],
            [b.high - b.low for b in bins],
            align="edge",
            color=SOFT,
            alpha=0.6,
            edgecolor="white",
        )
        lower.set_ylim(0, most * 1.1 or 1)
        lower.set_xlabel("confidence", color=INK)
        heading = name if error is None else f"{name}, ECE {100 * error:.1f} %"
        upper.set_title(heading, loc="left", color=INK, fontsize=11, parse_math=False)
        if column == 0:
            upper.set_ylabel("share that is right", color=INK)
            lower.set_ylabel("pictures", color=INK)
            upper.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=INK)
        for axes in (upper, lower):
            axes.set_xlim(0, 1)
            _plain(axes)
        upper.set_xticklabels([])
    return _png(figure)


def _draw_bins(axes: Axes, bins: Sequence[Bin]) -> None:
    """Accuracy as bars, on top of them what separates it from the confidence, and the interval of each accuracy."""
    full = [b for b in bins if b.count]
    lows, widths = [b.low for b in full], [b.high - b.low for b in full]
    bars: dict[str, Any] = {"align": "edge", "edgecolor": "white"}
    shared = [min(b.accuracy, b.confidence) for b in full]
    axes.bar(lows, shared, widths, color=COLOURS[0], label="right", **bars)
    for name, colour, gaps in (
        ("too sure", COLOURS[1], [b.confidence - b.accuracy for b in full]),
        ("not sure enough", COLOURS[2], [b.accuracy - b.confidence for b in full]),
    ):
        heights = [max(0.0, gap) for gap in gaps]
        axes.bar(lows, heights, widths, shared, color=colour, alpha=0.45, label=name, **bars)
    for b in full:
        middle = (b.low + b.high) / 2
        axes.plot([middle, middle], wilson(round(b.accuracy * b.count), b.count), color=INK, linewidth=1)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, kept: Sequence[int]) -> None:
    """The numbers in the cells, without the zeros."""
    everything = len(kept) <= COUNTED
    for row, i in enumerate(kept):
        for column, j in enumerate(kept):
            if counts[i, j] and (everything or i != j):
                colour = "white" if shares[i, j] ** 0.5 > DARK else INK
                text = f"{counts[i, j]}" if counts[i, j] < 10_000 else f"{counts[i, j] // 1000}k"
                size = (7.5 if everything else 5.5) - max(0, len(text) - 3)
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _most_confused(counts: np.ndarray) -> list[int]:
    """The classes to draw, in their order: all, or those with most mistakes made and received."""
    if len(counts) <= MOST_CLASSES:
        return list(range(len(counts)))
    mistakes = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
    return sorted(np.argsort(-mistakes, kind="stable")[:MOST_CONFUSED].tolist())


def _label(name: str, place: int) -> str:
    """A class name that fits and can be written; long ones lose their middle.

    >>> _label("a very long name of a class, part 2", 0)
    'a very long n…class, part 2'
    """
    text = printable(" ".join(name.split()))
    if not text or not set(map(ord, text)) <= characters():
        return f"#{place + 1}"
    half = LONGEST_NAME // 2
    return text if len(text) <= LONGEST_NAME else f"{text[:half].rstrip()}…{text[-half:].lstrip()}"


def _plain(axes: Axes) -> None:
    axes.grid(True, axis="y", color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=SOFT, length=0, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5c9cd")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=125, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(
        content, format="png", dpi="figure", bbox_inches="tight", pad_inches=0.12, metadata={"Software": None}
    )
    return content.getvalue()
