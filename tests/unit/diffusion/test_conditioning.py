"""What the UNet is told of a text."""

from pathlib import Path

import pytest
import torch

from visionlora.diffusion.conditioning import text_states, token_ids, words_or_states
from visionlora.diffusion.encode import encode_text, text_keys
from visionlora.errors import ModelError
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_a_text_read_before_the_last_layer_is_that_of_an_encoder_without_it(tiny_model: Path) -> None:
    base, shorter = open_base(str(tiny_model)), open_base(str(tiny_model))
    encoder = shorter.pipe.text_encoder
    layers = next(m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList))
    del layers[-1]
    ids = token_ids(base, ["a dog"])
    text, _ = text_states([base.pipe.text_encoder], ids, 2)
    assert torch.equal(text, encoder(ids[0])[0])
    earlier = base.reading(2)
    (last,), (before,) = encode_text(base, ["a dog"]), encode_text(earlier, ["a dog"])
    assert torch.equal(before["text"], text[0]) and not torch.allclose(last["text"], before["text"])
    assert text_keys(base, ["a dog"]) != text_keys(earlier, ["a dog"])
    given = words_or_states(base.pipe, ["a dog", "a cat"], "", 2)
    assert torch.equal(given["prompt_embeds"][:1], text) and given["negative_prompt_embeds"].shape[0] == 2


def test_what_cannot_be_read_earlier(tiny_model: Path, tiny_xl: Path) -> None:
    with pytest.raises(ModelError, match=r"clip_skip is 3; the text encoder of .* has 2 layers: give 1 .* to 2"):
        open_base(str(tiny_model)).reading(3)
    with pytest.raises(ModelError, match="an SDXL, whose text is always read before the last layer"):
        open_base(str(tiny_xl)).reading(2)
