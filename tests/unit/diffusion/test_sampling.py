"""Drawing: what is said where it cannot go on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visionlora.config import TrainSDConfig
from visionlora.diffusion.sampling import SamplingConfig, draw, pictures_of, sampling_of
from visionlora.errors import ModelError
from visionlora.models.base import open_base


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float16, "in fp16. Use --precision bf16 or fp32, or a lower scale"),
        (torch.bfloat16, "in bf16. Use --precision fp32, or a lower scale"),
        (torch.float32, "in fp32. Use a lower scale of the adapters"),
    ],
)
def test_only_a_wider_precision_is_advised(dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ModelError) as told:
        pictures_of(None, torch.full((1, 4, 2, 2), float("nan"), dtype=dtype))
    assert said in str(told.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_that_holds_nan_is_named(tiny_model: Path, part: str) -> None:
    """Advice on scales and precisions would be in vain."""
    base = open_base(str(tiny_model))
    getattr(base.pipe, part).get_parameter({"unet": "conv_in.bias", "vae": "decoder.conv_in.bias"}[part]).data[0] = (
        torch.nan
    )
    with pytest.raises(
        ModelError, match=rf"The weights of the base hold NaN .*: 1 tensor of {part} \(first '.*conv_in\.bias'\)"
    ):
        draw(base, ["a dog"], 32, SamplingConfig(steps=1))


@pytest.mark.filterwarnings("ignore")
def test_half_as_many_are_drawn_where_memory_is_short(tiny_model: Path) -> None:
    """A run would end where it draws its samples. They are decoded one by one, which takes the most of it."""
    base, prompts, seen = open_base(str(tiny_model)), ["a dog", "a cat", "a cow"], []
    config = SamplingConfig(steps=2, guidance_scale=1.0)
    usual = draw(base, prompts, 32, config)

    def short_of_memory(unet: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError

    decode, decoded = base.pipe.vae.decode, []
    base.pipe.vae.decode = lambda x, **more: decoded.append(len(x)) or decode(x, **more)
    base.pipe.unet.register_forward_pre_hook(short_of_memory)
    done: list[int] = []
    found = draw(base, prompts, 32, config, done.append)
    assert (seen, decoded, done) == ([3, 1, 1, 1, 1, 1, 1], [1, 1, 1], [1, 1, 1])
    for one, other in zip(found, usual, strict=True):
        np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=1)


def test_samples_are_drawn_in_the_memory_that_a_batch_takes() -> None:
    config = TrainSDConfig(images="dog", sample_steps=7, guidance_scale=3.0, seed=2)
    assert sampling_of(config, 1) == SamplingConfig(7, 3.0, 2, batch_size=2)
    assert sampling_of(config, 100).batch_size == SamplingConfig().batch_size
