"""What the UNet is told beside the noisy latents: text, and for SDXL a summary of it and the sizes of the picture.

Letters in shapes: b pictures, t tokens, w width of the text embeddings, p width of the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.models.base import BaseModel


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
    """(texts, t), cut and padded to what the encoder reads; a learned word may stand for several."""
    whole = [pipe.maybe_convert_prompt(text, tokenizer) for text in texts]
    limit = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    ids: Tensor = tokenizer(whole, return_tensors="pt", **limit).input_ids
    return ids


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
