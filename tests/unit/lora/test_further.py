"""Learning on from a finished adapter: same outputs at the start, same parameters train, the original stays as it is."""

import copy

import pytest
import torch
from torch import nn

from visionlora.errors import ConfigError, TargetError
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.further import LEARNED_BY, further_config, method_for
from visionlora.lora.inject import inject

TARGETS = ("0", "2", "4")
METHODS = [m for methods in LEARNED_BY.values() for m in methods if m != "tlora"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 8), nn.GELU(), nn.Linear(8, 4))


def finished(method: str) -> tuple[dict[str, AdapterModule], torch.Tensor, torch.Tensor]:
    """The modules of a trained adapter with two ranks and scalings, an input, and what it gives."""
    model, x = network(), torch.randn(2, 3, 6, 6)
    config = AdapterConfig(method=method, rank=3, alpha=5, targets=TARGETS, rank_pattern={"2": 2}, projection_seed=4)
    handle = inject(model, config)
    for m in handle.methods.values():
        for p in m.parameters():
            p.data += 0.2 * torch.randn(p.shape)
    return handle.modules("model"), x, model(x).detach()


def own(modules: dict[str, AdapterModule]) -> dict[str, AdapterModule]:
    return {name.removeprefix("model."): m for name, m in modules.items()}


@pytest.mark.parametrize("method", METHODS)
def test_it_begins_where_the_adapter_ended(method: str) -> None:
    modules, x, expected = finished(method)
    modules = own(modules)
    before = copy.deepcopy(modules)
    config = further_config(AdapterConfig(method=method, rank=7, dropout=0.0), modules, {})
    model, fresh = network(), inject(network(), AdapterConfig(method=method, rank=3, targets=TARGETS))
    handle = inject(model, config, start_from=modules)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    names = [n for m in handle.methods.values() for n, p in m.named_parameters() if p.requires_grad]
    assert names == [n for m in fresh.methods.values() for n, p in m.named_parameters() if p.requires_grad]
    for name, m in handle.methods.items():
        if hasattr(m, "scaling"):
            assert config.scaling_of(name) == pytest.approx(m.scaling) and config.rank_of(name) == m.rank
    optimizer = torch.optim.SGD(handle.parameter_groups(0.1))
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), expected)
    for name, m in before.items():
        assert all(torch.equal(t, modules[name].tensors[n]) for n, t in m.tensors.items())
    handle.eject()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


def test_half_precision_learns_on_in_fp32() -> None:
    modules, x, expected = finished("lora")
    half = {n: AdapterModule.lora(*(t.half() for t in m.tensors.values()), m.alpha) for n, m in own(modules).items()}
    handle = inject(network(), further_config(AdapterConfig(), half, {}), start_from=half)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    torch.testing.assert_close(handle.model(x), expected, rtol=1e-2, atol=1e-2)


def test_the_header_tells_by_which_words_layers_were_found() -> None:
    modules = own(finished("lora")[0])
    assert further_config(AdapterConfig(), modules, {"config": {"targets": ["attn"]}}).target_list == ("attn",)
    assert further_config(AdapterConfig(), modules, {}).target_list == TARGETS


def test_the_default_method_gives_way_and_no_other() -> None:
    lora, dora = (own(finished(m)[0]) for m in ("lora", "dora"))
    assert method_for(dora, "lora", "x") == "dora" and method_for(lora, "lora+", "x") == "lora+"
    with pytest.raises(ConfigError, match="method is 'vera', but x can only learn on by dora"):
        method_for(dora, "vera", "x")
    with pytest.raises(ConfigError, match="it holds 3 of kind lora, 1 of kind diff, and all must be of one kind"):
        method_for({**lora, "3": AdapterModule("diff", {"diff": torch.zeros(2)}, 1.0)}, "lora", "x")
    over = {n: AdapterModule("dora", m.tensors, 1.0, {"product": "loha"}) for n, m in dora.items()}
    with pytest.raises(ConfigError, match="3 of kind dora on loha"):
        method_for(over, "lora", "x")
    full = {"0": AdapterModule("full", {"value": torch.zeros(2)}, 1.0)}
    with pytest.raises(ConfigError, match="trained in full is a base of its own: export or bake it"):
        method_for(full, "lora", "x")
    with pytest.raises(ConfigError, match=r"has a head alone, .*Leave start_from out"):
        method_for({}, "lora", "x")


def test_what_does_not_fit_is_refused_and_the_model_left_alone() -> None:
    modules = own(finished("lora")[0])
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(100, 8))
    with pytest.raises(TargetError, match="It was made for another base model"):
        inject(model, AdapterConfig(targets="0"), start_from=modules)
    with pytest.raises(ConfigError, match="Method 'dora' cannot go on with 0, which is of another kind"):
        inject(network(), AdapterConfig(method="dora", targets="0"), start_from=modules)
    assert all(type(m).__module__.startswith("torch") for m in model.modules())
