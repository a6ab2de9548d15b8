"""A UNet whose text encoders, or a new word, learn with it.

The text is then not the same from step to step, so captions travel as token ids and are encoded anew each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.diffusion.conditioning import as_long, ids_of, text_states, token_ids, window_states, windows_of
from visionlora.diffusion.encode import Encoded
from visionlora.errors import ConfigError
from visionlora.models.base import BaseModel
from visionlora.models.words import add_word

RARE_WORD = "sks"


@dataclass(frozen=True)
class TokenConditioning:
    """What a `Denoiser` is told of a batch: like `Conditioning`, with token ids in place of the text's embeddings."""

    ids: tuple[Tensor, ...]
    """For each text encoder (b, tokens); of captions that may have several windows (b, windows, tokens)."""
    there: Tensor | None
    """1 where there is a caption, (b,), for models that read zeros where there is none."""
    sizes: Tensor | None
    """(b, 6), SDXL alone."""
    summary: Tensor | None = None
    """The beginnings of captions that may have several windows, (b, tokens), for the second encoder's summary."""

    def arguments(self) -> dict[str, Any]:
        """As a `Denoiser` takes them."""
        return {"token_ids": self.ids, "there": self.there, "sizes": self.sizes, "summary": self.summary}

    def to(self, device: torch.device) -> TokenConditioning:
        """On a device."""
        moved = [None if t is None else t.to(device) for t in (self.there, self.sizes, self.summary)]
        return TokenConditioning(tuple(i.to(device) for i in self.ids), *moved)

    def __getitem__(self, part: slice) -> TokenConditioning:
        cut = [None if t is None else t[part] for t in (self.there, self.sizes, self.summary)]
        return TokenConditioning(tuple(i[part] for i in self.ids), *cut)


@dataclass(frozen=True)
class Tokens:
    """The captions of a data set as token ids."""

    data: Encoded
    ids: tuple[Tensor, ...]
    """For each text encoder (captions, tokens); of captions that may have several windows, the last encoder's beginnings."""
    is_xl: bool
    windows: tuple[tuple[Tensor, ...], ...] = ()
    """For each text encoder and caption (windows, tokens), where captions may have several."""

    @classmethod
    def of(cls, base: BaseModel, data: Encoded) -> Tokens:
        """Of all captions of a data set."""
        if base.windows == 1:
            return cls(data, tuple(token_ids(base, data.captions)), base.is_xl)
        parts = base.text_parts()
        windows = [tuple(windows_of(base.pipe, t, c, base.windows)[0] for c in data.captions) for _, t, _ in parts]
        return cls(data, (ids_of(base.pipe, parts[-1][1], data.captions),), base.is_xl, tuple(windows))

    def conditioning(
        self, pictures: Sequence[int], captions: Sequence[int], variants: Sequence[int]
    ) -> TokenConditioning:
        """See `Encoded.conditioning`."""
        there = torch.tensor([float(c != 0) for c in captions]) if self.data.zero_when_empty else None
        sizes = self.data.sizes(pictures, variants) if self.is_xl else None
        ids = tuple(i[list(captions)] for i in self.ids)
        if not self.windows:
            return TokenConditioning(ids, there, sizes)
        read = tuple(torch.stack(as_long([own[c] for c in captions])) for own in self.windows)
        return TokenConditioning(read, there, sizes, ids[-1])


class Denoiser(nn.Module):
    """UNet and text encoders in one module, called like the UNet."""

    def __init__(self, base: BaseModel, word: LearnedWord | None = None) -> None:
        super().__init__()
        self.unet: nn.Module = base.pipe.unet
        for name, _, encoder in base.text_parts():
            self.add_module(name, encoder)
        self.names = [name for name, _, _ in base.text_parts()]
        self.clip_skip = base.clip_skip
        if word is not None:
            self.word = word

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        *,
        token_ids: Sequence[Tensor],
        there: Tensor | None = None,
        sizes: Tensor | None = None,
        summary: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        """See `TokenConditioning` for the arguments."""
        encoders = [getattr(self, name) for name in self.names]
        if summary is None:
            text, pooled = text_states(encoders, token_ids, self.clip_skip)
        else:
            text, pooled = window_states(encoders, token_ids, summary, self.clip_skip)
        if pooled is None:
            return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=return_dict)
        if there is not None:
            text, pooled = text * there[:, None, None], pooled * there[:, None]
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=return_dict)


