import re
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from visionlora.report.card import TAGS, model_card

NASTY = 'a "dog": #1 | it\'s\n---\n- [x](y) `code` <b> \\ & ${{ }} %'


def card(**changes: Any) -> str:
    given_by_default: dict[str, Any] = {
        "title": "Dog",
        "base_model": "visionlora/emoji-64",
        "trigger": "a zwx dog",
        "facts": {"rank": "8", "steps": "400"},
        "samples": [(f"a dog {number}", f"samples/{number}.png") for number in range(6)],
        "usage": "print('hello')",
        "images_note": "Five dogs.",
        "license": "apache-2.0",
    }
    return model_card(**(given_by_default | changes))


def split(text: str) -> tuple[Any, str]:
    """Front matter and body, cut the way the Hub cuts them."""
    found = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", text)
    assert found is not None
    return yaml.safe_load(found.group(2)), text[found.end() :]


def test_front_matter_names_base_trigger_and_samples() -> None:
    front, _ = split(card())
    assert front == {
        "license": "apache-2.0",
        "base_model": "visionlora/emoji-64",
        "tags": list(TAGS),
        "instance_prompt": "a zwx dog",
        "widget": [{"text": f"a dog {n}", "output": {"url": f"samples/{n}.png"}} for n in range(6)],
    }


def test_body_shows_pictures_facts_and_code() -> None:
    _, body = split(card())
    assert all(f"![a dog {number}](samples/{number}.png)" in body for number in range(6))
    assert "| rank | 8 |\n| steps | 400 |" in body
    assert "```python\nprint('hello')\n```" in body
    assert "Use `a zwx dog` in the prompt." in body and "Five dogs." in body


def test_what_is_not_given_is_left_out() -> None:
    text = card(trigger=None, samples=[], facts={}, images_note="", license=None)
    front, body = split(text)
    assert front == {"base_model": "visionlora/emoji-64", "tags": list(TAGS)}
    assert body == "\n# Dog\n\n## Use\n\n```python\nprint('hello')\n```\n"


@pytest.mark.parametrize("count", range(1, 10))
def test_every_row_of_the_gallery_has_as_many_fields(count: int) -> None:
    _, body = split(card(samples=[("a | b", "c.png")] * count))
    rows = re.findall(r"^\| .*!\[.*$|^\| a .*$|^\| :---.*$", body, re.MULTILINE)
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert body.count("c.png") == count


def test_a_fence_in_the_code_does_not_end_it() -> None:
    _, body = split(card(usage="text = '''\n```\n'''"))
    assert "````python\ntext = '''\n```\n'''\n````" in body


def check_round_trip(prompt: str, path: str) -> None:
    front, body = split(card(title=prompt, trigger=prompt or None, samples=[(prompt, path)], facts={prompt: prompt}))
    assert front["widget"] == [{"text": prompt, "output": {"url": path}}]
    assert front.get("instance_prompt", "") == prompt
    outside_code = re.sub("^Use .*$", "", body, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside_code)
    picture = re.search(r"\]\(([^()\s|]*)\) \|", body)
    assert picture is not None and unquote(picture.group(1)) == path


def test_a_nasty_prompt_stays_text() -> None:
    check_round_trip(NASTY, "samples/a (1) | b.png")


# Surrogates are no text that a file could hold.
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.text("ab /().|%ü", max_size=20))
def test_any_prompt_and_path_survive(prompt: str, path: str) -> None:
    check_round_trip(prompt, path)
