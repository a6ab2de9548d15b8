"""An adapter at scale 0 is as if it were not there, whatever the composition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.mixing.compose import COMPOSITIONS

PLAIN = [0.0, vl.Scale(0.0)]
PARTS = [vl.Scale(steps=[0.0, 0.0]), vl.Scale(images=[0.0])]
"""No scales for compositions that make one adapter of all."""
LAYERS = [vl.Scale(blocks={"one": 0.0, "two": 0.0})]
SILENT = {"knots": PLAIN, "iso-c": PLAIN}


class Picture(nn.Module):
    """Pictures to pictures, at a timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.rows: list[int] = []

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        self.rows.append(len(sample))
        found: Tensor = self.two(torch.tanh(self.one(sample)))
        return found


def made(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"one": ((2, 3, 3, 3), (4, 2, 1, 1)), "two": ((2, 4, 1, 1), (3, 2, 1, 1))}
    return Adapter({
        f"model.{n}": AdapterModule.lora(*(torch.randn(s, generator=generator) for s in pair), 2.0)
        for n, pair in shapes.items()
    })  # fmt: skip


def drawn(scales: dict[str, Any], compose: str) -> tuple[list[Tensor], list[int]]:
    """The predictions at some steps, and the rows that each took."""
    model = Picture().requires_grad_(False)
    box = {"a": (0, 0, 0.6, 1), "b": (0.4, 0, 1, 1), "c": (0, 0.5, 1, 1)}
    options = {"regions": {n: box[n] for n in scales}} if compose == "regional" else {}
    vl.attach(model, {n: made(ord(n)) for n in scales}, scales=scales, compose=compose, **options)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(x, t) for t in (999.0, 993.0, 987.0, 400.0, 0.0)], model.rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compose", COMPOSITIONS)
@settings(max_examples=15)
@given(data=st.data())
def test_an_adapter_at_scale_zero_changes_nothing(compose: str, data: st.DataObject) -> None:
    silent = st.sampled_from(SILENT.get(compose, PLAIN + PARTS + LAYERS))
    order = data.draw(st.permutations("abc"))
    acting = data.draw(st.sets(st.sampled_from("abc"), min_size=2 if compose == "k-lora" else 1, max_size=2))
    scales = {n: data.draw(st.sampled_from([1.0, 0.5, -0.7])) if n in acting else data.draw(silent) for n in order}
    found, rows = drawn(scales, compose)
    expected, rows_without = drawn({n: scales[n] for n in order if n in acting}, compose)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert rows == rows_without, "no evaluation of what does nothing"


def test_k_lora_of_one_and_a_silent_one_is_the_one_alone() -> None:
    found, _ = drawn({"a": 0.3, "b": 0.0}, "k-lora")
    expected, _ = drawn({"a": 0.3}, "sum")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compose", ["balanced", "orthogonal", "k-lora"])
@settings(max_examples=10)
@given(seed=st.integers(0, 3), late=st.booleans())
def test_a_block_at_zero_is_as_if_the_file_did_not_have_it(compose: str, seed: int, late: bool) -> None:
    one, two = made(seed), made(seed + 10)
    cut = Adapter({n: m for n, m in one.modules.items() if n != "model.one"})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scale, found = vl.Scale(0.8, blocks={"one": 0.0}), []
    for first in (one, cut):
        model = Picture().requires_grad_(False)
        scales = {"a": 0.8 if late or first is cut else scale, "b": 0.5}
        mix = vl.attach(model, {"a": first, "b": two}, scales=scales, compose=compose)
        if late and first is one:
            mix.set_scales({"a": scale})
        with torch.no_grad():
            found.append([model(x, t) for t in (999.0, 993.0, 0.0)])
    for whole, without in zip(*found, strict=True):
        torch.testing.assert_close(whole, without, rtol=1e-4, atol=1e-4)