class LearnedWord(nn.Module):
    """A new word whose embeddings are learned (textual inversion, arXiv 2208.01618), in every text encoder.

    From construction on tokenizers know the word, and embedding tables give the vectors that learn for it. It has the
    methods of an adapter's handle, so that both can learn together.
    """

    def __init__(
        self,
        base: BaseModel,
        token: str,
        count: int,
        initializer: str | None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds the word to a base model.

        Args:
            base: whose tokenizers and embedding tables grow.
            token: the word; it must be new.
            count: embeddings that stand for it.
            initializer: words that it starts from, repeated to `count`; a rare word when None.
            learned: by text encoder, (count, width), what was learned before and is learned on from.

        Raises:
            ConfigError: when the word is there already.
        """
        super().__init__()
        self.token, self.scale = token, 1.0
        self.start = f"{token} {count} {initializer}"
        """What it means before it learns, in words that tell caches of texts apart."""
        self.initial: dict[str, Tensor] = {}
        self.vectors = nn.ParameterDict()
        for name, tokenizer, encoder in base.text_parts():
            if token in tokenizer.get_vocab():
                raise ConfigError(
                    f"token is {token!r}, which the model knows already; take a new word, such as <my-{token}>."
                )
            ids = tokenizer(initializer or RARE_WORD, add_special_tokens=False).input_ids
            rows = [ids[i % len(ids)] for i in range(count)]
            vectors = encoder.get_input_embeddings().weight.detach()[rows].float()
            if count > len(ids):  # equal vectors would learn the same
                dice = torch.Generator().manual_seed(count)
                vectors = vectors + 0.1 * vectors.std() * torch.randn(vectors.shape, generator=dice).to(vectors)
            add_word(base.pipe, token, vectors, tokenizer, encoder)
            table = encoder.get_input_embeddings()
            table.weight.requires_grad_(False)
            start = vectors if learned is None else learned[name].to(vectors)
            self.initial[name], self.vectors[name] = vectors, nn.Parameter(start.clone())
            words = [token, *(f"{token}_{i}" for i in range(1, count))]
            table.register_forward_hook(self._hook(name, tokenizer.convert_tokens_to_ids(words)))
        if learned is not None:
            values = b"".join(v.detach().cpu().numpy().tobytes() for v in self.vectors.values())
            self.start += f" {hashlib.sha256(values).hexdigest()[:16]}"

    def _hook(self, name: str, ids: Sequence[int]) -> Any:
        def replaced(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            vectors = self.vectors[name]
            if self.scale != 1:
                vectors = torch.lerp(self.initial[name].to(vectors), vectors, self.scale)
            for vector, i in zip(vectors.to(output.dtype), ids, strict=True):
                output = torch.where((inputs[0] == i)[..., None], vector, output)
            return output

        return replaced

    def embeddings(self) -> dict[str, dict[str, Tensor]]:
        """For an `Adapter`: token -> text encoder -> (count, width)."""
        return {self.token: {name: v.detach().cpu().float().clone() for name, v in self.vectors.items()}}

    def set_scale(self, scale: float) -> None:
        """At 0 the word reads as the words it started from."""
        self.scale = float(scale)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `Handle.parameter_groups`; embeddings are not decayed."""
        return [{"name": "token", "params": list(self.vectors.values()), "lr": lr, "weight_decay": 0.0}]

    def regularisation(self) -> Tensor | None:
        """There is none."""
        return None

    def after_step(self, step: int, steps: int) -> None:
        """See `Handle.after_step`; nothing is to be done."""

    def training_state(self) -> dict[str, Tensor]:
        """See `Handle.training_state`."""
        return {name: v.detach() for name, v in self.vectors.items()}

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Handle.load_training_state`."""
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in self.vectors.items()}:
            raise ConfigError("The checkpoint is of another token: its embeddings are not those of this one.")
        for name, vectors in state.items():
            self.vectors[name].copy_(vectors)
