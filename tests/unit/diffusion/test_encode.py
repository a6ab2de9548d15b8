"""Latents and captions: right, cached, and drawn anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionlora.data.augment import variants
from visionlora.data.cache import Share, TensorCache
from visionlora.data.folder import read_image_folder
from visionlora.diffusion import encode
from visionlora.diffusion.encode import (
    Plan,
    cache_bytes,
    cut_captions,
    encode_dataset,
    encode_pictures,
    encode_text,
    latent_keys,
    text_keys,
    unread_letters,
)
from visionlora.errors import ConfigError, ModelError
from visionlora.models.base import open_base

ASSETS = Path(__file__).parents[3] / "assets"
FLIPPED = Plan(32, variants=variants(True, False, 0.0, 1))


def test_latents_are_those_of_the_vae(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base, folder = open_base(str(tiny_model)), read_image_folder(dogs)
    data = encode_dataset(base, folder.items, FLIPPED, TensorCache(tmp_path / "c"))
    assert data.shape(1) == (4, 8, 8) and data.variants(1) == 2
    picture = np.asarray(Image.open(folder.items[1].path))
    for variant, pixels in enumerate((picture, picture[:, ::-1])):
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = base.pipe.vae.encode(x).latent_dist
        torch.testing.assert_close(data.latents[1]["mean"][variant], expected.mean[0].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(data.latents[1]["std"][variant], expected.std[0].detach(), rtol=1e-4, atol=1e-4)
    drawn = data.latent(1, 0)
    torch.testing.assert_close(drawn, data.latents[1]["mean"][0] * base.pipe.vae.config.scaling_factor)
    assert not torch.equal(data.latent(1, 0, torch.ones(4, 8, 8)), drawn)


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sd2", "tiny_xl"])
def test_captions_are_encoded_as_the_pipeline_does(family: str, request: pytest.FixtureRequest) -> None:
    base = open_base(str(request.getfixturevalue(family)))
    rows = encode_text(base, ["a dog", "cat"])
    for caption, row in zip(["a dog", "cat"], rows, strict=True):
        if base.is_xl:
            text, _, pooled, _ = base.pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
            torch.testing.assert_close(row["pooled"], pooled[0], rtol=0, atol=1e-6)
        else:
            text, _ = base.pipe.encode_prompt(caption, "cpu", 1, False)
        torch.testing.assert_close(row["text"], text[0], rtol=0, atol=1e-6)


def test_what_sdxl_is_told_is_what_its_pipeline_tells_it(tiny_xl: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_xl))
    Image.new("RGB", (60, 40)).save(dogs / "wide.png")
    data = encode_dataset(base, read_image_folder(dogs).items, Plan(32, 8), TensorCache(tmp_path / "c"))
    wide = next(i for i, item in enumerate(data.items) if item.path.name == "wide.png")
    told = data.conditioning([wide, 0], [data.caption_of[wide][0], 0], [0, 0])
    assert told.sizes.tolist()[0] == [40, 60, *data.framings[wide].corner, *data.framings[wide].bucket]
    assert told.sizes.tolist()[1] == [32, 32, 0, 0, 32, 32]
    expected = base.pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, text_encoder_projection_dim=24)
    torch.testing.assert_close(told.sizes[1:], expected)
    assert told.text[1].abs().max() == told.pooled[1].abs().max() == 0, "it was trained with zeros for no caption"
    assert told.text[0].abs().max() > 0
    out = base.pipe.unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), **told.arguments(), return_dict=False)[0]
    assert out.shape == (2, 4, 8, 8)


def test_no_caption_is_the_empty_caption_for_other_models(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_model))
    data = encode_dataset(base, read_image_folder(dogs).items, 32, TensorCache(tmp_path / "c"))
    torch.testing.assert_close(data.conditioning([0], [0], [0]).text[0], encode_text(base, [""])[0]["text"])


def test_captions_that_are_too_long_are_named_with_what_is_lost(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    long = "a b c d e f g h i j k l m n o p"
    assert cut_captions(base, ["a b", long, long]) == [(long, "o p")]


def test_letters_that_a_small_tokenizer_has_not_are_found() -> None:
    base = open_base("emoji-64")
    assert unread_letters(base, ["a dog, (sitting)", "sks dog", "DOG"]) == []
    assert unread_letters(base, ["dog 15", "dog 51", "\u72d7 dog"]) == ["1", "5", "\u72d7"]


def test_a_second_start_computes_nothing_and_another_model_everything(
    tiny_model: Path, dogs: Path, tmp_path: Path
) -> None:
    base, folder, cache = open_base(str(tiny_model)), read_image_folder(dogs), TensorCache(tmp_path / "c")
    first = encode_dataset(base, folder.items, 32, cache)
    assert first.computed == 3 + 2  # three pictures, one caption and the empty one
    second = encode_dataset(base, folder.items, 32, cache)
    assert second.computed == 0
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(first.latents, second.latents, strict=True))
    assert torch.equal(first.texts[1]["text"], second.texts[1]["text"])
    assert encode_dataset(base, folder.items, 40, cache).computed == 3, "another size is another picture"
    base.pipe.vae.encoder.conv_in.weight.data += 0.1
    assert encode_dataset(base, folder.items, 32, cache).computed == 3, "another VAE gives other latents"


def test_the_key_of_a_text_tells_all_that_its_embedding_follows_from(tiny_model: Path, tiny_xl: Path) -> None:
    base = open_base(str(tiny_xl))
    exact = text_keys(base, ["a dog", "a cat"])
    base.pipe.text_encoder_2.to(torch.float16)
    assert not set(text_keys(base, ["a dog"])) & set(exact), "half precision"
    base = open_base(str(tiny_model))
    tokenizer, encoder = base.pipe.tokenizer, base.pipe.text_encoder
    (plain,), (other,) = text_keys(base, ["a dog"]), text_keys(base, ["a cat"])
    (row,) = tokenizer("dog", add_special_tokens=False).input_ids[:1]
    encoder.get_input_embeddings().weight.data[row] += 1
    assert text_keys(base, ["a dog", "a cat"])[0] != plain and text_keys(base, ["a cat"]) == [other], "a word"
    encoder.get_input_embeddings().weight.data[row] -= 1
    layer = encoder.get_submodule(next(n for n, _ in encoder.named_modules() if n.endswith("fc1")))
    layer.weight.data[1, 2] += 1
    assert text_keys(base, ["a cat"]) != [other], "weights tuned in one place, or damaged there"
    layer.weight.data[1, 2] -= 1
    encoder.config.hidden_act = "gelu_new"
    assert text_keys(base, ["a cat"]) != [other], "the activation, which no weight tells"
    encoder.config.hidden_act = "quick_gelu"
    before = text_keys(base, ["a cat"])
    tokenizer.pad_token = "a</w>"
    assert text_keys(base, ["a cat"]) != before, "Stable Diffusion 2 pads with another token than 1"


def test_the_key_of_latents_tells_what_the_vae_computes_in(tiny_model: Path, dogs: Path) -> None:
    base, items = open_base(str(tiny_model)), read_image_folder(dogs).items
    plan = Plan(32)

    def keys() -> set[str]:
        return set(latent_keys(base, items, [plan.framing(i) for i in items], plan.variants, False))

    exact = keys()
    base.pipe.vae.decoder.conv_in.weight.data += 1
    assert keys() == exact, "what decodes encodes nothing"
    weight = base.pipe.vae.encoder.conv_out.weight.data
    before = weight.clone()
    weight[1, 2, 0, 1] += 1e-3
    assert not exact & keys(), "weights tuned in one place, or damaged there"
    weight.copy_(before)
    assert keys() == exact
    base.pipe.vae.to(torch.float16)
    half = keys()
    base.pipe.vae.to(torch.float32).register_to_config(norm_num_groups=2)
    assert not exact & half and not exact & keys()


def test_processes_share_the_work(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    base, folder, cache = open_base(str(tiny_model)), read_image_folder(dogs), TensorCache(tmp_path / "c")
    waited = []
    one = encode_dataset(base, folder.items, 32, cache, share=Share(0, 2, lambda: waited.append(1)))
    assert one.computed == 2 + 1 and len(waited) == 2
    other = encode_dataset(base, folder.items, 32, cache, share=Share(1, 2, lambda: None))
    assert other.computed == 1 + 1
    alone = encode_dataset(base, folder.items, 32, TensorCache(tmp_path / "d"))
    for i in range(3):
        torch.testing.assert_close(one.latent(i, 0), alone.latent(i, 0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.texts[1]["text"], alone.texts[1]["text"], rtol=1e-5, atol=1e-6)


def test_memory_is_bounded(tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder, cache = open_base(str(tiny_model)), read_image_folder(dogs), TensorCache(tmp_path / "c")
    monkeypatch.setattr("visionlora.data.cache.IN_MEMORY", 1)
    sizes = []
    real = encode.encode_pictures
    monkeypatch.setattr(encode, "encode_pictures", lambda base, x, bf16: sizes.append(len(x)) or real(base, x))
    monkeypatch.setattr(encode, "PICTURES_AT_ONCE", 2)
    small = encode_dataset(base, folder.items, 32, cache)
    assert sizes == [2, 1]
    assert len(small.latents.kept) == 1, "the others stay on disk"
    alone = encode_dataset(base, folder.items, 32, TensorCache(tmp_path / "d"))
    assert all(torch.equal(small.latent(i, 0), alone.latent(i, 0)) for i in range(3))
    for file in (tmp_path / "c").iterdir():
        file.unlink()
    torch.testing.assert_close(small.latent(2, 0), alone.latent(2, 0), rtol=1e-5, atol=1e-6)  # computed again


def test_many_variants_of_a_picture_do_not_go_through_the_vae_at_once(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, items, sizes = open_base(str(tiny_model)), read_image_folder(dogs).items, []
    plan = Plan(32, variants=variants(True, True, 0.1, 5))
    whole = encode_dataset(base, items, plan, TensorCache(tmp_path / "c"))
    real = encode.encode_pictures
    monkeypatch.setattr(encode, "encode_pictures", lambda base, x, bf16: sizes.append(len(x)) or real(base, x))
    monkeypatch.setitem(encode.PIXELS_AT_ONCE, "cpu", 4 * 32 * 32)
    parts = encode_dataset(base, items, plan, TensorCache(tmp_path / "d"))
    assert sizes == [4, 4, 2] * 3
    for i in range(3):
        torch.testing.assert_close(dict(parts.latents[i]), dict(whole.latents[i]), rtol=1e-4, atol=1e-5)
    for file in (tmp_path / "d").iterdir():
        file.unlink()
    parts.latents.kept.clear()
    assert parts.variants(0) == 10 and sizes[9:] == [4, 4, 2], "one that is gone is made again in the same parts"


def test_variants_that_are_one_picture_are_encoded_once(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, items, sizes = open_base(str(tiny_model)), read_image_folder(dogs).items[:1], []
    real = encode.encode_pictures
    monkeypatch.setattr(encode, "encode_pictures", lambda base, x, bf16: sizes.append(len(x)) or real(base, x))
    data = encode_dataset(base, items, Plan(32, variants=variants(True, True, 0.0, 8)), TensorCache(tmp_path / "c"))
    assert sizes == [2], "it has the size of its bucket, so all cuts are the same but for their mirror images"
    plain = encode_dataset(base, items, FLIPPED, TensorCache(tmp_path / "c"))
    assert data.variants(0) == 16
    for i in range(16):
        assert torch.equal(data.latent(0, i), plain.latent(0, i % 2))


@pytest.mark.parametrize("family", ["tiny_model", "tiny_xl"])
def test_a_disk_without_room_is_told_of_before_anything_is_encoded(
    family: str, request: pytest.FixtureRequest, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, items = open_base(str(request.getfixturevalue(family))), read_image_folder(dogs).items
    cache, captions = TensorCache(tmp_path / "c"), [("a", "b"), ("b",), ("c",)]
    data = encode_dataset(base, items, FLIPPED, TensorCache(tmp_path / "d"), captions=captions)
    sizes = cache_bytes(base, data.framings, 2, len(data.captions))
    assert sizes[0] == sum(entry[name].nbytes for entry in data.latents for name in ("mean", "std"))
    assert sizes[1] == sum(tensor.nbytes for entry in data.texts for tensor in entry.values())
    monkeypatch.setattr("visionlora.data.cache.IN_MEMORY", 10)
    monkeypatch.setattr(TensorCache, "free", sum(sizes) - 1)
    with pytest.raises(
        ConfigError, match=r"The cache needs 0\.00 GiB more .* Lower caption_variants or picture_variants, .*VISIO"
    ):
        encode_dataset(base, items, FLIPPED, cache, captions=captions)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(TensorCache, "free", sum(sizes))
    encode_dataset(base, items, FLIPPED, cache, captions=captions)
    monkeypatch.setattr(TensorCache, "free", 0)
    assert encode_dataset(base, items, FLIPPED, cache, captions=captions).computed == 0, "all of it is there"


def test_a_vae_that_fails_in_half_precision_works_in_fp32(tiny_model: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    base = open_base(str(tiny_model))
    expected = encode_pictures(base, pictures)
    vae = base.pipe.vae.to(torch.float16)
    vae.encoder.conv_in.register_forward_hook(
        lambda _m, _i, out: torch.full_like(out, torch.inf) if out.dtype == torch.float16 else out
    )
    for one, two in zip(encode_pictures(base, pictures), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)
    assert vae.dtype == torch.float32


def test_a_vae_that_fails_in_fp32_is_damaged(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    base.pipe.vae.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(
        ModelError, match=r"hold NaN or infinite values: 1 tensor of vae \(first 'encoder\.conv_in\.weight'\)"
    ):
        encode_pictures(base, np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("windows", [1, 2])
def test_a_damaged_text_encoder_is_named(tiny_model: Path, windows: int) -> None:
    base = replace(open_base(str(tiny_model)), windows=windows)
    base.pipe.text_encoder.get_parameter(
        next(n for n, _ in base.pipe.text_encoder.named_parameters() if "fc1" in n)
    ).data[0] = torch.inf
    with pytest.raises(
        ModelError, match=r"hold NaN or infinite values: 1 tensor of text_encoder \(first '.*mlp\.fc1\.weight'\)"
    ):
        encode_text(base, ["a dog"])


def test_a_vae_that_fails_with_sound_weights_is_said_so_too(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    base.pipe.vae.encoder.conv_in.register_forward_hook(lambda _m, _i, out: torch.full_like(out, torch.nan))
    with pytest.raises(ModelError, match="gives NaN or infinite latents: its weights are damaged"):
        encode_pictures(base, np.zeros((1, 32, 32, 3), np.uint8))


def test_latents_of_a_run_in_bf16(tmp_path: Path) -> None:
    """They are near fp32's, far nearer than the VAE's own spread, and the cache does not mix them up."""
    base, cache = open_base("emoji-64"), TensorCache(tmp_path / "c")
    items = read_image_folder(ASSETS / "dog").items
    exact, rounded = (encode_dataset(base, items, 64, cache, in_bf16=bf16) for bf16 in (False, True))
    assert exact.computed == len(items) + len(exact.captions) and rounded.computed == len(items)
    means, near, spread = (
        torch.stack([data.latents[i][what] for i in range(len(items))])
        for data, what in ((exact, "mean"), (rounded, "mean"), (exact, "std"))
    )
    error = (near - means).square().mean().sqrt()
    assert near.dtype == torch.float32 and 0 < error < 0.01 * means.std() and error < 0.2 * spread.mean()
    assert encode_dataset(base, items, 64, cache).computed == 0


def test_a_vae_that_fails_in_bf16_works_in_fp32(tiny_model: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    base = open_base(str(tiny_model))
    expected = encode_pictures(base, pictures)
    base.pipe.vae.encoder.conv_in.register_forward_hook(
        lambda _m, _i, out: torch.full_like(out, torch.nan) if out.dtype == torch.bfloat16 else out
    )
    for one, two in zip(encode_pictures(base, pictures, in_bf16=True), expected, strict=True):
        assert torch.equal(one, two)
