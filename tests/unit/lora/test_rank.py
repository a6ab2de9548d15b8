"""Automatic ranks: the budget goes where the gradient is, and noise gets nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from visionlora.config import ClassifyConfig
from visionlora.errors import ConfigError, ModelError, TargetError, TrainingError
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.lora.rank import (
    choose_ranks,
    input_spectra,
    narrowest,
    numbers_at,
    spend,
    triplet_energies,
    uniform_rank,
)


def problem(wanted: int) -> tuple[nn.Module, AdapterConfig, object]:
    """Two layers side by side; the target differs from the first by a matrix of rank `wanted` and not from the second."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"needed": nn.Linear(12, 12), "fine": nn.Linear(12, 12)}).requires_grad_(False)
    change = torch.randn(12, wanted) @ torch.randn(wanted, 12)

    def loss_of(batch: int) -> Tensor:
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(batch))
        noise = 0.1 * torch.randn(64, 12, generator=torch.Generator().manual_seed(1000 + batch))
        first = model["needed"](x) - (model["needed"](x).detach() + x @ change.T)
        second = model["fine"](x) - model["fine"](x).detach() + noise
        return first.square().mean() + second.square().mean()

    return model, AdapterConfig(rank=3, targets=("needed", "fine")), loss_of


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_the_layer_that_must_change_gets_the_rank_of_the_change(wanted: int) -> None:
    model, config, loss_of = problem(wanted)
    choice = choose_ranks(model, config, loss_of, batches=16)
    assert choice.ranks["needed"] >= wanted
    assert choice.parameters <= 3 * 2 * 24
    assert choice.energies["needed"] > 100 * choice.energies["fine"]
    handle = inject(model, choice.config)
    assert {n: m.rank for n, m in handle.methods.items()} == {n: r for n, r in choice.ranks.items() if r}
    assert handle.report.trained_parameters == choice.parameters


@pytest.mark.parametrize(("method", "wanted"), [("lora", 8 / 3), ("rslora", 8 / 3**0.5), ("dora", 8 / 3)])
def test_alpha_that_is_given_keeps_its_scaling_at_every_rank(method: str, wanted: float) -> None:
    """One alpha for all ranks would scale down what was found to need most."""
    model, config, loss_of = problem(5)
    given = replace(config, method=method, alpha=8.0, alpha_pattern={"fine": 2.0})
    choice = choose_ranks(model, given, loss_of, batches=16)
    assert choice.ranks["needed"] > 3 > choice.ranks["fine"] > 0
    scalings = {n: m.scaling for n, m in inject(model, choice.config).methods.items()}
    assert scalings == pytest.approx({"needed": wanted, "fine": wanted / 4})


def test_processes_that_share_the_batches_find_what_one_finds() -> None:
    model, config, _ = problem(5)
    change = torch.randn(12, 5) @ torch.randn(5, 12)

    def of(part: slice):
        def loss_of(batch: int) -> Tensor:
            x = torch.randn(64, 12, generator=torch.Generator().manual_seed(batch))[part]
            first = model["needed"](x) - (model["needed"](x).detach() + x @ change.T)
            return first.square().mean() + (model["fine"](x) - model["fine"](x).detach() + x).square().mean()

        return loss_of

    whole = choose_ranks(model, config, of(slice(None)))
    others: list[Tensor] = []

    def told(found: Tensor) -> Tensor:
        others.append(found)
        return found

    choose_ranks(model, config, of(slice(32, None)), shared=told)
    both = choose_ranks(model, config, of(slice(32)), shared=lambda found: (found + others.pop(0)) / 2)
    assert both.ranks == whole.ranks and both.energies == pytest.approx(whole.energies, rel=1e-4)


@pytest.mark.parametrize("budget", [None, 150])
@pytest.mark.parametrize("method", ["lora", "lora-fa", "dora", "adalora", "lora+", "pissa"])
def test_the_budget_is_kept_as_the_method_trains(method: str, budget: int | None) -> None:
    model, config, loss_of = problem(5)
    given = replace(config, **({"init": "pissa"} if method == "pissa" else {"method": method}))
    everywhere = inject(model, given)
    most = budget or everywhere.report.trained_parameters
    everywhere.eject()
    choice = choose_ranks(model, given, loss_of, batches=16, budget=budget)
    assert inject(model, choice.config).report.trained_parameters == choice.parameters <= most
    assert choice.parameters > 0.6 * most


