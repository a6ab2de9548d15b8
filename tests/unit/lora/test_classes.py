"""Layers that compute otherwise than torch's, and modules of classes made on the fly."""

import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import TargetError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.classes import adapted_class, forward_of_its_own
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import attach, inject
from visionlora.lora.layers import AdaptedConv, HeavyByMatmul


class Standardised(nn.Conv2d):
    """As the convolutions of BiT: the weight is standardised whenever it is used."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_with_a_forward_of_their_own_are_told_apart() -> None:
    torchs = (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2).out_proj)
    assert [forward_of_its_own(module) for module in torchs] == [""] * 4
    assert forward_of_its_own(Standardised(2, 2, 1)) == "is a Standardised, which does not compute as torch's layers do"
    hooked = nn.Linear(2, 2)
    own = hooked.forward
    hooked.forward = lambda x: own(x)  # type: ignore[method-assign]
    assert forward_of_its_own(hooked).startswith("has a forward put on it, as offloading by layers does")


def test_a_layer_made_of_the_class_of_another_is_plain() -> None:
    layer = nn.Conv2d(2, 2, 1)
    layer.__class__ = adapted_class(adapted_class(nn.Conv2d, HeavyByMatmul), AdaptedConv)
    assert type(type(layer)(3, 4, kernel_size=1, bias=False)) is nn.Conv2d
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


def test_a_frozen_neighbour_keeps_its_own_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 4, 3), nn.Flatten(), Doubled(16, 2))
    x = torch.randn(2, 3, 6, 6)
    before = model(x)
    inject(model, AdapterConfig(rank=2, targets="0"))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("target", ["1", "3", "1,3"])
def test_adapters_do_not_go_on_layers_with_a_forward_of_their_own(target: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 4, 3), nn.Flatten(), Doubled(16, 2))
    with pytest.raises(TargetError, match="which does not compute as torch's layers do"):
        inject(model, AdapterConfig(rank=1, targets=target))
    assert type(model[1]) is Standardised


def test_an_offloaded_layer_is_refused_and_left_alone() -> None:
    adapter: Adapter = inject(nn.Sequential(nn.Linear(4, 4)), AdapterConfig(rank=1, targets="0")).adapter()
    model = nn.Sequential(nn.Linear(4, 4))
    own = model[0].forward
    model[0].forward = lambda x: own(x)  # type: ignore[method-assign]
    with pytest.raises(TargetError, match="take it off first, or offload whole models"):
        attach(model, adapter)
    assert type(model[0]) is nn.Linear
    model[0].forward = own  # type: ignore[method-assign]
    handle, x = attach(model, adapter), torch.ones(1, 4)
    handle.methods["0"].lora_B.data.fill_(1.0)
    assert not torch.equal(model(x), own(x)), "what accelerate leaves behind hides nothing"


def test_what_was_mixed_in_twice_is_pickled() -> None:
    layer: Any = nn.Conv2d(2, 2, 1)
    layer.__class__ = adapted_class(nn.Conv2d, HeavyByMatmul)
    model = nn.Sequential(layer)
    handle = inject(model, AdapterConfig(rank=1, targets="0"))
    handle.methods["0"].lora_B.data.fill_(1.0)
    copy = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 2, 3, 3)
    assert isinstance(copy[0], AdaptedConv) and isinstance(copy[0], HeavyByMatmul)
    assert torch.equal(copy(x), model(x))


def test_what_others_have_put_on_the_layers_says_nothing_of_the_base() -> None:
    """The adapter was blamed for another base where layers are offloaded one by one."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made = Adapter({f"model.{k}": AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0) for k in "01"})
    for layer in model:
        layer.forward = partial(type(layer).forward, layer)  # type: ignore[method-assign]
    with pytest.raises(TargetError, match=r"offload whole models\. So it is with 2 of its 2 modules") as caught:
        attach(model, made)
    assert "another base" not in str(caught.value)
