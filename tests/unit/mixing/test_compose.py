"""Ways to compose styles, against their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import merge_adapters
from visionlora.lora.combine import Options
from visionlora.mixing.compose import COMPOSITIONS, composition
from visionlora.mixing.compose.balanced import scaled
from visionlora.mixing.compose.base import Composition
from visionlora.models.base import open_base

from .test_mix import Steps, adapter, run

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = ("lora",)


@pytest.fixture
def pipe(tiny_model: Path):
    return open_base(str(tiny_model)).pipe


@pytest.fixture
def three(pipe) -> dict[str, Adapter]:
    return {n: adapter(pipe, k, LORA, text=False) for k, n in enumerate("abc")}


def alone(pipe, adapters: dict[str, Adapter], scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """The prediction with each adapter by itself."""
    found = {}
    for name, one in adapters.items():
        mix = vl.attach(pipe, {name: one}, scales={name: scales[name]})
        found[name] = run(pipe)
        mix.detach()
    return found


def test_composite_is_the_mean_of_what_each_gives_alone(pipe, three) -> None:
    scales = {"a": 1.0, "b": 0.5, "c": -0.8}
    each = alone(pipe, three, scales)
    mix = vl.attach(pipe, three, scales=scales, compose="composite")
    assert mix.running == "batched"
    expected = torch.stack(list(each.values())).mean(0)
    for pictures in (2, 2):
        torch.testing.assert_close(run(pipe, pictures), expected, rtol=1e-3, atol=2e-4)
    assert run(pipe, 3).shape[0] == 6, "another batch size is as good"
    picture = pipe("dog", num_inference_steps=3, height=32, width=32, output_type="np").images
    assert picture.shape == (1, 32, 32, 3)


def test_composite_with_scales_per_picture(pipe, three) -> None:
    two = {n: three[n] for n in "ab"}
    mix = vl.attach(pipe, two, scales={"a": vl.Scale(images=[1.0, 0.0]), "b": 1.0}, compose="composite")
    found = run(pipe)
    mix.detach()
    a, b = alone(pipe, two, {"a": 1.0, "b": 1.0}).values()
    plain = run(pipe)
    torch.testing.assert_close(found[[0, 2]], ((a + b) / 2)[[0, 2]], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found[[1, 3]], ((plain + b) / 2)[[1, 3]], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("form", ["box", "array", "picture", "file"])
def test_each_region_is_drawn_by_its_adapter(pipe, three, form: str, tmp_path: Path) -> None:
    left = np.zeros((16, 16), dtype=np.uint8)
    left[:, :8] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    region = {
        "box": (0.0, 0.0, 0.5, 1.0), "array": left / 255.0, "picture": Image.fromarray(left), "file": tmp_path / "left.png",
    }[form]  # fmt: skip
    two = {n: three[n] for n in "ab"}
    each, plain = alone(pipe, two, {"a": 1.0, "b": 1.0}), run(pipe)
    mix = vl.attach(pipe, two, compose="regional", regions={"a": region, "b": (0.5, 0.0, 1.0, 0.5)}, softness=0.0)
    found = run(pipe)
    mix.detach()
    for part, expected in ((found[..., :4], each["a"][..., :4]), (found[..., :4, 4:], each["b"][..., :4, 4:])):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found[..., 4:, 4:], plain[..., 4:, 4:], rtol=1e-3, atol=2e-4)


def test_a_mask_of_another_shape_is_not_stretched(pipe, three) -> None:
    a = {"a": three["a"]}
    mix = vl.attach(pipe, a, compose="regional", regions={"a": torch.ones(64, 640)})
    with pytest.raises(
        vl.VisionLoRAError, match=r"'a' is 640 wide and 64 high.* which is 8 wide and 8 high \(in latents\)"
    ):
        run(pipe)
    for fitting in (torch.ones(64, 64), torch.ones(8, 8), torch.ones(9, 8)):
        mix.set_composition("regional", regions={"a": fitting}, softness=0.0)
        assert bool(torch.isfinite(run(pipe)).all())


def test_soft_edges_sum_to_one() -> None:
    made = composition("regional", regions={"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}, softness=0.2)
    made.evaluations(["a", "b"])
    outputs = torch.stack([torch.full((1, 1, 8, 8), v) for v in (0.0, 1.0, 3.0)])
    row = made.blend(outputs)[0, 0, 0]
    assert row[0] == pytest.approx(1.0, abs=0.05) and row[-1] == pytest.approx(3.0, abs=0.05)
    assert bool((row[1:] >= row[:-1] - 1e-6).all()) and row[3] < 2.2


def test_switch_gives_each_its_turn(pipe, three) -> None:
    mix = vl.attach(pipe, three, scales={"a": 0.5, "b": 1.0, "c": 2.0}, compose="switch", tau=2)
    assert Steps(pipe, mix).seen == [(0.5, 0, 0)] * 2 + [(0, 1, 0)] * 2 + [(0, 0, 2)] * 2
    mix.set_composition("switch", tau=1)
    assert [max(s) for s in Steps(pipe, mix).seen] == [0.5, 1, 2, 0.5, 1, 2]


def test_k_lora_follows_its_rule(pipe, three) -> None:
    two = {n: three[n] for n in "ab"}
    rule = composition("k-lora", alpha=1.5, beta=0.5)
    mix = vl.attach(pipe, two, compose=rule)
    deltas = [two[n].delta_weights() for n in "ab"]
    gamma = sum(float(d.abs().sum()) for d in deltas[0].values()) / sum(
        float(d.abs().sum()) for d in deltas[1].values()
    )
    takes_style = 0
    for step in (0, 5, 9):
        mix._set(step, 10)
        for layer, delta in deltas[0].items():
            tops = [float(d[layer].abs().flatten().topk(min(4, delta.numel())).values.sum()) for d in deltas]
            content = tops[0] >= tops[1] * gamma * (1.5 * step / 10 + 0.5)
            component, _, name = layer.partition(".")
            found = [dict(mix.handles[n])[component].methods[name].scale for n in "ab"]
            assert found == ([1.0, 0.0] if content else [0.0, 1.0])
            takes_style += not content
    assert 0 < takes_style < 3 * len(deltas[0])


def test_orthogonal_keeps_the_first_and_clears_the_later_ones(pipe, three) -> None:
    prepared = composition("orthogonal").prepare(three, dict.fromkeys("abc", 1.0))
    a, b, c = (p.delta_weights() for p in prepared.values())
    original = [three[n].delta_weights() for n in "abc"]
    for name in a:
        torch.testing.assert_close(a[name], original[0][name])
        for one, two in ((a, b), (a, c), (b, c)):
            assert abs(float((one[name] * two[name]).sum())) < 1e-3 * float(one[name].norm() * two[name].norm()) + 1e-5
    kept = sum(float(d.norm()) ** 2 for d in b.values()) / sum(float(d.norm()) ** 2 for d in original[1].values())
    assert 0.3 < kept < 1.0


def test_balanced_makes_them_equally_strong(pipe, three) -> None:
    strong = {n: AdapterModule.lora(*m.lora_factors(), m.alpha * 9) for n, m in three["a"].modules.items()}
    loud = {**three, "a": Adapter(strong)}
    prepared = composition("balanced").prepare(loud, dict.fromkeys("abc", 1.0))
    norms = [sum(float(d.norm()) ** 2 for d in p.delta_weights().values()) ** 0.5 for p in prepared.values()]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("name", ["knots", "iso-c"])
def test_merged_ones_are_what_merge_gives(pipe, three, name: str) -> None:
    scales = {"a": 1.0, "b": 0.5, "c": 0.25}
    mix = vl.attach(pipe, three, scales=scales, compose=name)
    found = run(pipe)
    assert list(mix.handles) == [f"{name}(a, b, c)"]
    mix.set_scales({"a": 0.0, "b": 0.0})
    only = run(pipe)
    mix.detach()
    options = Options(density=1.0) if name == "knots" else None
    for pairs, expected in (({"a": 1.0, "b": 0.5, "c": 0.25}, found), ({"a": 0.0, "b": 0.0, "c": 0.25}, only)):
        merged = merge_adapters([(three[n], s) for n, s in pairs.items()], name, options=options).adapter
        one = vl.attach(pipe, {"m": merged})
        torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=2e-4)
        one.detach()


@pytest.mark.parametrize("name", [n for n in COMPOSITIONS if n not in ("regional", "k-lora")])
def test_one_adapter_alone_is_itself_under_every_composition(pipe, three, name: str) -> None:
    if name == "iso-c":
        return check_iso_c_of_one(pipe, three)
    expected = alone(pipe, {"a": three["a"]}, {"a": 0.7})["a"]
    vl.attach(pipe, {"a": three["a"]}, scales={"a": 0.7}, compose=name)
    torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=2e-4)
    return None


def check_iso_c_of_one(pipe, three) -> None:
    """Iso-C flattens the singular values of a single adapter too."""
    vl.attach(pipe, {"a": three["a"]}, compose="iso-c")
    assert bool(torch.isfinite(run(pipe)).all())


MESSAGES = {
    "option of iso-c": (lambda: composition("iso-c", density=0.5), "Composition 'iso-c' has no option 'density'. It has none."),
    "tau": (lambda: composition("switch", tau=0), "tau is 0; it must be a whole number of at least 1 step."),
    "tau nan": (lambda: composition("switch", tau=np.nan), "tau is nan; it must be a whole number"),
    "tau text": (lambda: composition("switch", tau="a"), "tau is 'a'; it must be a whole number of at least 1 step."),
    "tau none": (lambda: composition("switch", tau=None), "tau is None; it must be a whole number"),
    "alpha": (lambda: composition("k-lora", alpha=float("nan")), "alpha is nan; it must be a finite number."),
    "beta": (lambda: composition("k-lora", beta="much"), "beta is 'much'; it must be a finite number."),
    "density": (lambda: composition("knots", density="a"), "density is 'a'; it must be a number above 0 and at most 1."),
    "softness text": (lambda: composition("regional", regions={"a": (0, 0, 1, 1)}, softness="a"), "softness is 'a'; it"),
    "box of text": (lambda: composition("regional", regions={"a": ("0", 0, 1, 1)}), "is ('0', 0, 1, 1); a box is (left"),
    "regions": (lambda: composition("regional", regions=[1]), "needs a region per adapter"),
    "option": (lambda: composition("switch", taw=1), "Composition 'switch' has no option 'taw'. Did you mean 'tau'?"),
    "no options": (lambda: composition("composite", tau=1), "Composition 'composite' has no option 'tau'. It has none."),
    "no regions": (lambda: composition("regional"), "needs a region per adapter"),
    "box": (lambda: composition("regional", regions={"a": (0.5, 0, 0.2, 1)}), "a box is (left, top, right, bottom)"),
    "mask": (lambda: composition("regional", regions={"a": np.zeros((2, 3, 4))}), "it must be (height, width)"),
    "empty mask": (lambda: composition("regional", regions={"a": np.zeros((0, 8))}), "has shape (0, 8); it must be (height"),
    "mask nan": (lambda: composition("regional", regions={"a": np.full((4, 4), np.nan)}), "with values 0 to 1"),
    "no mask": (lambda: composition("regional", regions={"a": None}), "The region of 'a' is None; give a box (left, top"),
    "file": (lambda: composition("regional", regions={"a": "nowhere.png"}), "The mask of 'a' cannot be read"),
    "softness": (lambda: composition("regional", regions={"a": (0, 0, 1, 1)}, softness=2), "softness is 2"),
    "without": (
        lambda: composition("regional", regions={"a": (0, 0, 1, 1)}).prepare(dict.fromkeys("ab", Adapter({})), {}),
        "Adapter 'b' has no region",
    ),
    "of none": (
        lambda: composition("regional", regions={"aa": (0, 0, 1, 1)}).prepare({"ab": Adapter({})}, {}),
        "There is a region for 'aa', which is not attached.",
    ),
    "two": (lambda: composition("k-lora").prepare({}, {}), "K-LoRA chooses between two adapters"),
    "three": (
        lambda: composition("k-lora").prepare(dict.fromkeys("abcd", Adapter({})), {"a": 1, "b": 0, "c": 1, "d": 1}),
        "content and style; there are 3 that are not at scale 0.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    action, message = MESSAGES[name]
    with pytest.raises(vl.VisionLoRAError) as caught:
        action()
    assert message in str(caught.value)


def test_a_composition_of_ones_own(pipe, three) -> None:
    class Half(Composition):
        """Everything at half strength."""

        def weights(self, names, step, steps):
            return dict.fromkeys(names, 0.5)

    mix = vl.attach(pipe, {"a": three["a"]}, scales={"a": 0.8}, compose=Half())
    found = run(pipe)
    mix.detach()
    torch.testing.assert_close(found, alone(pipe, {"a": three["a"]}, {"a": 0.4})["a"], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["k-lora", "regional"])
def test_one_composition_for_two_mixes(pipe, three, name: str, tiny_model: Path) -> None:
    """What it knew of the adapters of one was taken for that of the other."""
    options = {"regions": {"a": (0, 0, 0.5, 1), "b": (0.5, 0, 1, 1)}} if name == "regional" else {}
    two, other = {n: three[n] for n in "ab"}, open_base(str(tiny_model)).pipe
    with vl.attach(pipe, two, compose=name, **options):
        expected = run(pipe)
    made, others = composition(name, **options), {"a": three["c"], "b": three["a"]}
    with vl.attach(pipe, two, compose=made), vl.attach(other, others, scales={"b": 0}, compose=made):
        run(other)
        assert torch.equal(run(pipe), expected)


def test_switch_is_put_back_when_it_cannot_be_left(pipe, three) -> None:
    mix = vl.attach(pipe, three, compose="switch")
    with pytest.raises(vl.VisionLoRAError, match="K-LoRA chooses between two"):
        mix.set_composition("k-lora")
    assert type(mix.composition) is COMPOSITIONS["switch"] and mix.running == "stacked"


# ---------------------------------------------------------------------------------------- wide ones, silent ones, norms


def single(kind: str, row: int, column: int) -> Adapter:
    """ΔW = 1 at one place of a 6 x 6 layer."""
    up, down = torch.eye(6)[:, row : row + 1], torch.eye(6)[column : column + 1]
    if kind == "diff":
        return Adapter({"model.0": AdapterModule("diff", {"diff": up @ down}, 1.0)})
    return Adapter({"model.0": AdapterModule.lora(down, up, 1.0)})


@pytest.mark.parametrize("first", ["lora", "diff"])
@pytest.mark.parametrize("second", ["lora", "diff"])
def test_a_wide_one_uses_the_directions_of_its_energy_alone(first: str, second: str) -> None:
    two = {"a": single(first, 0, 1), "b": single(second, 2, 3)}
    prepared = composition("orthogonal").prepare(two, dict.fromkeys("ab", 1.0))
    for name, one in prepared.items():
        torch.testing.assert_close(one.delta_weights()["model.0"], two[name].delta_weights()["model.0"])
    meeting = composition("orthogonal").prepare({**two, "b": single(second, 0, 3)}, dict.fromkeys("ab", 1.0))
    assert float(meeting["b"].delta_weights()["model.0"].norm()) < 1e-5


@pytest.mark.parametrize("name", ["orthogonal", "balanced"])
def test_one_at_scale_zero_leaves_the_others_alone(pipe, three, name: str) -> None:
    expected = alone(pipe, {"b": three["b"]}, {"b": 0.7})["b"]
    mix = vl.attach(pipe, three, scales={"a": 0.0, "b": 0.7, "c": 0.0}, compose=name)
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
    mix.set_scales({"a": 1.0})
    both = run(pipe)
    assert not torch.allclose(both, expected, atol=1e-2)
    mix.set_scales({"a": 0.0})
    torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)


def test_one_that_is_silent_at_a_step_has_no_turn_and_no_share(pipe, three) -> None:
    first, second = vl.Scale(steps=vl.Window(0.0, 0.5)), vl.Scale(steps=vl.Window(0.6, 1.0))
    two = {n: three[n] for n in "ab"}
    mix = vl.attach(pipe, two, scales={"a": first, "b": second}, compose="switch", tau=1)
    assert Steps(pipe, mix).seen == [(1, 0)] * 3 + [(0, 1)] * 3
    mix.detach()
    mix = vl.attach(pipe, two, scales={"a": first, "b": 1.0}, compose="composite")
    seen = []
    for step in (0, 9, 2):
        mix._set(step, 10)
        seen.append(mix._evaluations)
    assert seen == [[{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}], [{"b": 1.0}], seen[0]]
    mix.set_scales({"b": second})
    assert mix.running == "batched"
    mix._set(5, 10)
    assert mix._evaluations == [], "0 between the windows: the base alone"
    picture = pipe("dog", num_inference_steps=4, height=32, width=32, output_type="np").images
    assert picture.shape == (1, 32, 32, 3)


def test_what_changes_the_text_alone_has_no_share_in_the_steps(pipe, three) -> None:
    text = Adapter({n: m for n, m in adapter(pipe, 3, LORA).modules.items() if n.startswith("text_encoder.")})
    mix = vl.attach(pipe, {"t": text, "a": three["a"]}, compose="composite")
    found = run(pipe)
    mix.set_composition("sum")
    torch.testing.assert_close(found, run(pipe), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["balanced", "orthogonal", "k-lora", "knots"])
def test_biases_are_composed_with_the_rest(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).requires_grad_(False)
    model.forward = lambda x, timestep=0: model[0](x)
    shifts = {n: torch.randn(6) for n in "ab"}
    made = {
        n: Adapter({**single("lora", k, k).modules, "model.0.bias": AdapterModule("shift", {"shift": s}, 1.0)})
        for k, (n, s) in enumerate(shifts.items())
    }
    before = model[0].bias.clone()
    mix = vl.attach(model, made, compose=name)
    torch.testing.assert_close(model[0].bias, before + shifts["a"] + shifts["b"])
    mix.detach()
    assert torch.equal(model[0].bias, before)


def test_regions_are_of_pictures() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    vl.attach(model, {"a": single("lora", 0, 0)}, compose="regional", regions={"a": (0, 0, 1, 1)})
    with pytest.raises(vl.VisionLoRAError, match="for models whose output is pictures"), torch.no_grad():
        model(torch.randn(2, 6))


def test_a_layer_in_two_spellings_is_one_layer_to_a_composition() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Linear(6, 8))})
    generator = torch.Generator().manual_seed(0)
    made = [
        Adapter({name: AdapterModule.lora(
            torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator), 2.0
        )})
        for name in ("model.a.0", "model.a_0")
    ]  # fmt: skip
    mix = vl.attach(model, dict(zip("xy", made, strict=True)), compose="orthogonal")
    one, two = (next(iter(h.adapter().delta_weights().values())) for pairs in mix.handles.values() for _, h in pairs)
    assert one.norm() > 0 and two.norm() > 0
    torch.testing.assert_close(one.t() @ two, torch.zeros(6, 6), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "tensors", "said"),
    [
        ("full", {"value": torch.ones(3)}, "was trained in full"),
        ("dora", {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(3, 1), "magnitude": torch.ones(3)}, "is DoRA"),
        ("ia3", {"vector": torch.ones(3)}, r"is \(IA\)³"),
    ],
)
def test_what_is_no_difference_by_itself_has_no_factor(kind: str, tensors: dict, said: str) -> None:
    given = Adapter({"model.head": AdapterModule(kind, tensors, 1.0)})
    with pytest.raises(vl.VisionLoRAError, match=f"model.head {said}.*cannot be scaled"):
        scaled(given, 0.5)
    assert scaled(given, 1.0) == given
    shift = Adapter({"model.norm.bias": AdapterModule("shift", {"shift": torch.ones(3)}, 1.0)})
    assert torch.equal(scaled(shift, 0.5).modules["model.norm.bias"].tensors["shift"], torch.full((3,), 0.5))
