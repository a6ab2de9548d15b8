"""Words of their own that adapters bring (textual inversion): on a pipeline while the adapters are, and off it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import ConfigError
from visionlora.loaders import add_token, check_width
from visionlora.lora.adapter import Adapter
from visionlora.models.words import take_words

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Words:
    """The words that a mix has given to its pipeline."""

    def __init__(self, target: Any, allow_partial: bool) -> None:
        """None yet.

        Args:
            target: a pipeline of diffusers; anything else has no words.
            allow_partial: leave out words that it has no place for.
        """
        self.target, self.allow_partial = target, allow_partial
        self._added: list[tuple[list[str], Any, Any]] = []

    @property
    def encoders(self) -> list[Any]:
        """The text encoders that have some."""
        return list({id(encoder): encoder for _, _, encoder in self._added}.values())

    def add(self, adapters: Mapping[str, Adapter]) -> None:
        """Gives the pipeline the words of these adapters.

        Raises:
            ConfigError: when it has no tokenizer for one, or another meaning of it.
            AdapterFileError: when a word was learned for another family.
        """
        for name, adapter in adapters.items():
            for word, parts in adapter.embeddings.items():
                for component, vectors in parts.items():
                    tokenizer = getattr(self.target, TOKENIZERS.get(component, ""), None)
                    encoder = getattr(self.target, component, None)
                    if tokenizer is None or encoder is None:
                        if self.allow_partial:
                            continue
                        raise ConfigError(
                            f"Adapter {name!r} brings the word {word!r} for {component}, for which there is no tokenizer here: "
                            "attach it to a pipeline. allow_partial=True leaves the word out."
                        )
                    self._give(name, word, vectors, tokenizer, encoder)

    def _give(self, name: str, word: str, vectors: Tensor, tokenizer: Any, encoder: Any) -> None:
        check_width(word, vectors, encoder)
        spelled = [word, *(f"{word}_{k}" for k in range(1, len(vectors)))]
        known = tokenizer.get_vocab()
        if word in known:
            table = encoder.get_input_embeddings().weight
            ids = [known[w] for w in spelled if w in known]
            if len(ids) == len(spelled) and torch.equal(table[ids].cpu(), vectors.to(table.dtype).cpu()):
                return
            if all(word not in given for given, of, _ in self._added if of is tokenizer):
                raise ConfigError(
                    f"Adapter {name!r} brings the word {word!r}, which the tokenizer has already: the word of a textual "
                    "inversion is the name of its file. Rename the file to a word that is not there, such as "
                    f"'my-{word}'."
                )
            raise ConfigError(
                f"Adapter {name!r} brings the word {word!r}, which means something else here already: two adapters that were "
                "trained with the same word cannot be drawn together. Train one of them with another."
            )
        add_token(self.target, word, vectors, tokenizer, encoder)
        encoder.get_input_embeddings().requires_grad_(False)
        self._added.append((spelled, tokenizer, encoder))

    def remove(self) -> None:
        """Takes them off; tokenizers and embeddings are as before."""
        while self._added:
            spelled, tokenizer, encoder = self._added.pop()
            take_words(self.target, spelled, tokenizer, encoder)
