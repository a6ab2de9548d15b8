"""Whatever a caption is, its variants are few, and made of its own words."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from visionlora.data.tags import caption_variants

CAPTIONS = st.text(st.sampled_from("ab ,{|}\\é"), max_size=40) | st.text(max_size=30)
PLAIN_TAGS = st.lists(
    st.text(st.characters(exclude_characters=",{|}\\", categories=["L", "N"]), min_size=1), min_size=1
)
SETTINGS = st.fixed_dictionaries(
    {
        "shuffle_tags": st.booleans(),
        "keep_tags": st.integers(0, 4),
        "tag_dropout": st.sampled_from([0.0, 0.1, 0.9]),
        "count": st.integers(1, 6),
        "seed": st.integers(0, 3),
    }
)


@given(CAPTIONS, SETTINGS)
def test_variants_are_few_and_always_the_same(caption: str, settings: dict) -> None:
    found = caption_variants(caption, **settings)
    assert 1 <= len(set(found)) <= settings["count"]
    assert found == caption_variants(caption, **settings)
    assert "" not in found or found == ("",)


@given(st.text(st.characters(exclude_characters=",{|}\\"), max_size=30), SETTINGS)
def test_a_caption_without_tags_and_choices_gives_itself(caption: str, settings: dict) -> None:
    assert caption_variants(caption, **settings) == (caption,)


@given(PLAIN_TAGS, SETTINGS)
def test_tags_come_from_the_caption_and_the_first_stay(tags: list[str], settings: dict) -> None:
    keep = settings["keep_tags"]
    for variant in caption_variants(", ".join(tags), **settings):
        own = variant.split(", ")
        assert own[: min(keep, len(tags))] == tags[:keep]
        assert not Counter(own) - Counter(tags)
        if not settings["tag_dropout"]:
            assert Counter(own) == Counter(tags)
        if not settings["shuffle_tags"]:
            assert own == [tag for tag in tags if tag in own] or len(set(tags)) < len(tags)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=3, unique=True), min_size=1, max_size=2))
def test_all_choices_come_up_where_there_is_room(groups: list[list[str]]) -> None:
    caption = "x " + " ".join("{" + "|".join(group) + "}" for group in groups)
    expected = {"x"}
    for group in groups:
        expected = {f"{before} {word}" for before in expected for word in group}
    found = caption_variants(caption, shuffle_tags=False, keep_tags=0, tag_dropout=0, count=9, seed=0)
    assert set(found) == expected


@given(st.text(max_size=30), SETTINGS)
def test_escaped_braces_are_plain(text: str, settings: dict) -> None:
    plain = text.replace("\\", "").replace(",", "")
    escaped = "".join(f"\\{c}" if c in "{|}" else c for c in plain)
    assert caption_variants(escaped, **settings) == (plain,)
