"""Prompts with weights, `(word:1.2)` as in A1111, and prompts longer than the text encoder reads, by compel (an extra)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from visionlora.diffusion.conditioning import all_ids, text_states, words_or_states
from visionlora.errors import ConfigError
from visionlora.models.base import quiet

WEIGHT = re.compile(r"(?<!\\)\((?P<words>(?:\\.|[^()\\])+?):\s*(?P<weight>\d+(?:\.\d+)?|\.\d+)\s*\)")
ESCAPED = re.compile(r"\\([()\[\]\\])")
INSTALL = "pip install 'visionlora[prompts]'"


def has_weights(prompt: str) -> bool:
    r"""Whether a prompt has `(word:1.2)` somewhere.

    >>> has_weights("a (red:1.3) heart"), has_weights("a heart (red)"), has_weights(r"(miku \(sitting\):1.2)")
    (True, False, True)
    """
    return WEIGHT.search(prompt) is not None


def read_otherwise(caption: str) -> bool:
    r"""Whether a caption means something else as a prompt: it has weights, or backslashes before brackets.

    >>> read_otherwise("a (red:1.3) heart"), read_otherwise(r"miku \(sitting\)"), read_otherwise("a heart (red)")
    (True, True, False)
    """
    return has_weights(caption) or unescaped(caption) != caption


ELSEWHERE = {
    "BREAK": re.compile(r"\bBREAK\b"),
    "AND": re.compile(r"\bAND\b"),
    "((word))": re.compile(r"(?<!\\)\(\("),
    "[word]": re.compile(r"(?<!\\)\[[^\]]+\]"),
    "weights around weights or below 0": re.compile(r":\s*-?[\d.]+\s*\)"),
    "{a|b}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "__name__": re.compile(r"__\w[\w/ *-]*__"),
    "embedding:name": re.compile(r"\bembedding:\w"),
}
"""What A1111, ComfyUI and their extensions read as commands."""


def read_as_words(prompts: Iterable[str]) -> list[str]:
    """What of `ELSEWHERE` is in prompts, where it is text.

    >>> read_as_words(["a ((red:1.3)) BREAK heart"]), read_as_words(["a (red:1.3) heart (big)"])
    (['BREAK', '((word))'], [])
    """
    rest = "\n".join(WEIGHT.sub("(w)", prompt) for prompt in prompts)
    return [what for what, pattern in ELSEWHERE.items() if pattern.search(rest)]


def unescaped(text: str) -> str:
    r"""A text without the backslashes that tell brackets from those of weights, as A1111 reads it.

    >>> unescaped(r"miku \(sitting\)")
    'miku (sitting)'
    """
    return ESCAPED.sub(r"\1", text)


def weighted(prompt: str) -> list[tuple[str, float]]:
    """The texts of a prompt and their weights; brackets that are none of a weight are text.

    >>> weighted("a (red:1.3) heart (big)")
    [('a', 1.0), ('red', 1.3), ('heart (big)', 1.0)]
    """
    found, at = [], 0
    for match in WEIGHT.finditer(prompt):
        found += [(prompt[at : match.start()], 1.0), (match["words"], float(match["weight"]))]
        at = match.end()
    texts = [(unescaped(text).strip(), weight) for text, weight in [*found, (prompt[at:], 1.0)]]
    return [(text, weight) for text, weight in texts if text] or [("", 1.0)]


def too_long(pipe: Any, prompt: str) -> bool:
    """Whether the text encoder would not see the end of a prompt."""
    return len(all_ids(pipe, pipe.tokenizer, unescaped(prompt))) > int(pipe.tokenizer.model_max_length)


def in_words(pipe: Any, prompt: str) -> bool:
    """Whether the pipeline reads the words of a prompt itself."""
    return not has_weights(prompt) and not too_long(pipe, prompt)


class ReadBefore:
    """A text encoder whose last hidden state is an earlier one, as compel calls it.

    compel has a setting of its own, for one layer before the last, which transformers since 5.6 breaks.
    """

    def __init__(self, encoder: Any, clip_skip: int) -> None:
        self.encoder, self.clip_skip = encoder, clip_skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def __call__(self, ids: Tensor, *mask: Tensor | None, **wanted: Any) -> SimpleNamespace:
        """ids (b, t) -> `last_hidden_state` (b, t, w)."""
        return SimpleNamespace(last_hidden_state=text_states([self.encoder], [ids], self.clip_skip, *mask)[0])


def prompt_arguments(pipe: Any, prompts: Sequence[str], negative: str, clip_skip: int = 1) -> dict[str, Any]:
    """What a pipeline is called with for a batch of pictures: the words, or embeddings where words are not enough.

    Args:
        pipe: of diffusers.
        prompts: one per picture.
        negative: what not to draw.
        clip_skip: see `BaseModel.clip_skip`.

    Raises:
        ConfigError: when compel is needed and not installed.
    """
    strange = next((text for text in (*prompts, negative) if not in_words(pipe, text)), None)
    if strange is None:
        return words_or_states(pipe, [unescaped(prompt) for prompt in prompts], unescaped(negative), clip_skip)
    try:
        from compel import Compel, DiffusersTextualInversionManager, ReturnedEmbeddingsType
        from compel.prompt_parser import Conjunction, FlattenedPrompt
    except ImportError:
        what = "has weights such as (word:1.2)" if has_weights(strange) else "is longer than the text encoder reads"
        raise ConfigError(f"The prompt {what}, for which compel is needed: {INSTALL}.") from None
    shared = {"textual_inversion_manager": DiffusersTextualInversionManager(pipe), "truncate_long_prompts": False}
    two = getattr(pipe, "text_encoder_2", None) is not None
    if two:
        reader = Compel(
            tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
            text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            requires_pooled=[False, True],
            **shared,
        )
    else:
        reader = Compel(tokenizer=pipe.tokenizer, text_encoder=ReadBefore(pipe.text_encoder, clip_skip), **shared)

    def read(text: str) -> tuple[Tensor, Tensor | None]:
        parts = weighted(text)  # not read by compel, whose own syntax would be found in it
        states = reader.build_conditioning_tensor_for_conjunction(Conjunction([FlattenedPrompt(parts)]))[0]
        words = " ".join(part for part, _ in parts)
        return states, reader.conditioning_provider.get_pooled_embeddings(
            [words], device=reader.device
        ) if two else None

    distinct = list(dict.fromkeys(prompts))
    with torch.no_grad(), quiet("transformers"):  # its tokenizers warn of texts that are read to their end here
        texts, (without, pooled_without) = [read(text) for text in distinct], read(negative)
        states = reader.pad_conditioning_tensors_to_same_length(
            [*(text for text, _ in texts), without], read("")[0] if two else None
        )
    if pooled_without is not None and not negative and pipe.config.get("force_zeros_for_empty_prompt", False):
        states[-1], pooled_without = states[-1] * 0, pooled_without * 0  # as the pipeline does
    rows = [distinct.index(prompt) for prompt in prompts]
    found = {
        "prompt_embeds": torch.cat([states[row] for row in rows]),
        "negative_prompt_embeds": torch.cat([states[-1]] * len(rows)),
    }
    if pooled_without is not None:
        found["pooled_prompt_embeds"] = torch.cat([pooled for row in rows if (pooled := texts[row][1]) is not None])
        found["negative_pooled_prompt_embeds"] = torch.cat([pooled_without] * len(rows))
    return found
