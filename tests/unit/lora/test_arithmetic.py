"""Adapters merged, made smaller and taken from two models, against dense arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import AdapterFileError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import Result, Size, extract_adapter, merge_adapters, resize_adapter
from visionlora.lora.combine import COMBINATIONS, Options
from visionlora.lora.functional import decompose
from visionlora.lora.inject import attach
from visionlora.lora.overlap import overlap

SHAPES = {"unet.linear": (8, 6), "unet.conv": (8, 4, 3, 3)}


def adapter(seed: int, rank: int = 3, alpha: float = 2.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (o, *rest) in SHAPES.items():
        down = torch.randn(rank, *rest, generator=generator)
        up = torch.randn(o, rank, *(1,) * (len(rest) - 1), generator=generator)
        modules[name] = AdapterModule.lora(down, up, alpha)
    return Adapter(modules, {"base": {"id": "tiny"}, "trigger": f"word{seed}"})


def test_the_exact_sum() -> None:
    a, b = adapter(0), adapter(1, rank=2, alpha=5.0)
    found = merge_adapters([(a, 0.5), (b, -2.0)])
    for name, delta in found.adapter.delta_weights().items():
        torch.testing.assert_close(delta, 0.5 * a.delta_weights()[name] - 2 * b.delta_weights()[name])
    assert set(found.ranks.values()) == {5} and not any(found.errors.values())
    assert found.adapter.info["base"] == {"id": "tiny"} and found.adapter.info["trigger"] == "word0, word1"


def test_modules_of_one_alone_stay() -> None:
    a, b = adapter(0), adapter(1)
    only = Adapter({"unet.linear": b.modules["unet.linear"]})
    found = merge_adapters([(a, 1.0), (only, 1.0)]).adapter.delta_weights()
    torch.testing.assert_close(found["unet.conv"], a.delta_weights()["unet.conv"])


def test_how_text_is_read_and_where_noise_ends_are_kept() -> None:
    def trained(**training: object) -> Adapter:
        return replace(adapter(0), info={"training": training})

    skipped, ended, plain = trained(clip_skip=2), trained(zero_terminal_snr=True), trained()
    same = merge_adapters([(skipped, 1.0), (skipped, 0.5)])
    assert same.adapter.info["training"] == {"clip_skip": 2} and not same.notes
    mixed = merge_adapters([(skipped, 1.0), (ended, 1.0)])
    assert mixed.adapter.info["training"] == {"zero_terminal_snr": True}
    assert "trained with clip_skip 1 and 2" in mixed.notes[0] and "Draw with --clip-skip 2" in mixed.notes[0]
    assert "training" not in merge_adapters([(plain, 1.0), (plain, 1.0)]).adapter.info


SPELLED = {
    "an encoder, with text_model. and without": ("text_encoder.text_model.encoder.layers.0.mlp.fc1",
                                                 "text_encoder.encoder.layers.0.mlp.fc1"),
    "flat and dotted": ("model.blocks.0.attn.qkv", "model.blocks_0_attn_qkv"),
}  # fmt: skip


@pytest.mark.parametrize("names", SPELLED.values(), ids=SPELLED)
def test_a_layer_in_two_spellings_is_one_layer(names: tuple[str, str]) -> None:
    one, two = (Adapter({n: adapter(k).modules["unet.linear"]}) for k, n in enumerate(names))
    delta = sum(x.modules[n].delta_weight() for x, n in ((one, names[0]), (two, names[1])))
    for pair in ([one, two], [two, one]):
        found = merge_adapters([(a, 1.0) for a in pair]).adapter
        assert list(found.modules) == [names[0]]
        torch.testing.assert_close(found.modules[names[0]].delta_weight(), delta)
    (pair_of_itself,) = overlap({"a": one, "b": Adapter({names[1]: one.modules[names[0]]})})
    assert pair_of_itself.mean("cosine") == pytest.approx(1)


def test_two_layers_of_one_adapter_that_differ_in_spelling_alone_stay_two() -> None:
    module = adapter(0).modules["unet.linear"]
    both = Adapter({"model.a.b_c": module, "model.a_b.c": module})
    found = merge_adapters([(both, 1.0), (Adapter({"model.a.b_c": module}), 1.0)]).adapter
    assert {n: m.rank for n, m in found.modules.items()} == {"model.a.b_c": 6, "model.a_b.c": 3}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_smaller_rank_is_the_nearest_and_the_error_is_true(rank: int) -> None:
    whole = merge_adapters([(adapter(0), 1.0), (adapter(1), 1.0)]).adapter.delta_weights()
    found = merge_adapters([(adapter(0), 1.0), (adapter(1), 1.0)], size=Size(rank=rank))
    for name, delta in found.adapter.delta_weights().items():
        s = torch.linalg.svdvals(whole[name].flatten(1))
        assert float((delta - whole[name]).norm()) == pytest.approx(float(s[rank:].norm()), rel=1e-4)
        assert found.errors[name] == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3)


def test_an_energy_gives_each_module_its_own_rank() -> None:
    one = adapter(0, rank=4)
    strong = one.modules["unet.linear"].tensors
    flat = AdapterModule.lora(strong["lora_A"] * torch.tensor([[10.0], [0.1], [0.1], [0.1]]), strong["lora_B"], 2.0)
    found = resize_adapter(Adapter({**one.modules, "unet.linear": flat}), Size(energy=0.99))
    assert found.ranks["unet.linear"] == 1 and found.ranks["unet.conv"] > 1
    assert all(e <= 0.1 + 1e-6 for e in found.errors.values())


def test_loha_and_lokr_become_lora() -> None:
    g = torch.Generator().manual_seed(0)
    loha = {n: torch.randn(*s, generator=g) for n, s in {
        "hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)}.items()}  # fmt: skip
    lokr = {"lokr_w1": torch.randn(2, 3, generator=g), "lokr_w2": torch.randn(4, 2, generator=g)}
    both = Adapter({"unet.a": AdapterModule("loha", loha, 3.0), "unet.b": AdapterModule("lokr", lokr, 1.0)})
    found = resize_adapter(both, Size(energy=1.0))
    assert {m.kind for m in found.adapter.modules.values()} == {"lora"}
    for name, delta in found.adapter.delta_weights().items():
        torch.testing.assert_close(delta, both.delta_weights()[name], rtol=1e-4, atol=1e-5)


def dense_ties(deltas: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES value by value."""
    trimmed = []
    for d in deltas:
        keep = max(1, round(density * d.numel()))
        floor = d.abs().flatten().sort(descending=True).values[keep - 1]
        trimmed.append(torch.where(d.abs() >= floor, d, 0))
    out = torch.zeros_like(deltas[0]).flatten()
    for k in range(out.numel()):
        values = [float(t.flatten()[k]) for t in trimmed]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [v for v in values if v * sign > 0]
        out[k] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out.view_as(deltas[0])


