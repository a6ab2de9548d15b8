"""Files of other trainers on a model: found, fitted, refused in words."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.loaders import apply, check_family
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import open_base


def random_module(weight: torch.Tensor, seed: int, rank: int = 2) -> AdapterModule:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
    up = torch.randn(len(weight), rank, *(1,) * (weight.dim() - 2), generator=generator) * 0.2
    return AdapterModule.lora(down, up, 3.0)


@pytest.fixture
def foreign(tiny_model: Path, tmp_path: Path) -> Path:
    """A kohya file with every layer of the UNet, of several kinds."""
    unet = open_base(str(tiny_model)).pipe.unet
    modules: dict[str, AdapterModule] = {}
    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for k, (name, layer) in enumerate(layers):
        module = random_module(layer.weight, k)
        if k % 4 == 1:
            module = AdapterModule("diff", {"diff": torch.randn_like(layer.weight) * 0.01}, 1.0)
        if k % 4 == 2:
            module = AdapterModule("dora", {**module.tensors, "magnitude": torch.rand(len(layer.weight)) + 1}, 3.0)
        modules[f"unet.{name}"] = module
    modules["unet.conv_norm_out.weight"] = AdapterModule("shift", {"shift": torch.full((16,), 0.1)}, 1.0)
    vl.save_adapter(Adapter(modules), tmp_path / "a.safetensors", "kohya")
    return tmp_path / "a.safetensors"


@torch.no_grad()
def run(unet: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return unet(x, torch.tensor([3, 500]), text).sample


@pytest.mark.filterwarnings("ignore")
def test_on_a_unet_it_is_the_base_plus_the_change(foreign: Path, tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    unet = base.pipe.unet
    plain, adapter = run(unet), vl.load_adapter(foreign)
    expected = copy.deepcopy(unet)
    deltas = adapter.delta_weights(nn.ModuleDict({"unet": unet}))
    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            path = name.removeprefix("unet.")
            parameters[path if path in parameters else path + ".weight"] += delta
    (handle,) = apply(base, adapter)
    torch.testing.assert_close(run(unet), run(expected), rtol=1e-4, atol=2e-5)
    handle.merge()
    torch.testing.assert_close(run(unet), run(expected), rtol=1e-4, atol=2e-5)
    handle.set_scale(0.0)
    assert torch.equal(run(unet), plain)
    handle.eject()
    assert torch.equal(run(unet), plain)


def test_a_dora_measures_the_base_and_not_what_is_merged_into_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    x = torch.randn(3, 6)
    one = Adapter({"model.0": random_module(model[0].weight, 0)})
    dora = AdapterModule("dora", {**random_module(model[0].weight, 1).tensors, "magnitude": torch.rand(8) + 1}, 2.0)
    two = Adapter({"model.0": dora})
    vl.attach(model, one, name="one")
    vl.attach(model, two, name="two")
    with torch.no_grad():
        expected = model(x)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    vl.attach(model, one, name="one").merge()
    second = vl.attach(model, two, name="two")
    second.merge()
    for scale in (0.5, 1.0, 0.25, 1.0):
        second.set_scale(scale)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_linear_file_fits_a_1x1_convolution_and_the_other_way_round() -> None:
    linear, conv = nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Conv2d(6, 8, 1))
    for source, target in ((linear, conv), (conv, linear)):
        module = random_module(source[0].weight, 0)
        adapter = Adapter({"model.0": module})
        handle = vl.attach(target, adapter)
        found = handle.adapter().delta_weights()["model.0"]
        torch.testing.assert_close(found.flatten(1), module.delta_weight().flatten(1))
        assert adapter.delta_weights(target)["model.0"].shape == target[0].weight.shape


def test_what_does_not_fit_is_listed_and_can_be_left_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Linear(8, 2)})
    good = random_module(model["body"].weight, 0)
    adapter = Adapter({"model.body": good, "model.haed": good, "model.head": good})
    with pytest.raises(vl.VisionLoRAError) as caught:
        vl.attach(model, adapter)
    text = str(caught.value)
    assert "has a layer model.haed, which ModuleDict has not. Did you mean 'head'?" in text
    assert "So it is with 2 of its 3 modules (head)." in text and "--allow-partial" in text
    handle = vl.attach(model, adapter, allow_partial=True)
    assert list(handle.methods) == ["body"]
    assert [n for n, _ in handle.report.skipped] == ["haed", "head"]
    assert "has shape (8, 6), the base weight (2, 8)" in handle.report.skipped[1][1]


def test_nothing_that_fits_is_an_error_even_in_part() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 8)})
    with pytest.raises(vl.VisionLoRAError, match="It was made for another base model"):
        vl.attach(model, Adapter({"model.a": random_module(model["body"].weight, 0)}), allow_partial=True)


WIDTHS = {"Stable Diffusion 1.x": 768, "Stable Diffusion 2.x": 1024, "Stable Diffusion XL": 2048}


@pytest.mark.parametrize("given", WIDTHS)
@pytest.mark.parametrize("base", WIDTHS)
def test_families_are_told_by_name(given: str, base: str) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = Adapter({name: AdapterModule.lora(torch.ones(1, WIDTHS[given]), torch.ones(1280, 1), 1.0)})
    config = SimpleNamespace(unet=SimpleNamespace(config={"cross_attention_dim": WIDTHS[base]}))
    opened = SimpleNamespace(id="some/model", pipe=config)
    if given == base:
        check_family(adapter, opened)
        return
    with pytest.raises(vl.VisionLoRAError) as caught:
        check_family(adapter, opened)
    assert str(caught.value).startswith(f"This is an adapter for {given} (its cross-attention reads")
    assert f"some/model is {base} ({WIDTHS[base]} wide)" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_tokens_of_an_adapter_are_known_to_the_pipeline(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    vectors = torch.randn(2, 16)
    adapter = Adapter(
        {"unet.conv_in": random_module(base.pipe.unet.conv_in.weight, 0)}, {}, {"<dog>": {"text_encoder": vectors}}
    )
    apply(base, adapter)
    ids = base.pipe.tokenizer.convert_tokens_to_ids(["<dog>", "<dog>_1"])
    torch.testing.assert_close(base.pipe.text_encoder.get_input_embeddings().weight[ids].data, vectors)
    with pytest.raises(vl.VisionLoRAError, match="The token '<dog>' cannot be added"):
        apply(base, adapter, "again")
    wide = Adapter(adapter.modules, {}, {"<cat>": {"text_encoder": torch.randn(1, 768)}})
    with pytest.raises(
        vl.VisionLoRAError,
        match=r"The vectors of '<cat>' are 768 wide, this text encoder's 16: they were made for",
    ):
        apply(base, wide, "wide")
