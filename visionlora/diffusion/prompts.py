"""Prompts with weights, `(word:1.2)` as in A1111, and prompts longer than the text encoder reads, by compel (an extra)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from visionlora.diffusion.conditioning import text_states, words_or_states
from visionlora.errors import ConfigError

WEIGHT = re.compile(r"\((?P<words>[^()]+?):\s*(?P<weight>\d+(?:\.\d+)?|\.\d+)\s*\)")
INSTALL = "pip install 'visionlora[prompts]'"


def has_weights(prompt: str) -> bool:
    """Whether a prompt has `(word:1.2)` somewhere.

    >>> has_weights("a (red:1.3) heart"), has_weights("a heart (red)")
    (True, False)
    """
    return WEIGHT.search(prompt) is not None


def as_compel(prompt: str) -> str:
    r"""A1111's weights in compel's syntax; other parentheses are text.

    >>> as_compel("a (red:1.3) heart (big)")
    'a (red)1.3 heart \\(big\\)'
    """
    parts, at = [], 0
    for match in WEIGHT.finditer(prompt):
        parts.append(re.sub(r"([()])", r"\\\1", prompt[at : match.start()]))
        parts.append(f"({match['words'].strip()}){float(match['weight']):g}")
        at = match.end()
    return "".join([*parts, re.sub(r"([()])", r"\\\1", prompt[at:])])


def too_long(pipe: Any, prompt: str) -> bool:
    """Whether the text encoder would not see the end of a prompt."""
    whole = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)  # a learned word may stand for several
    ids = pipe.tokenizer(whole, truncation=False, verbose=False).input_ids
    return len(ids) > int(pipe.tokenizer.model_max_length)


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
        prompts: one per picture; all the same where one of them, or `negative`, is not `in_words`.
        negative: what not to draw.
        clip_skip: see `BaseModel.clip_skip`.

    Raises:
        ConfigError: when compel is needed and not installed.
    """
    prompt = prompts[0]
    if all(in_words(pipe, p) for p in (prompt, negative)):
        return words_or_states(pipe, prompts, negative, clip_skip)
    try:
        from compel import Compel, DiffusersTextualInversionManager, ReturnedEmbeddingsType
    except ImportError:
        weighted = has_weights(prompt) or has_weights(negative)
        what = "has weights such as (word:1.2)" if weighted else "is longer than the text encoder reads"
        raise ConfigError(f"The prompt {what}, for which compel is needed: {INSTALL}.") from None
    shared = {"textual_inversion_manager": DiffusersTextualInversionManager(pipe), "truncate_long_prompts": False}
    if getattr(pipe, "text_encoder_2", None) is None:
        reader = Compel(tokenizer=pipe.tokenizer, text_encoder=ReadBefore(pipe.text_encoder, clip_skip), **shared)
        texts, more = [reader(as_compel(prompt)), reader(as_compel(negative))], {}
    else:
        reader = Compel(
            tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
            text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            requires_pooled=[False, True],
            **shared,
        )
        (text, pooled), (without, pooled_without) = reader(as_compel(prompt)), reader(as_compel(negative))
        if not negative and pipe.config.get("force_zeros_for_empty_prompt", False):
            without, pooled_without = without * 0, pooled_without * 0  # as the pipeline does
        texts = [text, without]
        more = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled_without}
    text, without = reader.pad_conditioning_tensors_to_same_length(texts)
    found = {"prompt_embeds": text, "negative_prompt_embeds": without, **more}
    return {name: value.repeat(len(prompts), *(1,) * (value.dim() - 1)) for name, value in found.items()}
