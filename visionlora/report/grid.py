"""Draws labelled contact sheets: pictures in rows and columns -> one picture on white."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from visionlora.report.fonts import Font, font_for

INK = (28, 30, 33)
SOFT = (106, 111, 118)
RULE = (224, 226, 229)
LABEL_LINES = 3
CAPTION_LINES = 6
JOINT = re.compile(r"[-_./\\]+")
"""Behind which a long name may go on in the next line."""


@dataclass(frozen=True)
class _Block:
    """Wrapped text in one font, with its size in px."""

    lines: tuple[str, ...]
    font: Font
    line_height: int

    @property
    def width(self) -> int:
        return max((_width(self.font, line) for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return self.line_height * len(self.lines)


def draw_grid(
    cells: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    caption: str = "",
    cell: int = 128,
) -> Image.Image:
    """Draw a labelled contact sheet; the same input gives the same pixels.

    Args:
        cells: Pictures by row, then by column. Small ones are enlarged by a whole factor, so they stay crisp; large
            ones are reduced. Transparency is shown on white.
        rows: One label per row, drawn on the left in at most three lines; empty for none.
        columns: One label per column, drawn on top in at most three lines; empty for none.
        title: Drawn above everything.
        caption: Drawn in grey below everything.
        cell: Side of the square each picture is fitted into, px.

    Raises:
        ValueError: There is no picture, a row has more or fewer pictures than there are column labels, or the number
            of rows differs from the number of row labels.
    """
    _check(cells, rows, columns, cell)
    text = min(30, max(11, round(cell * 0.115)))
    gap = max(6, cell // 10)
    margin = max(16, cell // 5)

    row_labels = [_wrap(label, text, round(cell * 1.2), LABEL_LINES) for label in rows]
    column_labels = [_wrap(label, text, cell, LABEL_LINES) for label in columns]
    labels_width = max(block.width for block in row_labels)
    left = margin + (labels_width + gap + gap // 2 if labels_width else 0)
    pictures_width = len(columns) * (cell + gap) - gap
    width = left + pictures_width + margin

    heading = _wrap(title, round(text * 1.45), width - 2 * margin, 2)
    footer = _wrap(caption, max(11, round(text * 0.9)), width - 2 * margin, CAPTION_LINES)
    labels_height = max(block.height for block in column_labels)
    labels_bottom = margin + (heading.height + gap if heading.lines else 0) + labels_height
    top = labels_bottom + (gap if labels_height else 0)
    bottom = top + len(rows) * (cell + gap) - gap
    height = bottom + (gap + gap // 2 + footer.height if footer.lines else 0) + margin

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, margin, margin, INK)
    _write(draw, footer, margin, bottom + gap + gap // 2, SOFT)
    for column, block in enumerate(column_labels):
        x = left + column * (cell + gap)
        _write(draw, block, x + cell // 2, labels_bottom - block.height, INK, centred=True)
        if column:
            draw.line((x - gap // 2, top, x - gap // 2, bottom - 1), fill=RULE)
    for row, block in enumerate(row_labels):
        y = top + row * (cell + gap)
        _write(draw, block, margin, y + (cell - block.height) // 2, INK)
        if row or labels_height:
            draw.line((margin, y - gap // 2, width - margin - 1, y - gap // 2), fill=RULE)
        for column, picture in enumerate(cells[row]):
            fitted = _fit(picture, cell)
            x = left + column * (cell + gap)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
    return sheet


def _check(cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], cell: int) -> None:
    if cell < 16:
        raise ValueError(f"cell is {cell} px; a cell needs at least 16 px.")
    if not cells or not columns:
        raise ValueError(f"A grid needs a picture; got {len(cells)} rows and {len(columns)} column labels.")
    if len(cells) != len(rows):
        raise ValueError(f"{len(cells)} rows of pictures but {len(rows)} row labels; give one label per row.")
    for number, pictures in enumerate(cells):
        if len(pictures) != len(columns):
            raise ValueError(
                f"Row {number} has {len(pictures)} pictures but there are {len(columns)} column labels; "
                "give one picture per column."
            )


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """The picture as RGB on white, inside a square of ``cell`` px."""
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        picture = Image.new("RGBA", over.size, "white")
        picture.alpha_composite(over)
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * cell / longest)), max(1, round(picture.height * cell / longest)))
    whole = longest % cell == 0 and picture.width % size[0] == 0 and picture.height % size[1] == 0
    return picture.resize(size, Image.Resampling.BOX if whole else Image.Resampling.LANCZOS)


def _wrap(text: str, size: int, width: int, lines: int) -> _Block:
    """Break text into lines no wider than ``width`` px; what does not fit into ``lines`` ends in an ellipsis.

    A word wider than a line breaks behind a hyphen, dot or slash where it has one; a number stays with its per cent sign.
    """
    font, text = font_for(text, size)
    broken: list[str] = []
    words = [word for word in re.split(r"\s+(?!%)", text) if word]
    while words:
        line = words.pop(0)
        while words and _width(font, f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        if _width(font, line) > width and len(line) > 1:  # one word wider than the line
            keep = _fitting(font, line, width)
            keep = max((m.end() for m in JOINT.finditer(line[:keep])), default=keep)
            words.insert(0, line[keep:])
            line = line[:keep]
        broken.append(line)
    if len(broken) > lines:
        last = f"{broken[lines - 1]} {broken[lines]}"
        broken[lines - 1 :] = [last[: _fitting(font, last, width - _width(font, "…"))].rstrip() + "…"]
    return _Block(tuple(broken), font, round(size * 1.3))


def _fitting(font: Font, text: str, width: int) -> int:
    """How many characters from the start fit into ``width`` px; at least one."""
    count = 1
    while count < len(text) and _width(font, text[: count + 1]) <= width:
        count += 1
    return count


def _width(font: Font, text: str) -> int:
    return -int(-font.getlength(text) // 1)


def _write(
    draw: ImageDraw.ImageDraw, block: _Block, x: int, y: int, colour: tuple[int, int, int], *, centred: bool = False
) -> None:
    for number, line in enumerate(block.lines):
        shift = _width(block.font, line) // 2 if centred else 0
        draw.text((x - shift, y + number * block.line_height), line, fill=colour, font=block.font)