@pytest.mark.parametrize("method", ["lora", "lora-fa", "dora", "pissa"])
def test_a_budget_of_the_file_counts_what_it_holds(method: str) -> None:
    model, config, loss_of = problem(5)
    given = replace(config, **({"init": "pissa"} if method == "pissa" else {"method": method}))
    choice = choose_ranks(model, given, loss_of, batches=16, budget=150, stored=True)
    handle = inject(model, choice.config)
    held = sum(t.numel() for m in handle.adapter().modules.values() for t in m.tensors.values())
    assert 100 < held <= 150 and choice.parameters == handle.report.trained_parameters


def test_a_large_budget_is_spent() -> None:
    """The cap of a layer's rank goes by the mean rank that the budget gives, and not by that of the configuration."""
    model, config, loss_of = problem(12)
    room = 12 * 24  # of the one layer that needs it
    alone = choose_ranks(model, replace(config, rank=1), loss_of, batches=16)
    small = choose_ranks(model, replace(config, rank=1), loss_of, batches=16, budget=2 * 24)
    large = choose_ranks(model, replace(config, rank=1), loss_of, batches=16, budget=room)
    assert small.ranks == alone.ranks and max(small.ranks.values()) <= 4
    assert large.ranks["needed"] > 8 and 0.9 * room < large.parameters <= room


def test_the_rank_that_a_budget_gives_to_all_layers() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(12, 12), "flat": nn.Linear(12, 2)})
    parts = [(model, AdapterConfig(targets=("wide", "flat")))]
    assert [numbers_at(parts, rank) for rank in (1, 2, 3)] == [38, 76, 100]
    assert [uniform_rank(parts, budget) for budget in (10, 75, 76, 99, 100, 10_000)] == [1, 1, 2, 2, 3, 12]
    assert narrowest(parts) == 2


@pytest.mark.parametrize("method", ["ia3", "vera", "full", "linear-probe"])
def test_methods_without_ranks_to_spread(method: str) -> None:
    model, config, loss_of = problem(1)
    with pytest.raises(ConfigError, match=f"Method '{method}' has no ranks"):
        choose_ranks(model, replace(config, method=method, train="fine"), loss_of)
    with pytest.raises(ConfigError, match=f"rank is 'auto'; method {method} has no ranks"):
        ClassifyConfig(images="x", rank="auto", method=method)


def test_adalora_keeps_to_the_size_of_its_rank_where_triplets_of_wide_layers_stay() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"wide": nn.Linear(40, 40), "small": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    config = AdapterConfig(method="adalora", rank=3, targets=("wide", "small", "idle"))
    handle = inject(model, config)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.01)
    x, change = torch.randn(64, 40), torch.randn(40, 40)
    for step in range(1, 31):
        optimizer.zero_grad()
        rest = model["small"](x[:, :4]).sum() + model["idle"](x[:, :4]).sum()
        (model["wide"](x) - x @ change).square().mean().add(1e-6 * rest).backward()
        optimizer.step()
        handle.after_step(step, 30)
    ranks = {n: m.rank for n, m in handle.adapter().modules.items()}
    held = sum(t.numel() for m in handle.adapter().modules.values() for t in m.tensors.values())
    assert ranks["model.wide"] == 3 and held <= 3 * (80 + 8 + 8)


def test_the_model_is_left_as_it_was() -> None:
    model, config, loss_of = problem(2)
    model["fine"].requires_grad_(True)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    choose_ranks(model, config, loss_of, batches=4)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert p.grad is None


def test_what_the_halves_disagree_on_counts_for_nothing() -> None:
    torch.manual_seed(0)
    first = torch.randn(8, 8)
    assert triplet_energies(first, -first + 1e-6, 4).sum() == 0
    assert (triplet_energies(first, first, 4) > 0).all()