def factors(seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    module = adapter(seed).modules["unet.conv"]
    return *module.lora_factors(), module.scaling * scale


def deltas_of(pairs) -> list[torch.Tensor]:
    return [(b.flatten(1) @ a.flatten(1) * s) for a, b, s in pairs]


def test_ties() -> None:
    pairs = [factors(0, 1.0), factors(1, 0.5), factors(2, 1.0)]
    a, b = COMBINATIONS["ties"](pairs, Options(density=0.3))
    torch.testing.assert_close(b.flatten(1) @ a.flatten(1), dense_ties(deltas_of(pairs), 0.3))


def test_dare_keeps_its_share_at_its_expectation() -> None:
    pairs = [factors(0, 1.0)]
    (delta,) = deltas_of(pairs)
    runs = []
    for seed in range(400):
        a, b = COMBINATIONS["dare"](pairs, Options(density=0.5, seed=seed))
        runs.append(b.flatten(1) @ a.flatten(1))
    mean = torch.stack(runs).mean(0)
    assert float((mean - delta).norm() / delta.norm()) < 0.1
    assert 0.4 < float((runs[0] != 0).float().mean()) < 0.6
    kept = runs[0] != 0
    torch.testing.assert_close(runs[0][kept], (2 * delta)[kept])


def test_knots_is_ties_in_the_shared_basis() -> None:
    pairs = [factors(0, 1.0), factors(1, 0.7)]
    deltas = [d.double() for d in deltas_of(pairs)]
    a, b = COMBINATIONS["knots"](pairs, Options(density=1.0))
    u, s, v = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    rank = int((s > 1e-6).sum())
    n = deltas[0].shape[1]
    sides = torch.stack([v[:rank, k * n : (k + 1) * n] for k in range(2)])
    sign = sides.sum(0).sign()
    agree = (sides.sign() == sign).double()
    expected = u[:, :rank] @ (s[:rank, None] * ((sides * agree).sum(0) / agree.sum(0)))
    torch.testing.assert_close((b.flatten(1) @ a.flatten(1)).double(), expected, rtol=1e-4, atol=1e-5)


def test_iso_c_has_equal_singular_values_and_the_directions_of_the_sum() -> None:
    pairs = [factors(0, 1.0), factors(1, 0.7)]
    a, b = COMBINATIONS["iso-c"](pairs, Options())
    _, s, _ = decompose(a, b)
    whole = torch.linalg.svdvals(sum(deltas_of(pairs)))
    torch.testing.assert_close(s, torch.full_like(s, float(whole[: len(s)].mean())), rtol=1e-4, atol=1e-5)


def test_dropping_values_keeps_the_rank_of_the_sum_unless_told_otherwise() -> None:
    found = merge_adapters([(adapter(0), 1.0), (adapter(1), 1.0)], "ties")
    assert set(found.ranks.values()) == {6}
    assert all(0 < e < 1 for n, e in found.errors.items() if n == "unet.conv")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.conv1, self.norm = nn.Linear(700, 600), nn.Conv2d(4, 8, 3), nn.LayerNorm(6)


def test_extract_finds_the_adapter_that_was_merged() -> None:
    torch.manual_seed(0)
    model = Net()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    handle = vl.inject(model, vl.AdapterConfig(rank=4, targets="body,conv1"))
    for m in handle.methods.values():
        m.lora_B.data.normal_(std=0.1)
    true = handle.adapter().delta_weights()
    handle.merge()
    after = {n: p.clone() for n, p in model.state_dict().items() if "adapters" not in n}
    after["norm.weight"] += 1
    for size in (Size(rank=4), Size(energy=0.9999)):
        found = extract_adapter(before, after, size)
        assert found.errors.pop("model.norm.weight") == 1.0
        assert all(m.rank == 4 for m in found.adapter.modules.values())
        for name, delta in found.adapter.delta_weights().items():
            torch.testing.assert_close(delta, true[name], rtol=1e-3, atol=1e-5)
    shifted = extract_adapter(before, after, Size(rank=4), shifts=True).adapter
    torch.testing.assert_close(shifted.modules["model.norm.weight"].tensors["shift"], torch.ones(6))
    fresh = Net()
    fresh.load_state_dict(before)
    vl.attach(fresh, shifted)
    torch.testing.assert_close(fresh.norm.weight, after["norm.weight"])


def test_tables_of_embeddings_are_left_out() -> None:
    """No adapter acts on them, so a file with one could not be attached."""
    before = {"text_model.embeddings.token_embedding.weight": torch.zeros(9, 4), "fc.weight": torch.zeros(4, 4)}
    after = {n: t + 1 for n, t in before.items()}
    for shifts in (False, True):
        found = extract_adapter(before, after, Size(rank=1), "text_encoder", shifts=shifts)
        assert list(found.adapter.modules) == ["text_encoder.fc"]
        assert found.errors["text_encoder.text_model.embeddings.token_embedding.weight"] == 1.0


@pytest.mark.parametrize("apart", [False, True], ids=["packed", "three weights"])
def test_extract_from_torchs_own_attention(apart: bool, tmp_path: Path) -> None:
    """Its weights are parameters of its own, not of layers inside."""
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.MultiheadAttention(16, 2, kdim=12 if apart else None)).eval() for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith("proj_weight"):
                p[:8] += 0.1 * torch.randn(8, 2) @ torch.randn(2, p.shape[1])
    found = extract_adapter(base.state_dict(), tuned.state_dict(), Size(rank=2))
    assert set(found.adapter.modules) == {f"model.0.{part}" for part in ("qkv" if apart else "q")}
    assert max(found.errors.values()) < 1e-3, "nothing is left out"
    vl.attach(base, found.adapter)
    given = torch.randn(5, 1, 16), torch.randn(5, 1, 12 if apart else 16), torch.randn(5, 1, 16)
    torch.testing.assert_close(base[0](*given)[0], tuned[0](*given)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterFileError, match="a part of torch's packed attention"):
        vl.save_adapter(found.adapter, tmp_path / "a", "peft")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("name", ["unet.mid_block.resnets.0.conv1", "unet.other"])
