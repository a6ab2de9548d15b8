"""What adapters share, against dense linear algebra and cases with a known answer."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import visionlora as vl
from visionlora.cli.main import app
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.overlap import overlap
from visionlora.mixing.compose import composition


def adapter(seed: int, rank: int = 3, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet.down_blocks.0.a": (8, 6), "unet.mid_block.b": (7, 4, 3, 3)}
    return Adapter({
        name: AdapterModule.lora(
            torch.randn(rank, *rest, generator=generator), torch.randn(o, rank, *(1,) * (len(rest) - 1), generator=generator),
            2.0 * scale,
        )
        for name, (o, *rest) in shapes.items()
    })  # fmt: skip


@given(st.integers(0, 50), st.integers(51, 99))
def test_against_dense_matrices(first: int, second: int) -> None:
    a, b = adapter(first), adapter(second, rank=2)
    (pair,) = overlap({"a": a, "b": b})
    for layer in pair.layers:
        one, two = (x.delta_weights()[layer.name].double().flatten(1) for x in (a, b))
        assert layer.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), abs=1e-5)
        u1, u2 = (torch.linalg.svd(m, full_matrices=False)[0][:, :r] for m, r in ((one, 3), (two, 2)))
        assert layer.outputs == pytest.approx(float((u1.t() @ u2).square().sum() / 2), abs=1e-4)
        shared = float(
            (u1.t() @ two).square().sum() / two.square().sum() + (u2.t() @ one).square().sum() / one.square().sum()
        )
        assert layer.shared == pytest.approx(shared / 2, abs=1e-4)
        assert 0 <= layer.outputs <= 1 and 0 <= layer.inputs <= 1


def test_an_adapter_with_itself_and_with_its_opposite() -> None:
    a = adapter(0)
    opposite = Adapter({n: AdapterModule.lora(*m.lora_factors(), -m.alpha) for n, m in a.modules.items()})
    same, against, _ = overlap({"a": a, "b": a, "c": opposite})
    assert (same.interference, same.mean("cosine"), same.mean("shared")) == pytest.approx((1, 1, 1))
    assert (against.mean("cosine"), against.interference) == pytest.approx((-1, 1))
    assert same.advice.startswith("they write to the same directions, and in a plain sum one may drown the other: ")


def test_what_was_made_orthogonal_does_not_meet() -> None:
    prepared = composition("orthogonal").prepare({"a": adapter(0), "b": adapter(1)}, {"a": 1.0, "b": 1.0})
    (pair,) = overlap(prepared)
    assert (pair.mean("outputs"), pair.mean("shared"), pair.interference) == pytest.approx((0, 0, 0), abs=1e-5)
    assert pair.advice == "they hardly meet: a plain sum will do"


def test_a_much_stronger_one_is_named() -> None:
    (pair,) = overlap({"quiet": adapter(0), "loud": adapter(1, scale=5.0)})
    assert (
        pair.advice.startswith("loud is ")
        and "times as strong as quiet: compose=balanced, or loud at 0.1" in pair.advice
    )


def test_the_advice_on_the_styles_that_come_along_is_what_was_measured_best() -> None:
    root = Path(__file__).parents[3]
    quality = json.loads((root / "benchmarks" / "results" / "mixing.json").read_text())["quality"]
    styles = ("fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
    pairs = overlap({name: vl.load_adapter(root / "assets" / "adapters" / name) for name in styles})
    seen: Counter[str] = Counter()
    for pair in pairs:
        seen.update({n: found["least_seen"] for n, found in quality[f"{pair.first} + {pair.second}"].items()})
    best = {name for name, _ in seen.most_common(3)}
    for pair in pairs:
        assert {name for name in seen if re.search(rf"\b{name}\b", pair.advice.partition(": ")[2])} == best
    assert len(pairs) == 3


def test_of_a_mix_at_its_scales() -> None:
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(6, 8)})
    made = [Adapter({"model.body": adapter(k).modules["unet.down_blocks.0.a"]}) for k in range(2)]
    mix = vl.attach(model, dict(zip("ab", made, strict=True)), scales={"a": 2.0, "b": -1.0})
    (plain,), (found,) = overlap(dict(zip("ab", made, strict=True))), mix.overlap()
    assert found.first_norm == pytest.approx(2 * plain.first_norm) and found.mean("cosine") == pytest.approx(
        -plain.mean("cosine")
    )


def test_the_command(tmp_path: Path) -> None:
    for seed, name in enumerate(("dog", "ink", "sea")):
        vl.save_adapter(adapter(seed), tmp_path / f"{name}.safetensors")
    words = [
        "overlap",
        *(str(tmp_path / f"{n}.safetensors") for n in ("dog", "ink", "sea")),
        "--picture",
        str(tmp_path / "o.png"),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "dog + ink" in result.output and "ink + sea: " in result.output
    assert (tmp_path / "o.png").stat().st_size > 5000


def test_refusals() -> None:
    with pytest.raises(vl.VisionLoRAError, match="Overlap is between adapters: give at least two"):
        overlap({"a": adapter(0)})
    other = Adapter({"unet.down_blocks.0.a": AdapterModule.lora(torch.ones(1, 5), torch.ones(8, 1), 1.0)})
    with pytest.raises(vl.VisionLoRAError, match="of different sizes: they were made for different base models"):
        overlap({"a": adapter(0), "b": other})


@pytest.mark.parametrize("meet", [False, True])
def test_a_difference_as_wide_as_its_layer_has_the_directions_of_its_energy(meet: bool) -> None:
    def difference(row: int, column: int) -> Adapter:
        delta = torch.full((6, 6), 1e-9)
        delta[row, column] = 1.0
        return Adapter({"unet.a": AdapterModule("diff", {"diff": delta}, 1.0)})

    (pair,) = overlap({"a": difference(0, 1), "b": difference(0 if meet else 2, 3)})
    assert pair.mean("outputs") == pytest.approx(float(meet), abs=1e-6)
    assert pair.mean("shared") == pytest.approx(float(meet), abs=1e-6)
    assert pair.mean("inputs") == pytest.approx(0, abs=1e-6)
    assert ("they write to the same directions" in pair.advice) == meet
