"""Whatever has been added, exchanged, rescaled and removed: a mix is the same, bit for bit, as one attached at once."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule

SCALES = [
    0.0, 0.5, -0.7, vl.Scale(0.4, blocks={"one": 0.5, "two": 0.0}), vl.Scale(1.0, steps=vl.Window(0, 0.5)),
    vl.Scale(0.6, images=[1.0, 0.0]),
]  # fmt: skip
COMPOSITIONS = ("sum", "sum", "balanced", "orthogonal", "switch", "composite", "iso-c")
NAMES = ("a", "a.b", "a_b", "keys", "c")
"""Some of which layers cannot use as they are."""


class Picture(nn.Module):
    """Pictures to pictures, at a timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        found: Tensor = self.two(torch.tanh(self.norm(self.one(sample))))
        return found


def made(seed: int) -> Adapter:
    """Of kinds that add, that multiply, that are on one layer alone, and that change a parameter in its place."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    one = {"lora_A": random(2, 3, 3, 3), "lora_B": random(4, 2, 1, 1)}
    two = AdapterModule.lora(random(2, 4, 1, 1), random(3, 2, 1, 1), 2.0)
    return [
        Adapter({"model.one": AdapterModule("lora", one, 1.0), "model.two": two}),
        Adapter({"model.one": AdapterModule("dora", {**one, "magnitude": random(4).abs()}, 1.0)}),
        Adapter({"model.two": two}),
        Adapter({"model.two": two, "model.norm.weight": AdapterModule("full", {"value": random(4)}, 1.0)}),
    ][seed % 4]


ADAPTERS = [made(seed) for seed in range(8)]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predictions(model: nn.Module) -> list[Tensor] | str:
    """At some steps of one drawing; the error of what shows only there."""
    try:
        return [model(X, t) for t in (999.0, 993.0, 400.0, 0.0)]
    except vl.VisionLoRAError as e:
        return str(e)


def check_same(found: list[Tensor] | str, expected: list[Tensor] | str) -> None:
    """Bit for bit."""
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
    else:
        assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["auto", "stacked"])
@settings(max_examples=40)
@given(data=st.data())
def test_changes_end_where_attaching_at_once_does(mode: str, data: st.DataObject) -> None:
    model = Picture().requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    mix, there, compose = vl.attach(model, {}, mode=mode), dict[str, tuple[Adapter, Any]](), "sum"
    for _ in range(data.draw(st.integers(1, 6))):
        wanted, wanted_compose = dict(there), compose
        adapter = ADAPTERS[data.draw(st.integers(0, 7), "adapter")]
        scale = data.draw(st.sampled_from(SCALES), "scale")
        act = data.draw(st.sampled_from(["add", "add", "replace", "remove", "scale", "compose"] if there else ["add"]))
        name = data.draw(st.sampled_from([*there] if act != "add" else [n for n in NAMES if n not in there] or ["a"]))
        if act == "remove":
            del wanted[name]
        elif act == "compose":
            wanted_compose = data.draw(st.sampled_from(COMPOSITIONS))
        else:
            wanted[name] = (there[name][0] if act == "scale" else adapter), scale
        change: tuple[Any, ...] = {
            "add": (mix.add, name, adapter, scale), "replace": (mix.replace, name, adapter, scale),
            "remove": (mix.remove, name), "scale": (mix.set_scales, {name: scale}),
            "compose": (mix.set_composition, wanted_compose),
        }[act]  # fmt: skip
        if act == "add" and name in there:
            continue
        other = Picture().requires_grad_(False)
        try:
            vl.attach(
                other, {n: a for n, (a, _) in wanted.items()}, scales={n: s for n, (_, s) in wanted.items()},
                mode=mode, compose=wanted_compose,
            )  # fmt: skip
        except vl.VisionLoRAError as e:
            was = predictions(model)
            with pytest.raises(type(e)):
                change[0](*change[1:])
            check_same(predictions(model), was)
            continue
        change[0](*change[1:])
        there, compose = wanted, wanted_compose
        assert mix.names == [*there]
        check_same(predictions(model), predictions(other))
    mix.detach()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
