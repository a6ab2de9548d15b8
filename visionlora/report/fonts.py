"""Which installed fonts write which characters, for charts and contact sheets."""

from __future__ import annotations

import functools

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "WenQuanYi Zen Hei", "Segoe UI Symbol",
)  # fmt: skip
"""Tried for each character in this order, where they are installed."""


@functools.cache
def families() -> list[str]:
    """The fonts of `FONTS` that are installed; DejaVu Sans comes with matplotlib."""
    from matplotlib.font_manager import fontManager

    there = {entry.name for entry in fontManager.ttflist}
    return [name for name in FONTS if name in there]


@functools.cache
def characters_of(family: str) -> frozenset[int]:
    """All that one of them writes."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(family)).get_charmap())


@functools.cache
def characters() -> frozenset[int]:
    """All that can be written with them."""
    return frozenset().union(*(characters_of(name) for name in families()))


def font_for(text: str, size: int) -> tuple[Font, str]:
    """A font for a text, and the text as it can be written: characters that the font has not are there by their number.

    >>> font_for("a dog", 12)[1], font_for("größer", 12)[1]
    ('a dog', 'größer')
    """
    if text.isascii():
        return ImageFont.load_default(size), text
    from matplotlib.font_manager import findfont

    wanted = {ord(c) for c in text if not c.isspace()}
    family = max(families(), key=lambda name: len(wanted & characters_of(name)))  # the first of equals
    there = characters_of(family)
    written = "".join(c if c.isspace() or ord(c) in there else f"[{ord(c):x}]" for c in text)
    return ImageFont.truetype(findfont(family), size), written
