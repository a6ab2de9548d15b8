"""inject and attach: what they report, refuse and leave behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from visionlora.errors import AdapterFileError, ConfigError, TargetError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import InjectionReport
from visionlora.lora.inject import attach, inject


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


ALL = AdapterConfig(rank=2, targets=("0", "2"))


def test_base_names_and_tensors_stay_the_same_objects() -> None:
    m = model()
    before, weight = set(m.state_dict()), m[0].weight
    handle = inject(m, ALL)
    assert before <= set(m.state_dict())
    assert m[0].weight is weight
    handle.eject()
    assert set(m.state_dict()) == before
    assert type(m[0]) is nn.Linear


def test_only_the_adapter_trains() -> None:
    m = model()
    handle = inject(m, ALL)
    assert {id(p) for p in m.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}


def test_the_report_counts() -> None:
    handle = inject(model(), ALL)
    assert handle.report.hits == (("0", "0"), ("2", "2"))
    assert handle.report.trained_parameters == 2 * (6 + 8) + 2 * (8 + 4)
    assert str(handle.report) == "2 layers adapted, 52 parameters (56.52 % of the base)"


def test_the_same_seed_gives_the_same_factors() -> None:
    a, b, c = (inject(model(), ALL, seed=s).methods["0"].lora_A for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_taken_name_is_refused_and_the_model_left_alone() -> None:
    m = model()
    inject(m, AdapterConfig(rank=2, targets="0"))
    with pytest.raises(ConfigError, match="named 'default' is on this model already"):
        inject(m, ALL)
    assert type(m[2]) is nn.Linear


def test_a_failed_injection_leaves_the_model_alone() -> None:
    m = model()
    with pytest.raises(TargetError):
        inject(m, AdapterConfig(rank=2, targets=("0", "nothing")))
    assert type(m[0]) is nn.Linear
    assert all(p.requires_grad for p in m.parameters())


def test_two_adapters_add_up() -> None:
    m, x = model(), torch.randn(3, 6)
    base = m[0](x)
    deltas = []
    for name in ("a", "b"):
        handle = inject(m, AdapterConfig(rank=2, targets="0"), name=name, seed=ord(name))
        handle.methods["0"].lora_B.data.normal_()
        deltas.append(handle.methods["0"].delta_weight(m[0].weight))
    torch.testing.assert_close(m[0](x), base + x @ sum(deltas).T, rtol=1e-5, atol=1e-5)


def test_a_deep_copy_is_independent() -> None:
    m = model()
    handle = inject(m, ALL)
    twin = copy.deepcopy(m)
    handle.methods["0"].lora_B.data.fill_(1.0)
    x = torch.randn(2, 6)
    assert not torch.equal(m(x), twin(x))


def test_merging_nan_is_refused_before_any_weight_changes() -> None:
    m = model()
    before = copy.deepcopy(m.state_dict())
    handle = inject(m, ALL)
    handle.methods["2"].lora_B.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="NaN or infinite weights in '2'; nothing was changed"):
        handle.merge()
    assert all(torch.equal(m.state_dict()[k], v) for k, v in before.items())


def test_scales_are_checked() -> None:
    handle = inject(model(), ALL)
    with pytest.raises(ConfigError, match="must be a finite number"):
        handle.set_scale(float("nan"))


def test_a_merged_adapter_takes_a_new_scale_from_the_originals() -> None:
    m, x = model(), torch.randn(3, 6)
    handle = inject(m, ALL)
    for method in handle.methods.values():
        method.lora_B.data.normal_()
    before = m[0].weight.detach().clone()
    handle.merge()
    handle.set_scale(0.5)
    merged = m(x)
    handle.unmerge()
    assert torch.equal(m[0].weight, before)
    torch.testing.assert_close(merged, m(x), rtol=1e-5, atol=1e-6)


def factors(i: int, o: int) -> AdapterModule:
    return AdapterModule.lora(torch.randn(2, i), torch.randn(o, 2), 4.0)


def test_attach_applies_a_finished_adapter() -> None:
    m, x = model(), torch.randn(3, 6)
    base = m[0](x)
    adapter = Adapter({"net.0": factors(6, 8)})
    attach(m, adapter, "net")
    torch.testing.assert_close(m[0](x), base + x @ adapter.delta_weights()["net.0"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            Adapter({"net.7": factors(6, 8)}),
            "has a layer net.7, which Sequential has not",
        ),
        (Adapter({"net.0": factors(5, 8)}), "net.0 has shape (8, 5), the base weight (8, 6)"),
    ],
)
def test_attach_refuses_what_does_not_fit(adapter: Adapter, words: str) -> None:
    m = model()
    with pytest.raises(TargetError) as caught:
        attach(m, adapter, "net")
    assert words in str(caught.value)
    assert type(m[0]) is nn.Linear


def test_attach_refuses_one_layer_in_two_spellings() -> None:
    m = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 8))})
    adapter = Adapter(dict.fromkeys(("model.a.0", "model.a_0"), factors(6, 8)))
    with pytest.raises(AdapterFileError, match=r"changes model\.a\.0 twice, as a\.0 and as a_0"):
        attach(m, adapter)
    assert type(m["a"][0]) is nn.Linear


def test_flat_names_are_found_in_the_table_of_the_model() -> None:
    m = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 8))})
    assert attach(m, Adapter({"model.a_0": factors(6, 8)})).report.hits == (("a_0", "file"),)
    assert type(m["a"][0]) is not nn.Linear


def test_a_layer_that_is_not_there_is_answered_briefly() -> None:
    m = nn.ModuleDict({f"block_{k}": nn.Linear(6, 8) for k in range(400)})
    adapter = Adapter({"net.block_0": factors(6, 8), "net.zzz": factors(6, 8)})
    with pytest.raises(TargetError, match=r"net\.zzz.*Allowed: .* and 395 more\..*allow_partial=True") as caught:
        attach(m, adapter, "net")
    assert len(str(caught.value)) < 600


def test_peft_on_the_model_is_named_as_the_reason() -> None:
    m = model()
    m[0] = nn.ModuleDict({"base_layer": m[0]})  # as PEFT wraps a layer
    with pytest.raises(
        TargetError, match=r"^PEFT adapters are loaded on this .*call pipe\.unload_lora_weights\(\) first"
    ):
        attach(m, Adapter({"net.0": factors(6, 8)}), "net")


def test_what_is_no_module_is_refused() -> None:
    pipe = SimpleNamespace(unet=model())
    with pytest.raises(
        ConfigError, match=r"A SimpleNamespace is no module .*give one of its parts, such as \.unet of it"
    ):
        inject(pipe, AdapterConfig(rank=1))
    with pytest.raises(ConfigError, match=r"A str is no module .*give a torch\.nn\.Module"):
        attach("model", Adapter({"net.0": factors(6, 8)}))


@pytest.mark.parametrize(("count", "text"), [(1, "1 module used"), (2, "2 modules used")])
def test_the_report_of_a_finished_adapter_counts_in_words(count: int, text: str) -> None:
    assert str(InjectionReport((("0", "0"),) * count, (), 0, 0)) == text


GATED_IN = {
    "lora": AdapterModule.lora(torch.randn(2, 6), torch.randn(16, 2), 4.0),
    "dora": AdapterModule(
        "dora", {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(16, 2), "magnitude": torch.rand(16) + 1}, 4.0
    ),
    "loha": AdapterModule(
        "loha",
        {f"hada_w{k}_{side}": torch.randn(*((16, 2) if side == "a" else (2, 6))) for k in (1, 2) for side in "ab"},
        1.0,
    ),
    "diff": AdapterModule("diff", {"diff": torch.randn(16, 6)}, 1.0),
    "ia3": AdapterModule("ia3", {"vector": torch.randn(16)}, 1.0, {"on_input": False}),
    "ia3 on inputs": AdapterModule("ia3", {"vector": torch.randn(6)}, 1.0, {"on_input": True}),
}


@pytest.mark.parametrize("kind", GATED_IN)
@pytest.mark.parametrize("name", ["mlp.weights_in", "mlp_weights_in"])
def test_an_adapter_of_a_layer_that_is_two_now_is_cut(kind: str, name: str) -> None:
    """transformers has made `gate_proj` and `up_proj` of the gated MLP's `weights_in`."""
    torch.manual_seed(0)
    older = nn.ModuleDict({"mlp": nn.ModuleDict({"weights_in": nn.Linear(6, 16)})})
    newer = nn.ModuleDict({"mlp": nn.ModuleDict({"gate_proj": nn.Linear(6, 8), "up_proj": nn.Linear(6, 8)})})
    whole, halves = older["mlp"]["weights_in"], newer["mlp"].values()
    for p in ("weight", "bias"):
        for half, values in zip(halves, getattr(whole, p).data.chunk(2), strict=True):
            getattr(half, p).data.copy_(values)
    shift = AdapterModule("shift", {"shift": torch.randn(16)}, 1.0)
    adapter = Adapter({f"net.{name}": GATED_IN[kind], "net.mlp.weights_in.bias": shift})
    attach(older, adapter, "net")
    handle = attach(newer, adapter, "net")
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.cat([half(x) for half in halves], -1), whole(x), rtol=1e-5, atol=1e-5)
    assert len(handle.report.hits) == 4


