"""NaN in the base itself: it is told from what adapters and training do, and named."""

import copy

import pytest
import torch
from torch import nn

from visionlora.errors import ModelError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.damage import broken_tensors, damaged, is_finite
from visionlora.lora.inject import attach, inject


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def spoil(tensor: torch.Tensor, value: float = float("nan")) -> None:
    tensor.data.view(-1)[-1] = value


def test_part_and_tensors_are_named() -> None:
    m = model()
    assert damaged("The weights of x", {"unet": m, "vae": None}) is None
    spoil(m[0].weight)
    spoil(m[1].running_var, float("inf"))
    error = damaged("The weights of x", {"vae": model(), "unet": m})
    assert str(error).startswith(
        "The weights of x hold NaN or infinite values: 2 tensors of unet (first '0.weight', '1.running_var'). No setting"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_values_are_finite(dtype: torch.dtype) -> None:
    """Their sum is not."""
    large = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(large) and is_finite(torch.tensor([300]))
    spoil(large)
    assert not is_finite(large)


def test_adapters_and_what_trains_are_not_the_base() -> None:
    m = model()
    handle = inject(m, AdapterConfig(rank=2, targets="0", train="2"))
    spoil(handle.methods["0"].lora_A)
    spoil(m[2].weight)
    assert broken_tensors(m) == []
    handle.eject()
    spoil(m[2].bias)
    assert broken_tensors(m) == ["2.bias"] and broken_tensors(m, [m[2].bias]) == []


def test_the_original_of_what_trains_is() -> None:
    m = model()
    spoil(m[2].weight)
    handle = inject(m, AdapterConfig(method="full"))
    m[2].weight.data.zero_()
    assert broken_tensors(m, handle.parameters()) == ["2.weight"]


def test_merging_into_it_says_so() -> None:
    m = model()
    spoil(m[0].weight)
    before = copy.deepcopy(m[0].weight.data)
    handle = attach(m, Adapter({"net.0": AdapterModule.lora(torch.randn(2, 6), torch.randn(8, 2), 2.0)}), "net")
    with pytest.raises(
        ModelError, match="The base itself holds NaN or infinite values in '0', so nothing can be merged"
    ):
        handle.merge()
    assert torch.equal(m[0].weight.data.nan_to_num(), before.nan_to_num())
