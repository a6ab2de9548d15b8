"""Drawing: what is said where it cannot go on."""

from pathlib import Path

import pytest
import torch

from visionlora.diffusion.sampling import SamplingConfig, draw, pictures_of
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
