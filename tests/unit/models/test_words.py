"""Words that encoders are given."""

from pathlib import Path

import pytest
import torch

from visionlora.diffusion.conditioning import text_states, token_ids
from visionlora.diffusion.denoiser import LearnedWord
from visionlora.diffusion.encode import cut_captions
from visionlora.diffusion.prompts import too_long
from visionlora.models.base import BaseModel, open_base

pytestmark = pytest.mark.filterwarnings("ignore")


def summaries(base: BaseModel, captions: list[str]) -> torch.Tensor:
    ids = token_ids(base, captions)
    with torch.no_grad():
        _, pooled = text_states([encoder for _, _, encoder in base.text_parts()], ids)
    assert pooled is not None
    return pooled


def test_the_summary_of_a_text_reads_what_follows_the_word(tiny_xl: Path) -> None:
    base = open_base(str(tiny_xl))
    text_model = next(m for m in base.pipe.text_encoder_2.modules() if hasattr(m, "eos_token_id"))
    text_model.eos_token_id = 2  # as in the configuration of SDXL
    LearnedWord(base, "<w>", 1, "a")
    short, long = summaries(base, ["a <w> b", "a <w> c d e"])
    assert text_model.eos_token_id == base.pipe.tokenizer_2.eos_token_id
    assert not torch.allclose(short, long)


def test_a_word_of_many_vectors_is_counted(tiny_model: Path) -> None:
    base, prompt = open_base(str(tiny_model)), "a <w> b c d"
    LearnedWord(base, "<w>", 12, "a")
    assert too_long(base.pipe, prompt) and not too_long(base.pipe, "a <w>")
    ((caption, lost),) = cut_captions(base, [prompt])
    assert caption == prompt and lost == "c d"
