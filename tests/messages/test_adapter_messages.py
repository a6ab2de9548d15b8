"""Every refusal of the LoRA core, word for word, with the model left untouched."""

import pytest
import torch
from torch import nn

import visionlora as vl

CONFIGS = {
    "method": ({"method": "lroa"}, "- method is 'lroa'. Did you mean 'lora'?"),
    "rank": ({"rank": 0}, "- rank is 0; it must be a whole number of at least 1."),
    "alpha": ({"alpha": -2.0}, "- alpha is -2.0; it must be a positive number (equal to the rank for scaling 1)."),
    "dropout": ({"dropout": 1.0}, "- dropout is 1.0; it must be at least 0 and below 1."),
    "init": ({"init": "pisa"}, "- init is 'pisa'. Did you mean 'pissa'?"),
    "pissa": (
        {"method": "dora", "init": "pissa"},
        "- init 'pissa' starts both factors of a LoRA; method 'dora' cannot use it.",
    ),
    "targets": ({"targets": " "}, "- targets is empty; `attn` is a good start."),
    "probe": (
        {"method": "linear-probe"},
        "- method 'linear-probe' trains nothing but `train`: name the head, train='head'.",
    ),
    "rank pattern": (
        {"rank_pattern": {"to_q": 0}},
        "- rank_pattern['to_q'] is 0; it must be a whole number of at least 1.",
    ),
    "alpha pattern": (
        {"alpha_pattern": {"to_q": float("nan")}},
        "- alpha_pattern['to_q'] is nan; it must be a positive number.",
    ),
    "ratio": ({"lr_ratio": 0.0}, "- lr_ratio is 0.0; it must be a positive number."),
    "basis": ({"basis_index": -1}, "- basis_index is -1; it must be 0 or more."),
    "factor": ({"initial_rank_factor": 0.5}, "- initial_rank_factor is 0.5; it must be at least 1."),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str) -> None:
    options, line = CONFIGS[name]
    with pytest.raises(vl.VisionLoRAError) as caught:
        vl.AdapterConfig(**options)
    assert str(caught.value) == f"This adapter cannot be built:\n{line}"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(6, 8), "conv1": nn.Conv2d(4, 6, 3), "head": nn.Linear(8, 2)})


INJECTIONS = {
    "rank": (
        {"targets": "body", "rank": 7},
        "Rank 7 is larger than layer 'body' (6 at its smaller side): choose a rank of at most 6 or leave this layer out "
        "of the targets.",
    ),
    "part of a conv": (
        {"targets": "conv1.q", "rank": 2},
        "Target 'conv1.q' asks for the part 'q' of 'conv1', which is a Conv2d without parts: name the layer itself, "
        "'conv1', or use a role such as `attn.q`.",
    ),
    "train": (
        {"targets": "body", "rank": 2, "train": "haed"},
        "train names 'haed', which is no module of ModuleDict. Did you mean 'head'?",
    ),
    "exclude": (
        {"targets": "body", "rank": 2, "exclude": "bdy"},
        "Exclusion 'bdy' reaches no layer of ModuleDict. Did you mean 'body'?",
    ),
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_injections(name: str) -> None:
    options, message = INJECTIONS[name]
    m = model()
    with pytest.raises(vl.VisionLoRAError) as caught:
        vl.inject(m, vl.AdapterConfig(**options))
    assert str(caught.value) == message
    assert [type(x).__name__ for x in m.values()] == ["Linear", "Conv2d", "Linear"]
    assert all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("name", ["", "a.b", "a:b", "keys"])
def test_names_that_cannot_be_names(name: str) -> None:
    with pytest.raises(vl.VisionLoRAError, match="cannot name an adapter: use a word without dots and colons"):
        vl.inject(model(), vl.AdapterConfig(rank=2, targets="body"), name=name)


def test_an_adapter_of_two_parts_needs_a_word() -> None:
    from visionlora.lora.adapter import Adapter, AdapterModule

    part = AdapterModule.lora(torch.randn(2, 6), torch.randn(8, 2), 2.0)
    both = Adapter({"unet.body": part, "text_encoder.body": part})
    with pytest.raises(vl.VisionLoRAError, match="The adapter has parts for text_encoder, unet: say which to attach"):
        vl.attach(model(), both)


def test_weights_that_the_kind_needs() -> None:
    m = model()
    handle = vl.inject(m, vl.AdapterConfig(method="dora", rank=2, targets="body"))
    with pytest.raises(vl.VisionLoRAError, match="ΔW of a dora module depends on the base weight: call delta_weights"):
        handle.adapter().delta_weights()
    assert handle.adapter().delta_weights(m)["model.body"].shape == (8, 6)
