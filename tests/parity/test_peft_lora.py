"""The same factors in PEFT and here: the same output and gradients in fp64."""

import warnings

import pytest
import torch
from torch import nn

from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CASES = {
    "linear": (lambda: nn.Linear(6, 8), (3, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (3, 6, 9, 9)),
    "1x1 conv": (lambda: nn.Conv2d(6, 8, 1), (3, 6, 4, 4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("alpha", [2, 4, 7])
def test_output_and_gradients_equal_peft(kind: str, alpha: int) -> None:
    make, shape = CASES[kind]
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(make()).double(), nn.Sequential(make()).double()
    theirs.load_state_dict(ours.state_dict())
    handle = inject(ours, AdapterConfig(rank=4, alpha=float(alpha), targets="0"))
    lora = handle.methods["0"].double()
    lora.lora_B.data.normal_()
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"])).double()
    layer = wrapped.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(lora.lora_A.data)
    layer.lora_B["default"].weight.data.copy_(lora.lora_B.data)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for model, down, up in (
        (ours, lora.lora_A, lora.lora_B),
        (wrapped, layer.lora_A["default"].weight, layer.lora_B["default"].weight),
    ):
        given = x.clone().requires_grad_()
        out = model(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad, down.grad, up.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
