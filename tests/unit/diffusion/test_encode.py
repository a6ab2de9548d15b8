"""Latents and captions: right, cached, and drawn anew."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visionlora.data.cache import TensorCache
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.encode import cut_captions, encode_dataset, encode_text
from visionlora.models.base import open_base


def test_latents_are_those_of_the_vae(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base, folder = open_base(str(tiny_model)), read_image_folder(dogs)
    data = encode_dataset(base, folder.items, 32, flip=True, cache=TensorCache(tmp_path / "c"))
    assert data.mean.shape == (3, 2, 4, 8, 8)
    picture = np.asarray(Image.open(folder.items[1].path))
    for variant, pixels in enumerate((picture, picture[:, ::-1])):
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = base.pipe.vae.encode(x).latent_dist
        torch.testing.assert_close(data.mean[1, variant], expected.mean[0].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(data.std[1, variant], expected.std[0].detach(), rtol=1e-4, atol=1e-4)
    one, zero = torch.tensor([1]), torch.tensor([0])
    drawn = data.latents(one, zero, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(drawn, data.mean[1:2, 0] * base.pipe.vae.config.scaling_factor)


def test_captions_are_encoded_as_the_pipeline_does(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    expected, empty = base.pipe.encode_prompt("a dog", "cpu", 1, True, "")
    torch.testing.assert_close(encode_text(base, ["a dog", ""]), torch.cat([expected, empty]), rtol=0, atol=1e-6)


def test_captions_that_are_too_long_are_named_with_what_is_lost(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    long = "a b c d e f g h i j k l m n o p"
    assert cut_captions(base, ["a b", long, long]) == [(long, "o p")]


def test_a_second_start_computes_nothing_and_another_model_everything(
    tiny_model: Path, dogs: Path, tmp_path: Path
) -> None:
    base, folder, cache = open_base(str(tiny_model)), read_image_folder(dogs), TensorCache(tmp_path / "c")
    first = encode_dataset(base, folder.items, 32, cache=cache)
    assert first.computed == 3 + 2  # three pictures, one caption and the empty one
    second = encode_dataset(base, folder.items, 32, cache=cache)
    assert second.computed == 0
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.text, second.text)
    assert encode_dataset(base, folder.items, 40, cache=cache).computed == 3, "another size is another picture"
    base.pipe.vae.encoder.conv_in.weight.data += 0.1
    assert encode_dataset(base, folder.items, 32, cache=cache).computed == 3, "another VAE gives other latents"
