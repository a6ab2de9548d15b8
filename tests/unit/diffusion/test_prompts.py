"""Weights in prompts and prompts that are too long."""

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from visionlora.diffusion.denoiser import LearnedWord
from visionlora.diffusion.encode import cut_captions, encode_text
from visionlora.diffusion.prompts import ELSEWHERE, prompt_arguments, read_as_words, weighted
from visionlora.diffusion.sampling import long_states
from visionlora.errors import ConfigError
from visionlora.models.base import BaseModel, open_base

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


def test_every_prompt_of_a_batch_is_read(pipe) -> None:
    pytest.importorskip("compel")
    prompts = ["z", "a (dog:1.5) b", "z"]
    with torch.no_grad():
        together = prompt_arguments(pipe, prompts, "x")
        alone = prompt_arguments(pipe, prompts[1:2], "x")
    torch.testing.assert_close(together["prompt_embeds"][:1], encoded(pipe, "z"))
    assert torch.equal(together["prompt_embeds"][0], together["prompt_embeds"][2])
    assert torch.equal(together["prompt_embeds"][1:2], alone["prompt_embeds"])
    assert len(together["negative_prompt_embeds"]) == 3


def test_without_compel_it_says_what_to_install(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(ConfigError, match=r"has weights such as \(word:1.2\), for which compel is needed: pip install"):
        prompt_arguments(pipe, ["a (dog:1.2)"], "")
    with pytest.raises(ConfigError, match="is longer than the text encoder reads, for which compel is needed"):
        prompt_arguments(pipe, ["abcdefghijklmnopqrstuvwxyz"], "")


def test_several_weights() -> None:
    assert weighted("(a cat:1.2) and (dog: .5), (plain)") == [
        ("a cat", 1.2), ("and", 1.0), ("dog", 0.5), (", (plain)", 1.0)
    ]  # fmt: skip
    assert weighted(" ") == [("", 1.0)] and weighted(r"a \(b:1.2\) c") == [("a (b:1.2) c", 1.0)]
    assert weighted(r"(miku \(sitting\):1.2)") == [("miku (sitting)", 1.2)]


@pytest.mark.parametrize(
    "text", ["a+ b-", 'say "hi"', "a.blend(1)", "[x|y] {z}", "(a, b).and()", "a+++ (b)-", r"c \(d\)"]
)
def test_only_weights_are_syntax(text: str, pipe) -> None:
    """The same words, whether a weight beside them or their length makes compel read them or not."""
    pytest.importorskip("compel")
    plain = prompt_arguments(pipe, [text], "")
    assert plain["prompt"] == [text.replace("\\", "")]
    pipe.tokenizer.model_max_length = 64
    pipe.text_encoder = Spelled()
    with torch.no_grad():
        prompt_arguments(pipe, [f"{text} (red:1.3)"], "")
    expected = pipe.tokenizer(f"{plain['prompt'][0]} red").input_ids
    assert any(ids[: len(expected)] == expected for ids in pipe.text_encoder.seen)


class Spelled:
    """A text encoder that keeps the tokens it is given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, *mask: object, **wanted: object) -> tuple[torch.Tensor]:
        self.seen.append(ids[0].tolist())
        return (torch.nn.functional.one_hot(ids.long(), 64).float(),)


def test_a_long_prompt_of_sdxl_and_a_short_negative_one(tiny_xl: Path) -> None:
    pytest.importorskip("compel")
    pipe = open_base(str(tiny_xl)).pipe
    found = prompt_arguments(pipe, ["abcdefghijklmnopqrst uvw xyz"], "")
    assert found["prompt_embeds"].shape == found["negative_prompt_embeds"].shape == (1, 32, 40)
    assert not found["negative_prompt_embeds"].any(), "as the pipeline has it for no text"
    one, plain = (prompt_arguments(pipe, [f"a ({w}) b"], "x") for w in ("dog:1.0", "dog:1.5"))
    assert torch.equal(one["pooled_prompt_embeds"], plain["pooled_prompt_embeds"]), "the summary has no weights in it"


@pytest.fixture
def punctuated(tiny_model: Path, tmp_path: Path) -> BaseModel:
    """Stable Diffusion 1.x whose tokenizer knows where sentences and phrases end."""
    base = open_base(str(tiny_model))
    vocabulary = base.pipe.tokenizer.get_vocab()
    words = [*sorted(vocabulary, key=lambda word: vocabulary[word]), ".</w>", ",</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    base.pipe.tokenizer = CLIPTokenizer(*files, model_max_length=16)
    base.pipe.text_encoder.resize_token_embeddings(len(words))
    return base


LONG = {
    "sentences": "a dog. a cat, a. b c d e f g h i j",
    "phrases": "a dog, a cat, a b c d e f g h i j",
    "words": "abc de fgh <it> abc de fgh <it> abc de",
    "one word": "a" * 40,
    "sdxl": "abcdefghij klmn op <it> q rstuv w",
}


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_caption_is_learned_as_it_is_drawn(
    text: str, clip_skip: int, punctuated: BaseModel, tiny_xl: Path
) -> None:
    """The same windows, parted at the same places, and for SDXL the same summary."""
    pytest.importorskip("compel")
    if text == LONG["sdxl"] and clip_skip > 1:
        pytest.skip("SDXL has no clip_skip")
    base = (open_base(str(tiny_xl)) if text == LONG["sdxl"] else punctuated).reading(clip_skip, windows=3)
    LearnedWord(base, "<it>", 2, "dog")
    (learned,) = encode_text(base, [text])
    found = prompt_arguments(base.pipe, [text], "", clip_skip)
    assert not cut_captions(base, [text]) and len(learned["text"]) > 16
    torch.testing.assert_close(learned["text"], found["prompt_embeds"][0], rtol=1e-4, atol=1e-5)
    if base.is_xl:
        torch.testing.assert_close(learned["pooled"], found["pooled_prompt_embeds"][0], rtol=1e-4, atol=1e-5)
    drawn = long_states(base, [text])  # the samples of a run
    assert drawn.keys() == found.keys()
    for name, states in found.items():
        torch.testing.assert_close(drawn[name], states, rtol=1e-4, atol=1e-5)
    assert not long_states(base, ["a dog"]), "it goes as it is"


def test_a_long_caption_of_the_embedded_model_is_learned_as_it_is_drawn() -> None:
    pytest.importorskip("compel")
    base = open_base("emoji-64").reading(1, windows=3)
    text = "a small dog with a red hat and " * 3
    found = prompt_arguments(base.pipe, [text], "")["prompt_embeds"][0]
    assert len(found) > base.pipe.tokenizer.model_max_length and not cut_captions(base, [text])
    torch.testing.assert_close(encode_text(base, [text])[0]["text"], found, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_into_the_windows_is_named(tiny_model: Path) -> None:
    base = open_base(str(tiny_model)).reading(1, windows=2)
    ((_, lost),) = cut_captions(base, [" ".join("abcdefghijklmnopqrstuvwxyzabcd")])
    assert lost == "c d" and encode_text(base, ["a"])[0]["text"].shape[0] == 16


def test_no_warning_of_a_prompt_that_is_read_to_its_end(pipe) -> None:
    pytest.importorskip("compel")
    said: list[str] = []
    another = copy.deepcopy(pipe.tokenizer)  # each warns once
    ears = logging.Handler()
    ears.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("transformers")
    log.addHandler(ears)
    try:
        read = prompt_arguments(pipe, ["a dog " * 20], "")
        assert not [line for line in said if "longer than" in line]
        another("a dog " * 20)
    finally:
        log.removeHandler(ears)
    assert read["prompt_embeds"].shape[1] > 16 and [line for line in said if "longer than" in line]


def test_commands_of_other_programs_are_told_of() -> None:
    """They were read as words without a word."""
    written = {
        "BREAK": "a dog BREAK a hat",
        "AND": "a dog AND a hat",
        "((word))": "((red:1.2)) hat",
        "[word]": "a [red] hat",
        "weights around weights or below 0": "(a (red:1.2) hat:1.1)",
        "{a|b}": "a {red|blue} hat",
        "__name__": "a __colours/warm__ hat",
        "embedding:name": "embedding:bad-hands",
    }
    assert {what: read_as_words([text]) for what, text in written.items()} == {what: [what] for what in ELSEWHERE}
    assert read_as_words(["(a:-1)"]) == ["weights around weights or below 0"]
    known = ["a (red:1.2)(blue:1.1) hat (big)", r"\(\(x \[y\]", "a breakfast and a hat: 1", "", "snake_case a__b"]
    assert not read_as_words(known)