@pytest.mark.parametrize(("kind", "method"), [("lora", "lora"), ("dora", "dora"), ("ia3", "ia3")])
def test_an_adapter_of_a_layer_that_is_two_now_learns_on(kind: str, method: str) -> None:
    newer = nn.ModuleDict({"mlp": nn.ModuleDict({"gate_proj": nn.Linear(6, 8), "up_proj": nn.Linear(6, 8)})})
    x, modules = torch.randn(3, 6), {"mlp.weights_in": GATED_IN[kind]}
    attached = attach(newer, Adapter({"net.mlp.weights_in": GATED_IN[kind]}), "net")
    expected = [half(x) for half in newer["mlp"].values()]
    attached.eject()
    handle = inject(newer, AdapterConfig(method=method, rank=2, targets=("re:.*",)), start_from=modules)
    torch.testing.assert_close([half(x) for half in newer["mlp"].values()], expected)
    sum(half(x).square().sum() for half in newer["mlp"].values()).backward()
    assert handle.report.trained_parameters and all(p.grad is not None for p in handle.parameters())
    assert len({p.data_ptr() for p in handle.parameters()}) == len(handle.parameters()), "each half learns for itself"


def test_a_layer_that_cannot_be_cut_is_named() -> None:
    newer = nn.ModuleDict({"mlp": nn.ModuleDict({"gate_proj": nn.Linear(6, 8), "up_proj": nn.Linear(6, 8)})})
    by_columns = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(16, 2), "magnitude": torch.rand(6) + 1}
    adapter = Adapter({"net.mlp.weights_in": AdapterModule("dora", by_columns, 4.0, {"axis": "in"})})
    with pytest.raises(TargetError, match=r"layer net\.mlp\.weights_in, which ModuleDict has not"):
        attach(newer, adapter, "net")


@pytest.mark.parametrize(
    ("older", "newer"), [("mlp.weights_out", "mlp.down_proj"), ("attention.attention.query", "attention.q_proj")]
)
def test_renamed_layers_are_found_below_what_kept_its_name(older: str, newer: str) -> None:
    """They were not looked for where their parent is in the model, as if they were parts of it."""

    def with_layer(name: str) -> nn.Module:
        model = layer = nn.Module()
        for part in name.split(".")[:-1]:
            layer.add_module(part, nn.Module())
            layer = layer.get_submodule(part)
        layer.add_module(name.rpartition(".")[2], nn.Linear(6, 8))
        return model

    for given, own in ((older, newer), (newer, older)):
        handle = attach(with_layer(own), Adapter({f"net.{given}": factors(6, 8)}), "net")
        assert list(handle.methods) == [own]


def test_what_trained_before_trains_again_also_where_other_parameters_are_there_since() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    handle = inject(model, AdapterConfig(rank=2, targets=("0",)))
    model.load_state_dict(values, strict=False, assign=True)
    handle.eject()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "0.weight": True, "0.bias": True, "1.weight": False, "1.bias": False
    }  # fmt: skip
