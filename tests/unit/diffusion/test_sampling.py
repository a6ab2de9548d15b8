"""Drawing: what is said where it cannot go on."""

import pytest
import torch

from visionlora.diffusion.sampling import pictures_of
from visionlora.errors import ModelError


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
