"""Preprocessing against the image processors of transformers, on pictures that need no resizing."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from visionlora.errors import ModelError
from visionlora.models.processors import as_preprocessing

PROCESSORS = [
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_rescale": False, "do_normalize": False}),
    ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
    ("BeitImageProcessor", {"size": {"height": 40, "width": 40}}),  # a crop size that it does not use
    ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
    ("BitImageProcessor", {"size": {"shortest_edge": 235}, "crop_size": {"height": 224, "width": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("PoolFormerImageProcessor", {}),
    ("LevitImageProcessor", {}),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}, "do_flip_channel_order": False}),
]


@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_pictures_come_out_as_the_processors(name: str, settings: dict) -> None:
    processor = getattr(transformers, name)(**settings)
    ours = as_preprocessing("a model", processor.to_dict(), 518)
    noise = np.random.default_rng(0).integers(0, 256, (ours.stored_size, ours.stored_size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    found = ours.batch(ours.stored(picture)[None])
    assert found.shape == theirs.shape
    assert torch.allclose(found, theirs.float(), atol=1e-4)
    wide = Image.fromarray(np.repeat(noise, 2, axis=1))
    assert processor(wide, return_tensors="pt")["pixel_values"].shape == found.shape


def test_what_no_processor_says() -> None:
    without = as_preprocessing("a model", {}, [48, 48])
    assert (without.size, without.mean, without.std, without.crop_pct) == (48, (0.5,) * 3, (0.5,) * 3, 1.0)
    assert as_preprocessing("a model", {}, None).size == 224


def test_channels_the_other_way_round_are_refused() -> None:
    with pytest.raises(ModelError, match=r"reads pictures as BGR .*mobilevit_s"):
        as_preprocessing("a model", transformers.MobileViTImageProcessor().to_dict(), 256)
