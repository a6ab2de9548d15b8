"""A batch in which each picture has its own adapters and scales is the pictures one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter, AdapterModule

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6, 5, 6)),
    "time embedding": (lambda: nn.Linear(6, 8), (6, 6)),
    "conv 3x3": (lambda: nn.Conv2d(4, 8, 3, padding=1), (6, 4, 5, 5)),
    "conv 1x1": (lambda: nn.Conv2d(4, 8, 1), (6, 4, 5, 5)),
    "strided, grouped": (lambda: nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=1), (6, 4, 6, 6)),
    "same padding": (lambda: nn.Conv2d(4, 8, 3, padding="same"), (6, 4, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (6, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (6, 4, 7)),
}


def module(kind: str, weight: torch.Tensor, seed: int) -> AdapterModule:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    o, *rest = weight.shape
    n, ones = weight[0].numel(), (1,) * (len(rest) - 1)
    lora = {"lora_A": random(2 + seed % 2, *rest), "lora_B": random(o, 2 + seed % 2, *ones)}
    return {
        "lora": lambda: AdapterModule("lora", lora, 3.0),
        "dora": lambda: AdapterModule("dora", {**lora, "magnitude": random(o).abs() + 0.5}, 3.0),
        "dora by columns": lambda: AdapterModule(
            "dora", {**lora, "magnitude": random(rest[0]).abs() + 0.5}, 3.0, {"axis": "in"}
        ),
        "loha": lambda: AdapterModule(
            "loha", {f"hada_w{k}_{s}": random(*((o, 2) if s == "a" else (2, n))) for k in (1, 2) for s in "ab"}, 9.0
        ),
        "lokr": lambda: AdapterModule(
            "lokr", {"lokr_w1": random(2, 2), "lokr_w2": random(o // 2, rest[0] // 2, *rest[1:])}, 1.0
        ),
        "vera": lambda: AdapterModule("vera", {"lambda_b": random(o), "lambda_d": random(4)}, 1.0, {"projection_seed": 1}),
        "ia3": lambda: AdapterModule("ia3", {"vector": random(o) + 1}, 1.0, {"on_input": False}),
    }[kind]()  # fmt: skip


KINDS = ("lora", "dora", "dora by columns", "loha", "lokr", "vera", "ia3")
SCALES = st.lists(st.sampled_from([0.0, 1.0, 0.5, -0.7]), min_size=3, max_size=3)


# LoKr and column norms of grouped convolutions have no meaning in any file format.
CASES = [(la, k) for la in LAYERS for k in KINDS if "grouped" not in la or k not in ("lokr", "dora by columns")]


@pytest.mark.parametrize(("layer", "kind"), CASES)
@settings(max_examples=8)
@given(first=SCALES, second=SCALES)
def test_each_picture_as_if_alone(layer: str, kind: str, first: list[float], second: list[float]) -> None:
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make()).requires_grad_(False)
    x = torch.randn(shape)
    handles = [
        vl.attach(model, Adapter({"model.0": module(k, model[0].weight, i)}), name=f"a{i}")
        for i, k in enumerate((kind, "lora"))
    ]
    alone = []
    for row in range(6):
        for handle, scales in zip(handles, (first, second), strict=True):
            handle.set_scale(scales[row % 3])
        with torch.no_grad():
            alone.append(model(x[row : row + 1]))
    for handle, scales in zip(handles, (first, second), strict=True):
        handle.set_scale(1.0)
        for m in handle.methods.values():
            m.sample_scale = torch.tensor(scales)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat(alone), rtol=1e-4, atol=1e-5)


def adapted() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(6, 8)).requires_grad_(False)
    handle = vl.attach(model, Adapter({"model.0": module("lora", model[0].weight, 0)}))
    for m in handle.methods.values():
        m.sample_scale = torch.tensor([0.0, 1.0])
    return model, torch.randn(2, 6)


def test_a_scale_of_zero_is_the_base_bit_for_bit() -> None:
    model, x = adapted()
    with torch.no_grad():
        out = model(x)
        assert torch.equal(out[0], nn.functional.linear(x, model[0].weight, model[0].bias)[0])


def test_what_has_no_path_is_refused() -> None:
    model, x = adapted()
    with pytest.raises(
        ConfigError, match=r"has scales per picture, which do not go with training: run under torch\.no_grad"
    ):
        model(x)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"scales for 2 pictures each, and a Linear got 3 rows"):
        model(torch.randn(3, 6))
    with torch.no_grad(), pytest.raises(ConfigError, match="cut pictures into windows cannot have scales per picture"):
        model(torch.randn(32, 6))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    handle = vl.inject(attention, vl.AdapterConfig(rank=2, targets="attn.q"))
    for m in handle.methods.values():
        m.requires_grad_(False)
        m.sample_scale = torch.ones(2)
    with torch.no_grad(), pytest.raises(ConfigError, match="do not go with packed attention: give it one scale"):
        attention(*(torch.randn(2, 3, 8),) * 3)
