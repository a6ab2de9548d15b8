"""Variants of captions: orders of tags, tags left out, choices."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from visionlora.data.tags import any_of, caption_variants, one_of

PLAIN: dict[str, Any] = {"shuffle_tags": False, "keep_tags": 1, "tag_dropout": 0.0, "count": 16, "seed": 0}


def variants(caption: str, **changed: Any) -> tuple[str, ...]:
    return caption_variants(caption, **{**PLAIN, **changed})


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("{red|green} dog", {"red dog", "green dog"}),
        ("a {b|{c|d} e}", {"a b", "a c e", "a d e"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("a {very|} red dog", {"a very red dog", "a red dog"}),
        (r"\{a\|b\}", {"{a|b}"}),
        (r"{a\|b|c\}}", {"a|b", "c}"}),
        ("{red} dog", {"{red} dog"}),
        ("{{a|b}}", {"{a}", "{b}"}),
        ("a | b } c", {"a | b } c"}),
        ("a { b", {"a { b"}),
        ("a { b | {c|d}", {"a { b | c", "a { b | d"}),
        (r"(dog:1.2) \(x\) a\b", {r"(dog:1.2) \(x\) a\b"}),
        ("{|}", {""}),
        ("", {""}),
        (",", {","}),
    ],
)
def test_choices(caption: str, expected: set[str]) -> None:
    found = variants(caption)
    assert set(found) == expected
    assert len(found) == 1 or len(expected) > 1


def test_each_variant_is_there_as_often_as_it_is_likely() -> None:
    def shares(caption: str, **changed: Any) -> dict[str, float]:
        found = variants(caption, **changed)
        return {variant: count / len(found) for variant, count in Counter(found).items()}

    assert shares("{a|a|b}") == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=0.01)
    assert shares("{a|b} c") == {"a c": 0.5, "b c": 0.5}
    many = [shares(f"dog {i}, red", tag_dropout=0.1) for i in range(100)]
    assert sum(each.get(f"dog {i}", 0) for i, each in enumerate(many)) / 100 == pytest.approx(0.1, abs=0.01)
    some = [variants(f"{i}, a, b, c, d, e, f", tag_dropout=0.1) for i in range(100)]
    kept = sum(sum(", a" in variant for variant in each) / len(each) for each in some) / 100
    assert kept == pytest.approx(0.9, abs=0.01)


def test_all_orders_of_few_tags_are_found_and_the_first_ones_stay() -> None:
    assert set(variants("a, b, c, d", shuffle_tags=True, keep_tags=2)) == {"a, b, c, d", "a, b, d, c"}
    assert len(set(variants("a, b, c", shuffle_tags=True, keep_tags=0))) == 6
    assert len(set(variants("a, b, c, d, e", shuffle_tags=True, keep_tags=1, count=24))) == 24


def test_tags_without_settings_are_left_alone() -> None:
    for caption in ("a ,b,,  c", "b, a,"):
        assert variants(caption) == (caption,)
        assert variants(caption, shuffle_tags=True, tag_dropout=0.5, keep_tags=3) == (caption,)


def test_tags_are_dropped_as_often_as_wanted() -> None:
    tags = [f"t{i}" for i in range(400)]
    found = variants(", ".join(tags), tag_dropout=0.25, keep_tags=10)
    assert len(found) == 16
    kept = [variant.split(", ") for variant in found]
    assert all(each[:10] == tags[:10] for each in kept)
    assert all(each == sorted(each, key=tags.index) for each in kept)  # not shuffled
    assert sum(len(each) - 10 for each in kept) / (16 * 390) == pytest.approx(0.75, abs=0.03)


def test_one_tag_stays_where_all_are_dropped() -> None:
    assert set(variants("a, b", tag_dropout=0.99, keep_tags=0)) <= {"a", "b", "a, b"}


def test_choices_may_hold_tags() -> None:
    found = variants("{red, big|blue} dog, sitting", shuffle_tags=True, keep_tags=0)
    assert "blue dog, sitting" in found and "sitting, big dog, red" in found


def test_seeds_and_captions_draw_differently() -> None:
    caption = ", ".join("abcdefghij")
    first = variants(caption, shuffle_tags=True)
    assert first == variants(caption, shuffle_tags=True)
    assert first != variants(caption, shuffle_tags=True, seed=1)
    assert variants("\ud800, a, b", shuffle_tags=True)  # JSON can hold half a character


def test_many_braces_take_no_time() -> None:
    assert variants("{" * 5000 + "a|b" + "}" * 5000)[0].startswith("{" * 4999)
    assert variants("{" * 9000) == ("{" * 9000,)


def test_few_variants_are_few_texts_in_memory() -> None:
    found = caption_variants("a {red|blue} dog", shuffle_tags=True, keep_tags=1, tag_dropout=0, count=9, seed=0)
    assert len(found) > 100 and len({id(text) for text in found}) == 2


def test_captions_made_one_are_read_as_each_of_them() -> None:
    """Also with signs of the language in them, and a backslash at the end, which would make the bar behind it plain."""
    plain = ["a dog\\", "one|two", "{red", "a {b|c} d"]
    assert set(variants(one_of(plain))) == set(plain)
    own = ["a dog\\", "{red|{dark|light} blue} cat", "one|two", r"x \{y\|z\} }", "{w} {"]
    assert set(variants(any_of(own))) == {v for caption in own for v in variants(caption)}
    assert any_of(own[:1]) == own[0]
