"""What the UNet is told beside the noisy latents: text, and for SDXL a summary of it and the sizes of the picture.

Letters in shapes: b pictures, t tokens, w width of the text embeddings, p width of the summary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.models.base import BaseModel, quiet


@dataclass(frozen=True)
class Conditioning:
    """Of a batch of pictures."""

    text: Tensor
    """(b, t, w)."""
    pooled: Tensor | None = None
    """Summary of the text, (b, p); SDXL alone."""
    sizes: Tensor | None = None
    """Original size, corner of the cut and size in px, (b, 6); SDXL alone."""

    def arguments(self) -> dict[str, Any]:
        """As a UNet of diffusers takes them."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.text}
        return {
            "encoder_hidden_states": self.text,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": self.sizes},
        }

    def to(self, device: torch.device) -> Conditioning:
        """On a device."""
        return Conditioning(
            *(None if t is None else t.to(device) for t in (self.text, self.pooled, self.sizes))  # type: ignore[arg-type]
        )

    def __getitem__(self, part: slice) -> Conditioning:
        return Conditioning(
            *(None if t is None else t[part] for t in (self.text, self.pooled, self.sizes))  # type: ignore[arg-type]
        )


def token_ids(base: BaseModel, captions: Sequence[str]) -> list[Tensor]:
    """Of each text encoder, (captions, t), cut and padded to what it reads."""
    return [ids_of(base.pipe, tokenizer, captions) for _, tokenizer, _ in base.text_parts()]


def ids_of(pipe: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(texts, t), cut and padded to what the encoder reads."""
    whole = [spelled_out(pipe, tokenizer, text) for text in texts]
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    ids: Tensor = tokenizer(whole, return_tensors="pt", **limit).input_ids
    return ids


def spelled_out(pipe: Any, tokenizer: Any, text: str) -> str:
    """A text with all the tokens of its learned words, of which one may stand for several."""
    with quiet("transformers"):  # which warns here of every long text, though none is cut
        found: str = pipe.maybe_convert_prompt(text, tokenizer)
    return found


def all_ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text of any length, with begin and end."""
    ids: list[int] = tokenizer(spelled_out(pipe, tokenizer, text), truncation=False, verbose=False).input_ids
    return ids


SENTENCE_ENDS, PHRASE_ENDS = (".</w>",), (".</w>", ",</w>", ";</w>", ":</w>")
"""Tokens of CLIP after which a long text is parted, the first best; else after a word."""


def windows_of(pipe: Any, tokenizer: Any, text: str, most: int) -> tuple[Tensor, list[int]]:
    """A text of any length as the encoder reads it in several windows (w, t), and the tokens that are lost behind the last.

    As compel parts the prompts of `generate`: at the end of a sentence, of a phrase, or of a word, each window with its own
    begin, end and padding. The last that there may be is filled.
    """
    length = int(tokenizer.model_max_length)
    ids = all_ids(pipe, tokenizer, text)
    if len(ids) <= length:
        return ids_of(pipe, tokenizer, [text]), []
    rows: list[list[int]] = []
    rest = ids[1:-1]
    while rest and len(rows) < most:
        end = length - 2 if len(rows) == most - 1 else parting(tokenizer, rest, length - 2)
        row = [tokenizer.bos_token_id, *rest[:end], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        rest = rest[end:]
    return torch.tensor(rows), rest


def parting(tokenizer: Any, ids: Sequence[int], most: int) -> int:
    """How many tokens the first window takes."""
    if len(ids) <= most:
        return most
    words = tokenizer.convert_ids_to_tokens(list(ids[:most]))
    for ends in (SENTENCE_ENDS, PHRASE_ENDS, tuple(word for word in words if word.endswith("</w>"))):
        if found := [i for i, word in enumerate(words) if word in ends]:
            return found[-1] + 1
    return most


def as_long(texts: Sequence[Tensor]) -> list[Tensor]:
    """Texts (tokens or windows first) repeated to one length.

    Attention to the same tokens several times is attention to them once: the copies share their weight. So a caption means the
    same beside a longer one as alone.
    """
    length = math.lcm(*(len(text) for text in texts))
    return [t if len(t) == length else t.repeat(length // len(t), *(1,) * (t.dim() - 1)) for t in texts]


def window_states(
    encoders: Sequence[nn.Module], ids: Sequence[Tensor], summary: Tensor | None, clip_skip: int = 1
) -> tuple[Tensor, Tensor | None]:
    """As `text_states`, of captions in several windows: text (b, w·t, width), and for two encoders the summary (b, p).

    Args:
        encoders: of transformers.
        ids: for each encoder (b, w, t).
        summary: for the second encoder (b, t), the beginning of each caption, which its summary is of.
        clip_skip: see `text_states`.
    """
    rows = len(ids[0])
    text, pooled = text_states(encoders, [i.flatten(0, 1) for i in ids], clip_skip)
    if pooled is not None and summary is not None:
        pooled = summary_of(encoders[-1], summary)
    return text.reshape(rows, -1, text.shape[-1]), pooled


def summary_of(encoder: Any, ids: Tensor) -> Tensor:
    """SDXL's summary of texts, (b, p), by its second encoder."""
    pooled: Tensor = encoder(ids.to(encoder.device))[0]
    return pooled


def text_states(
    encoders: Sequence[nn.Module], ids: Sequence[Tensor], clip_skip: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the UNet reads of captions: text (b, t, w), and for two encoders the summary (b, p).

    One encoder (Stable Diffusion 1.x and 2.x): its last hidden state. Two (SDXL): of both the last but one, side by side, and
    the projection of the second (arXiv 2307.01952, section 2.1).

    Args:
        encoders: of transformers.
        ids: for each encoder, (b, t).
        clip_skip: of one encoder, how many layers from the end it is read; see `BaseModel.clip_skip`.
        mask: of one encoder, (b, t), 0 where a token is not to be seen by others.
    """
    if len(encoders) == 1:
        encoder: Any = encoders[0]
        if clip_skip == 1:
            return encoder(ids[0], mask)[0], None
        states = encoder(ids[0], mask, output_hidden_states=True).hidden_states[-clip_skip]
        return getattr(encoder, "text_model", encoder).final_layer_norm(states), None
    found = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
    return torch.cat([f.hidden_states[-2] for f in found], dim=-1), found[-1][0]


def words_or_states(pipe: Any, prompts: Sequence[str], negative: str, clip_skip: int) -> dict[str, Any]:
    """What a pipeline is called with: the words, or where they are read before the last layer what the encoder makes of them.

    A pipeline of diffusers could do the latter itself, but not with every version of transformers. As there, `negative` is read
    once for each picture: adapters may have another scale on each.
    """
    if clip_skip == 1:
        return {"prompt": list(prompts), "negative_prompt": [negative] * len(prompts) if negative else None}
    count = len(prompts)
    ids = ids_of(pipe, pipe.tokenizer, [*prompts, *[negative] * count])
    with torch.no_grad():
        states, _ = text_states([pipe.text_encoder], [ids.to(pipe.text_encoder.device)], clip_skip)
    return {"prompt_embeds": states[:count], "negative_prompt_embeds": states[count:]}


def empty_is_zero(base: BaseModel) -> bool:
    """Whether the model was trained with zeros, not the empty caption's embedding, where there is no caption."""
    return base.is_xl and bool(base.pipe.config.get("force_zeros_for_empty_prompt", False))