def test_convolutions_whose_files_do_not_say_their_kernel(kind: str, name: str) -> None:
    """LyCORIS' LoHa and factored LoKr: made smaller or merged they are LoRA for a convolution, and can be attached."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sides = {f"hada_w{k}_{s}": random(*((8, 2) if s == "a" else (2, 54))) for k in (1, 2) for s in "ab"}
    lokr = {"lokr_w1": random(2, 2), "lokr_w2_a": random(4, 1), "lokr_w2_b": random(1, 27)}
    own = Adapter({name: AdapterModule(kind, sides if kind == "loha" else lokr, 2.0)})
    model, layer = nn.Module(), nn.Conv2d(6, 8, 3)
    parent = model
    for part in name.split(".")[1:-1]:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(name.rpartition(".")[2], layer)
    before, deltas = layer.weight.detach().clone(), []
    loco = Adapter({name: AdapterModule.lora(random(2, 6, 3, 3), random(8, 2, 1, 1), 2.0)})
    for made in (own, resize_adapter(own, Size(rank=8)).adapter, merge_adapters([(own, 1.0)]).adapter,
                 merge_adapters([(own, 1.0), (loco, 0.0)]).adapter):  # fmt: skip
        handle = attach(model, made)
        handle.merge()
        deltas.append(layer.weight.detach() - before)
        handle.eject()
        if made is not own and "conv1" in name:
            assert made.modules[name].tensors["lora_A"].shape[1:] == (6, 3, 3), "other programs read the kernel there"
    for found in deltas[1:]:
        torch.testing.assert_close(found, deltas[0], rtol=1e-4, atol=1e-4)
    assert deltas[0].abs().max() > 0.1


@pytest.mark.parametrize("method", list(COMBINATIONS))
def test_layers_that_no_adapter_changes(method: str) -> None:
    """Trainers write zeros for layers that they never reached."""
    none = Adapter({n: AdapterModule.lora(0 * m.tensors["lora_A"], 0 * m.tensors["lora_B"], 2.0)
                    for n, m in adapter(0).modules.items()})  # fmt: skip
    for delta in merge_adapters([(none, 1.0), (none, 1.0)], method).adapter.delta_weights().values():
        assert not delta.any() and torch.isfinite(delta).all()


MESSAGES = {
    "head": (
        lambda: resize_adapter(Adapter({"model.head.weight": AdapterModule("full", {"value": torch.ones(2, 2)}, 1.0)}),
                               Size(rank=1)),
        "was trained in full: it means something on its own base alone, so it cannot be resized. Make a model of it",
    ),
    "nothing": (lambda: merge_adapters([]), "There is nothing to merge: give at least one adapter."),
    "method": (lambda: merge_adapters([(adapter(0), 1.0)], "tis"), "There is no combination 'tis'. Did you mean 'ties'?"),
    "tokens": (
        lambda: merge_adapters([(Adapter({}, {}, {"<dog>": {"t": torch.full((1, 2), v)}}), 1.0) for v in (0.0, 1.0)]),
        "Two of the adapters have vectors of their own for <dog>",
    ),
    "both": (lambda: Size(rank=2, energy=0.5), "Give a rank or an energy, not both"),
    "rank": (lambda: Size(rank=0), "The rank is 0; it must be at least 1."),
    "energy": (lambda: Size(energy=1.5), "The energy is 1.5; it must be above 0 and at most 1, such as 0.95."),
    "option": (
        lambda: merge_adapters([(adapter(0), 1.0)], "sum", options=Options(density=0.5)),
        "density is 0.5, which changes nothing in 'sum': it is for ties, dare, knots. Leave it out",
    ),
    "seed": (
        lambda: merge_adapters([(adapter(0), 1.0)], "ties", options=Options(seed=1)),
        "seed is 1, which changes nothing in 'ties': it is for dare.",
    ),
    "density": (lambda: Options(density=0), "density is 0; it must be above 0 and at most 1."),
    "no size": (lambda: resize_adapter(adapter(0), Size()), "Say how small: a rank, or an energy such as 0.95."),
    "shapes": (
        lambda: merge_adapters([(adapter(0), 1.0), (Adapter({"unet.linear": AdapterModule.lora(
            torch.ones(1, 7), torch.ones(8, 1), 1.0)}), 1.0)]),
        "The adapters change unet.linear of different sizes, (8, 7) and (8, 6)",
    ),
    "dora": (
        lambda: resize_adapter(Adapter({"unet.a": AdapterModule("dora", {}, 1.0)}), Size(rank=1)),
        "unet.a is DoRA: its ΔW depends on the base model, so it cannot be resized by itself. Bake it",
    ),
    "architectures": (
        lambda: extract_adapter({"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)}, Size(rank=1)),
        "The models are of different architectures: 2 parameters are in one alone, such as 'a.weight' in the first.",
    ),
    "sizes": (
        lambda: extract_adapter({"a.weight": torch.ones(2, 2)}, {"a.weight": torch.ones(2, 3)}, Size(rank=1)),
        "The models are of different architectures: 'a.weight' is (2, 2) in the first and (2, 3) in the second.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    run, message = MESSAGES[name]
    with pytest.raises(vl.VisionLoRAError) as caught:
        run()
    assert message in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_scales_that_are_not_finite_reach_no_file(scale: float, tmp_path: Path) -> None:
    with pytest.raises(vl.VisionLoRAError, match=r"The scale of adapter 'number 2' is .*; it must be a finite number"):
        merge_adapters([(adapter(0), 1.0), (adapter(1), scale)])
    broken = adapter(0)
    next(iter(broken.modules.values())).tensors["lora_A"][0, 0] = float("nan")
    with pytest.raises(vl.VisionLoRAError, match="The adapter has NaN or infinite values in 'unet"):
        vl.save_adapter(broken, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_scales_that_are_all_zero_are_noted() -> None:
    assert merge_adapters([(adapter(0), 0.0)]).notes == ("Every scale is 0, so the merged adapter changes nothing.",)
    assert merge_adapters([(adapter(0), 0.0), (adapter(1), 0.5)]).notes == ()


def test_results_are_adapters_too() -> None:
    wanted = merge_adapters([(adapter(0), 1.0), (adapter(1), 1.0)]).adapter.delta_weights()
    found = merge_adapters([(adapter(0), 1), Result(adapter(1), {})]).adapter.delta_weights()
    assert all(torch.equal(found[name], delta) for name, delta in wanted.items())


@pytest.mark.parametrize("run", [lambda: vl.save_adapter({}, "a"), lambda: resize_adapter(3, Size(rank=1)),
                                 lambda: merge_adapters([3])])  # fmt: skip
def test_what_is_no_adapter(run) -> None:
    with pytest.raises(vl.VisionLoRAError, match=r"is no adapter: give an Adapter, such as load_adapter\(path\)"):
        run()
    with pytest.raises(vl.VisionLoRAError, match="Give a list of pairs of adapter and scale"):
        merge_adapters([(adapter(0), adapter(1))])
