r"""The variants of a caption: its tags in other orders, some of them left out, and one choice of `{red|blue}`.

In: a caption. Out: finitely many captions, as the text of each is encoded once and kept.

The language: `{a|b|c}` is one of its choices, which may hold others; braces without a bar are plain text. A backslash
makes a brace or bar plain: `\{`, `\|`, `\}`. Tags are what commas separate, after the choices are made.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence

_PARTS = re.compile(r"\\[{|}]|[{|}]|[^\\{|}]+|\\")
_PATIENCE = 10
"""Draws without a new variant, for each variant so far, before there are taken to be no more: of n equally likely ones
the last is then missed with a chance of about exp(-10)."""

Text = tuple["str | Choice", ...]
"""Plain text and choices, one after the other."""
Choice = list[Text]
"""`{a|b}`: one of these."""


def caption_variants(
    caption: str, *, shuffle_tags: bool, keep_tags: int, tag_dropout: float, count: int, seed: int
) -> tuple[str, ...]:
    """Different variants of a caption, the same ones whenever seed and caption are.

    A caption without choices, and with no tags that could be moved or dropped, gives itself alone. No variant is empty
    unless all are: where all tags are dropped, one stays.

    Args:
        caption: of a picture.
        shuffle_tags: whether the order of tags changes.
        keep_tags: so many tags at the beginning stay where they are, and are never dropped.
        tag_dropout: chance of each other tag to be left out, 0 to below 1.
        count: the most variants, at least 1.
        seed: of the drawing.

    >>> caption_variants("a {red|blue} dog", shuffle_tags=False, keep_tags=1, tag_dropout=0, count=9, seed=0)
    ('a blue dog', 'a red dog')
    >>> caption_variants("dog, red, sitting", shuffle_tags=True, keep_tags=1, tag_dropout=0, count=9, seed=0)
    ('dog, sitting, red', 'dog, red, sitting')
    """
    text = _parsed(caption)
    words = f"{seed}\0{caption}".encode("utf-8", "surrogatepass")
    rng = random.Random(int.from_bytes(hashlib.sha256(words).digest(), "big"))
    chosen = any(not isinstance(part, str) for part in text)
    moving = shuffle_tags or tag_dropout > 0
    found: dict[str, None] = {}
    misses = 0
    while len(found) < count and misses < _PATIENCE * (len(found) + 1):
        variant = _drawn(text, rng)
        if chosen:
            variant = " ".join(variant.split())  # an empty choice leaves two spaces
        if moving:
            variant = _moved(variant, rng, shuffle_tags, keep_tags, tag_dropout)
        if variant in found or (not variant and caption):
            misses += 1
        else:
            found[variant], misses = None, 0
            if not chosen and (not moving or _is_fixed(variant, shuffle_tags, keep_tags, tag_dropout)):
                break
    return tuple(found) or ("",)


def one_of(captions: Sequence[str]) -> str:
    r"""Several captions of a picture as one that is any of them.

    >>> one_of(["a dog", " a  dog "])
    'a dog'
    >>> one_of(["a dog", "one|two"])
    '{a dog|one\\|two}'
    """
    different = list(dict.fromkeys(" ".join(caption.split()) for caption in captions if caption.strip()))
    if len(different) < 2:
        return different[0] if different else ""
    return "{" + "|".join(re.sub(r"([{|}])", r"\\\1", caption) for caption in different) + "}"


def _moved(caption: str, rng: random.Random, shuffle: bool, keep: int, dropout: float) -> str:
    """The caption with its tags in another order and some left out; as it is where that cannot be."""
    if _is_fixed(caption, shuffle, keep, dropout):
        return caption
    tags = _tags(caption)
    first, others = tags[:keep], tags[keep:]
    if shuffle:
        rng.shuffle(others)
    left = [tag for tag in others if rng.random() >= dropout]
    return ", ".join([*first, *left] or others[:1])


def _is_fixed(caption: str, shuffle: bool, keep: int, dropout: float) -> bool:
    """Whether no tag of the caption can be moved or dropped."""
    others = len(_tags(caption)) - keep
    return not ((shuffle and others > 1) or (dropout > 0 and others > (0 if keep else 1)))


def _tags(caption: str) -> list[str]:
    return [tag for part in caption.split(",") if (tag := part.strip())]


def _drawn(text: Text, rng: random.Random) -> str:
    return "".join(part if isinstance(part, str) else _drawn(rng.choice(part), rng) for part in text)


def _parsed(caption: str) -> Text:
    """A caption as plain text and choices; a brace without its partner is plain.

    >>> _parsed("a {b|{c|d} e}")
    ('a ', [('b',), ([('c',), ('d',)], ' e')])
    """
    open_groups: list[list[list[str | Choice]]] = [[[]]]
    for part in _parts(caption):
        if part == "{":
            open_groups.append([[]])
        elif part == "|" and len(open_groups) > 1:
            open_groups[-1].append([])
        elif part == "}" and len(open_groups) > 1:
            group = open_groups.pop()
            open_groups[-1][-1].extend(["{", *group[0], "}"] if len(group) == 1 else [[tuple(text) for text in group]])
        else:
            open_groups[-1][-1].append(part[1:] if len(part) == 2 and part[0] == "\\" else part)
    while len(open_groups) > 1:  # braces that nothing closes
        group = open_groups.pop()
        open_groups[-1][-1].append("{")
        for i, text in enumerate(group):
            open_groups[-1][-1].extend(["|", *text] if i else text)
    return tuple(open_groups[0][0])


def _parts(caption: str) -> Iterator[str]:
    return (found.group() for found in _PARTS.finditer(caption))
