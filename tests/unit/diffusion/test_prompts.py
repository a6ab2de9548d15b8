"""Weights in prompts and prompts that are too long."""

import sys
from pathlib import Path

import pytest
import torch

from visionlora.diffusion.prompts import as_compel, prompt_arguments
from visionlora.errors import ConfigError
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipe(tiny_model: Path):
    return open_base(str(tiny_model)).pipe


def encoded(pipe, text: str) -> torch.Tensor:
    ids = pipe.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def test_plain_words_go_as_they_are(pipe) -> None:
    assert prompt_arguments(pipe, ["a dog (big)"], "") == {"prompt": ["a dog (big)"], "negative_prompt": None}


def test_weights_of_one_are_the_words_and_others_move_their_tokens(pipe) -> None:
    pytest.importorskip("compel")
    with torch.no_grad():
        one = prompt_arguments(pipe, ["a (dog:1.0) b"], "x")
        strong = prompt_arguments(pipe, ["a (dog:1.5) b"], "x")
    torch.testing.assert_close(one["prompt_embeds"], encoded(pipe, "a dog b"))
    torch.testing.assert_close(one["negative_prompt_embeds"], encoded(pipe, "x"))
    moved = (strong["prompt_embeds"] - one["prompt_embeds"]).abs().amax(-1)[0]
    assert bool((moved[2:5] > 0).all()) and float(moved[0]) == 0


def test_weights_are_read_before_the_last_layer_too(pipe) -> None:
    pytest.importorskip("compel")
    with torch.no_grad():
        plain = prompt_arguments(pipe, ["a dog b"], "x", clip_skip=2)
        one = prompt_arguments(pipe, ["a (dog:1.0) b"], "x", clip_skip=2)
        strong, last = (prompt_arguments(pipe, ["a (dog:1.5) b"], "x", clip_skip=skip) for skip in (2, 1))
        weak = prompt_arguments(pipe, ["a (dog:0.5) b"], "x", clip_skip=2)
    for name, states in plain.items():
        torch.testing.assert_close(one[name], states)
    assert all(not torch.equal(other["prompt_embeds"], plain["prompt_embeds"]) for other in (strong, weak, last))
    assert not torch.allclose(strong["prompt_embeds"], last["prompt_embeds"])


def test_the_end_of_a_long_prompt_counts(pipe) -> None:
    pytest.importorskip("compel")
    words = "abcdefghijklmnopqrst uvw xyz"
    with torch.no_grad():
        long, other = (prompt_arguments(pipe, [words + end], "")["prompt_embeds"] for end in (" a", " b"))
    assert long.shape[1] > 16 and not torch.equal(long, other)


def test_without_compel_it_says_what_to_install(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(ConfigError, match=r"has weights such as \(word:1.2\), for which compel is needed: pip install"):
        prompt_arguments(pipe, ["a (dog:1.2)"], "")
    with pytest.raises(ConfigError, match="is longer than the text encoder reads, for which compel is needed"):
        prompt_arguments(pipe, ["abcdefghijklmnopqrstuvwxyz"], "")


def test_several_weights() -> None:
    assert as_compel("(a cat:1.2) and (dog: .5), (plain)") == r"(a cat)1.2 and (dog)0.5, \(plain\)"
