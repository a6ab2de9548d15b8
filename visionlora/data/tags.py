r"""The variants of a caption: its tags in other orders, some of them left out, and one choice of `{red|blue}`.

In: a caption. Out: finitely many different captions, as the text of each is encoded once and kept, each as often as it is
likely.

The language: `{a|b|c}` is one of its choices, which may hold others; braces without a bar are plain text. A backslash
makes a brace or bar plain: `\{`, `\|`, `\}`. Tags are what commas separate, after the choices are made.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

_PARTS = re.compile(r"\\[{|}]|[{|}]|[^\\{|}]+|\\")
_DRAWS = 8
"""So many draws for each variant that may be encoded: of n equally likely ones one is missed with a chance of about exp(-8)."""
_FEWEST = 128
"""Draws at least: where there are few variants, their shares among these are near their chances."""

Text = tuple["str | Choice", ...]
"""Plain text and choices, one after the other."""
Choice = list[Text]
"""`{a|b}`: one of these."""
Decks = dict[int, list[Text]]
"""What each choice has left to deal: dealt like cards, the shares of few draws are right."""


def caption_variants(
    caption: str, *, shuffle_tags: bool, keep_tags: int, tag_dropout: float, count: int, seed: int
) -> tuple[str, ...]:
    """Variants of a caption to draw from evenly, the same ones whenever seed and caption are.

    One that is likelier is there more often; where there are more different ones than `count`, the draws end with those. A
    caption without choices, and with no tags that could be moved or dropped, gives itself alone. No variant is empty
    unless all are: where all tags are dropped, one stays.

    Args:
        caption: of a picture.
        shuffle_tags: whether the order of tags changes.
        keep_tags: so many tags at the beginning stay where they are, and are never dropped.
        tag_dropout: chance of each other tag to be left out, 0 to below 1.
        count: the most different variants, at least 1.
        seed: of the drawing.

    >>> found = caption_variants("a {red|blue} dog", shuffle_tags=False, keep_tags=1, tag_dropout=0, count=9, seed=0)
    >>> sorted(set(found)), found.count("a red dog") / len(found)
    (['a blue dog', 'a red dog'], 0.5)
    >>> found = caption_variants("dog, red, sitting", shuffle_tags=True, keep_tags=1, tag_dropout=0, count=9, seed=0)
    >>> sorted(set(found))
    ['dog, red, sitting', 'dog, sitting, red']
    """
    text = _parsed(caption)
    words = f"{seed}\0{caption}".encode("utf-8", "surrogatepass")
    rng = random.Random(int.from_bytes(hashlib.sha256(words).digest(), "big"))
    chosen = any(not isinstance(part, str) for part in text)
    moving = shuffle_tags or tag_dropout > 0
    found: list[str] = []
    different: dict[str, str] = {}
    """Each one once, as there may be many of a few."""
    known: dict[str, tuple[str, bool]] = {}
    decks: Decks = {}
    for _ in range(max(_FEWEST, _DRAWS * count)):
        drawn = _drawn(text, rng, decks)
        if (before := known.get(drawn)) is None:
            variant = " ".join(drawn.split()) if chosen else drawn  # an empty choice leaves two spaces
            fixed = not moving or _is_fixed(variant, shuffle_tags, keep_tags, tag_dropout)
            before = known[drawn] = (variant, fixed)
        variant, fixed = before
        if not fixed:
            variant = _moved(variant, rng, shuffle_tags, keep_tags, tag_dropout)
        if not variant and caption:
            continue
        if variant not in different and len(different) == count:
            break
        found.append(different.setdefault(variant, variant))
        if fixed and not chosen:
            break
    return tuple(found) if len(different) > 1 else (found[0] if found else "",)


def whole_caption(caption: str) -> str:
    r"""A caption with all its tags in their order, and one of each choice.

    >>> whole_caption(r"dog, {red|red}, \{sitting\}")
    'dog, red, {sitting}'
    """
    (whole,) = caption_variants(caption, shuffle_tags=False, keep_tags=1, tag_dropout=0.0, count=1, seed=0)
    return whole


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """In how many captions each tag is, the most frequent first; what is between commas is one, also in a sentence.

    >>> tag_counts(["sks dog, red", "sks dog", "a cat,  sks dog, a cat"])
    {'sks dog': 3, 'a cat': 1, 'red': 1}
    """
    found: Counter[str] = Counter()
    for caption in captions:
        found.update({tag for part in whole_caption(caption).split(",") if (tag := " ".join(part.split()))})
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


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
    return _choice(map(_plain, different))


def any_of(captions: Sequence[str]) -> str:
    r"""Likewise of captions that may hold choices of their own.

    >>> any_of(["a {red|blue} dog", "one|two", "a {red|blue} dog"]), any_of(["a {red|blue} dog"])
    ('{a {red|blue} dog|one\\|two}', 'a {red|blue} dog')
    """
    different = list(dict.fromkeys(captions))
    return different[0] if len(different) == 1 else _choice(_written(_parsed(caption)) for caption in different)


def _written(text: Text) -> str:
    """What `_parsed` reads as this text, within a choice too."""
    return "".join(_plain(part) if isinstance(part, str) else _choice(map(_written, part)) for part in text)


def _plain(text: str) -> str:
    return re.sub(r"([{|}])", r"\\\1", text)


def _choice(texts: Iterable[str]) -> str:
    # A backslash at the end would make what follows plain; the space behind it goes when one is chosen.
    return "{" + "|".join(f"{text} " if text.endswith("\\") else text for text in texts) + "}"


def _moved(caption: str, rng: random.Random, shuffle: bool, keep: int, dropout: float) -> str:
    """The caption with its tags in another order and some left out."""
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


def _drawn(text: Text, rng: random.Random, decks: Decks) -> str:
    return "".join(part if isinstance(part, str) else _drawn(_dealt(part, rng, decks), rng, decks) for part in text)


def _dealt(choice: Choice, rng: random.Random, decks: Decks) -> Text:
    deck = decks.setdefault(id(choice), [])
    if not deck:
        deck += rng.sample(choice, len(choice))
    return deck.pop()


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