def test_spending_never_exceeds_the_budget() -> None:
    energies = {"a": torch.tensor([9.0, 8.0, 1.0]), "b": torch.tensor([7.0, 0.0])}
    cost = {"a": 10, "b": 4}
    assert spend(energies, lambda name, rank: rank * cost[name], 14) == {"a": 1, "b": 1}
    assert spend(energies, lambda name, rank: rank * cost[name], 3) == {"a": 0, "b": 0}
    assert spend(energies, lambda name, rank: 5 + rank * cost[name], 33) == {"a": 1, "b": 1}
    assert spend(energies, lambda name, rank: 0 if rank < 3 else cost[name], 0) == {"a": 2, "b": 1}


def two_of_one_name() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv1": nn.Linear(6, 6), "layer": nn.ModuleDict({"conv1": nn.Linear(6, 6)})})


def test_a_rank_is_of_the_layer_of_that_name_alone() -> None:
    config = AdapterConfig(rank=2, targets="conv1", rank_pattern={"conv1": 3, "layer.conv1": 1})
    handle = inject(two_of_one_name(), config)
    assert {n: m.rank for n, m in handle.methods.items()} == {"conv1": 3, "layer.conv1": 1}


def test_what_gets_no_rank_is_left_out_alone() -> None:
    model, x = two_of_one_name(), torch.randn(8, 6)
    noise = [torch.randn(8, 6), torch.randn(8, 6)]

    def loss_of(batch: int) -> Tensor:
        return (
            model["layer"]["conv1"](x).square().sum() + (model["conv1"](x) * noise[batch]).sum() * (-1) ** batch * 1e-9
        )

    choice = choose_ranks(model, AdapterConfig(rank=2, targets="conv1"), loss_of, batches=2)
    handle = inject(model, choice.config)
    assert choice.ranks["conv1"] == 0 and list(handle.methods) == ["layer.conv1"]
    assert handle.report.trained_parameters == choice.parameters


def test_ranks_by_target_words() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.ModuleDict({"fc1": nn.Linear(8, 8)})})
    config = AdapterConfig(
        rank=4, targets="attn.qv,mlp", rank_pattern={"attn.q": 2, "mlp": 1}, alpha_pattern={"attn": 8}
    )
    handle = inject(model, config)
    assert {n: m.rank for n, m in handle.methods.items()} == {"attn.q": 2, "attn.v": 4, "mlp.fc1": 1}
    assert {n: m.scaling for n, m in handle.methods.items()} == {"attn.q": 4.0, "attn.v": 2.0, "mlp.fc1": 1.0}


def test_patterns_of_layers_that_get_no_rank() -> None:
    """By role, as a user gives them: what was chosen is for the layers that are left."""
    torch.manual_seed(0)
    model, x = nn.ModuleDict({f"to_{part}": nn.Linear(8, 8) for part in "qkv"}), torch.randn(16, 8)

    def loss_of(batch: int) -> Tensor:
        return model["to_v"](x).square().sum() + 0.0 * (model["to_q"](x) + model["to_k"](x)).sum()

    config = AdapterConfig(
        rank=2, targets="attn", rank_pattern={"attn.q": 1, "attn.v": 2}, alpha_pattern={"attn.k": 8.0, "attn.v": 6.0}
    )
    choice = choose_ranks(model, config, loss_of, batches=2)
    handle = inject(model, choice.config)
    assert {n: m.scaling for n, m in handle.methods.items()} == {"to_v": 3.0}
    with pytest.raises(TargetError, match=r"rank_pattern names .* which is none of the adapted layers") as caught:
        inject(model, AdapterConfig(rank=2, targets="attn.v", rank_pattern={"attn.q": 1}), name="other")
    assert "Did you mean 'attn.q'" not in str(caught.value)


