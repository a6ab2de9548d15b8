"""Words of its own that a text encoder learns or is given (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visionlora.models.base import quiet

HIGHEST = 2
"""`eos_token_id` of old configurations of CLIP: the text ends at the highest token."""


def add_word(pipe: Any, word: str, vectors: Tensor, tokenizer: Any, encoder: nn.Module) -> None:
    """Gives a word with these vectors, (n, width), to one text encoder of a pipeline.

    The encoder's summary of a text is read where the text ends, also in encoders that look for the highest token: those of
    new words lie above it, and what follows the word would be lost (transformers, pull request 24773).

    Raises:
        ValueError: when the word is there already.
    """
    with quiet("diffusers", "transformers"):
        pipe.load_textual_inversion(vectors, token=word, text_encoder=encoder, tokenizer=tokenizer)
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == HIGHEST:
            module.eos_token_id = tokenizer.eos_token_id


def take_words(pipe: Any, words: list[str], tokenizer: Any, encoder: Any) -> None:
    """Takes words off one text encoder of a pipeline and its tokenizer again."""
    with quiet("diffusers", "transformers"):
        pipe.unload_textual_inversion(words, tokenizer=tokenizer, text_encoder=encoder)
    # diffusers makes a new table, and leaves the numbers of the longer one, with which a saved model would not open.
    table = encoder.get_input_embeddings().requires_grad_(False).train(encoder.training)
    encoder.config.vocab_size = encoder.vocab_size = table.num_embeddings
