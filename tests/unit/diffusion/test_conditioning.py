"""What the UNet is told of a text."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionlora.data.cache import TensorCache
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.conditioning import text_states, token_ids, words_or_states
from visionlora.diffusion.denoiser import Denoiser, Tokens
from visionlora.diffusion.encode import encode_dataset, encode_text, text_keys
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


@pytest.mark.parametrize("family", ["tiny_model", "tiny_xl"])
@torch.no_grad()
def test_captions_of_several_windows(family: str, request: pytest.FixtureRequest, dogs: Path, tmp_path: Path) -> None:
    """Beside longer ones they mean what they mean alone, from the cache as from encoders that learn."""
    base = open_base(str(request.getfixturevalue(family))).reading(1, windows=3)
    captions = ["a dog", " ".join("abcdefghijklmnop"), " ".join("abcdefghijklmnopqrstuvwxyzabcdefgh")]
    items = [replace(item, caption=c) for item, c in zip(read_image_folder(dogs).items, captions, strict=True)]
    data = encode_dataset(base, items, 32, TensorCache(tmp_path / "c"))
    tokens, model = Tokens.of(base, data), Denoiser(base)
    noisy, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 99, 500, 900])
    rows, texts = [0, 1, 2, 0], [1, 2, 3, 0]
    told, said = (kind.conditioning(rows, texts, [0] * 4) for kind in (data, tokens))
    assert told.text.shape[1] == 6 * 16, "lengths of 1, 2 and 3 windows"
    together = base.pipe.unet(noisy, t, return_dict=False, **told.arguments())[0]
    torch.testing.assert_close(model(noisy, t, **said.arguments())[0], together, rtol=1e-4, atol=1e-5)
    for i in range(4):
        own = data.conditioning(rows[i : i + 1], texts[i : i + 1], [0])
        assert own.text.shape[1] == 16 * (1, 2, 3, 1)[i]
        alone = base.pipe.unet(noisy[i : i + 1], t[i], return_dict=False, **own.arguments())[0]
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert text_keys(base, captions) != text_keys(base.reading(1), captions)