def test_refusals() -> None:
    model, config, loss_of = problem(1)
    with pytest.raises(TargetError, match="Layer 'fine' has no part in the loss"):
        choose_ranks(model, config, lambda i: model["needed"](torch.randn(2, 12)).sum(), batches=2)
    with pytest.raises(TargetError, match="rank_pattern names 'typo', which is none of the adapted layers"):
        inject(model, AdapterConfig(rank=2, targets="needed", rank_pattern={"typo": 1}))
    with pytest.raises(ConfigError, match="need at least 2 calibration batches; 1 were given"):
        choose_ranks(model, config, loss_of, batches=1)
    with pytest.raises(TrainingError, match="The calibration loss of batch 0 is nan"):
        choose_ranks(model, config, lambda i: loss_of(i) * float("nan"), batches=2)
    spoiled, config, loss_of = problem(1)
    next(spoiled.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="The weights of the base hold NaN or infinite values: 1 tensor of"):
        choose_ranks(spoiled, config, loss_of, batches=2)
    with pytest.raises(ConfigError, match="needs the inputs of layer 'needed': measure them"):
        inject(model, AdapterConfig(rank=2, targets="needed", init="eva"))


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_input_spectra_are_the_principal_directions(layer: str) -> None:
    torch.manual_seed(0)
    if layer == "linear":
        model = nn.Sequential(nn.Linear(6, 4))
        batches = [torch.randn(32, 6) * torch.tensor([9.0, 1, 1, 1, 1, 5]) for _ in range(3)]
        rows = torch.cat(batches)
    else:
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2))
        batches = [torch.randn(4, 2, 8, 8) for _ in range(3)]
        rows = torch.cat(
            [nn.functional.unfold(b, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for b in batches]
        )
    config = AdapterConfig(rank=2, targets="0", init="eva")
    spectra = input_spectra(model, config, lambda i: model(batches[i]), batches=3)
    _, _, v = torch.linalg.svd(rows, full_matrices=False)
    assert ((spectra["0"] * v[:2]).sum(1).abs() > 0.999).all()
    handle = inject(model, replace(config, spectra=spectra))
    torch.testing.assert_close(handle.methods["0"].lora_A.flatten(1), spectra["0"], rtol=0, atol=0)


def test_input_spectra_have_the_ranks_of_a_pattern_by_role() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({f"to_{part}": nn.Linear(8, 8) for part in "qv"}), torch.randn(32, 8)
    config = AdapterConfig(rank=2, targets="attn.q,attn.v", init="eva", rank_pattern={"attn.v": 5})
    spectra = input_spectra(model, config, lambda i: (model["to_q"](x), model["to_v"](x)), batches=1)
    handle = inject(model, replace(config, spectra=spectra))
    assert {n: m.rank for n, m in handle.methods.items()} == {"to_q": 2, "to_v": 5}


def test_adapters_of_different_numbers_start_at_right_angles() -> None:
    rows = []
    for index in range(3):
        model = nn.Sequential(nn.Linear(24, 8))
        config = AdapterConfig(method="lora-fa", rank=4, targets="0", init="orthogonal", basis_index=index)
        rows.append(inject(model, config).methods["0"].lora_A.detach())
    gram = torch.cat(rows) @ torch.cat(rows).T
    torch.testing.assert_close(gram, torch.eye(12) / 3, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="the largest basis_index is 5"):
        inject(nn.Sequential(nn.Linear(24, 8)), AdapterConfig(rank=4, targets="0", init="orthogonal", basis_index=6))


def test_spectra_of_torchs_attention_are_of_its_three_inputs() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2)})
    query, key = torch.randn(5, 4, 6) * torch.tensor([9.0, 1, 1, 1, 1, 5]), torch.randn(7, 4, 6)
    config = AdapterConfig(rank=2, targets="attn.q,attn.k", init="eva")
    spectra = input_spectra(model, config, lambda i: model["attn"](query, key=key, value=key), batches=1)
    for part, rows in (("q", query), ("k", key)):
        _, _, v = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
        assert ((spectra[f"attn.{part}"] * v[:2]).sum(1).abs() > 0.999).all()
    with pytest.raises(ConfigError, match=r"leave it out \(exclude='attn.out_proj'\), or take another init"):
        input_spectra(
            model, AdapterConfig(rank=2, targets="attn.out"), lambda i: model["attn"](key, key, key), batches=1
        )
    conv = nn.Sequential(nn.Conv1d(2, 2, 3))
    with pytest.raises(ConfigError, match="Conv1d needs another init"):
        input_spectra(conv, AdapterConfig(rank=1, targets="0"), lambda i: conv(torch.randn(1, 2, 8)), batches=1)
