"""Adapters trained here load in PEFT, and PEFT's load here, with the same output."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Two convolutions, a fused projection and an MLP, in timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.attn, self.mlp = nn.Conv2d(3, 12, 3, padding=1), nn.Module(), nn.Module()
        self.square = nn.Conv2d(12, 12, 1)
        self.attn.qkv, self.attn.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp.fc1, self.mlp.fc2, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.square(self.conv1(x)).flatten(2).mT
        q, k, v = self.attn.qkv(x).chunk(3, dim=-1)
        x = x + self.attn.proj(torch.softmax(q @ k.mT, -1) @ v)
        return self.head((x + self.mlp.fc2(torch.relu(self.mlp.fc1(x)))).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)


OURS = {
    "lora, fused q and v": vl.AdapterConfig(rank=3, alpha=5.0, targets="attn.qv,mlp"),
    "rslora, mixed ranks": vl.AdapterConfig(
        method="rslora", rank=3, targets="attn.out,mlp,conv", rank_pattern={"fc1": 2}
    ),
    "dora": vl.AdapterConfig(method="dora", rank=3, alpha=5.0, targets="attn.out,mlp,conv"),
    "ia3": vl.AdapterConfig(method="ia3", targets="attn.out,mlp"),
    "ia3 on convolutions": vl.AdapterConfig(method="ia3", targets="conv,mlp"),
    "with a head": vl.AdapterConfig(rank=2, targets="mlp", train="head"),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft(name: str, tmp_path: Path) -> None:
    model = net()
    handle = vl.inject(model, OURS[name])
    shake(model)
    vl.save_adapter(handle.adapter(), tmp_path / "a", format="peft")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a")
    with torch.no_grad():
        assert (model(X) - net()(X)).abs().max() > 1e-2
        torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)
    back = net()
    vl.attach(back, vl.load_adapter(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(back(X), model(X), rtol=1e-4, atol=1e-5)


THEIRS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1", "qkv", "conv1"]),
    "patterns": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1", "fc2", "attn.proj"],
                                        rank_pattern={"fc1": 2}, alpha_pattern={"mlp.fc2": 7}),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["fc1"]),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["fc1", "conv1"]),
    "ia3": lambda: peft.IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]),
    "head": lambda: peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"]),
    "bias": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1"], lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, total_step=9, target_modules=["fc1", "qkv"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["fc1", "fc2"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["fc1", "conv1"]),
    "loha, tucker": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=["fc1", "conv1"]),
    "lokr, full": lambda: peft.LoKrConfig(r=50, alpha=5, target_modules=["fc1"]),
    "ia3, convolution by rows": lambda: peft.IA3Config(target_modules=["square", "fc1"], feedforward_modules=["fc1"]),
    "ia3, convolution by columns": lambda: peft.IA3Config(target_modules=["square", "fc2"], feedforward_modules=["square"]),
    "a module by the end of its path": lambda: peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["mlp.fc2"]),
    "biases, all": lambda: peft.LoraConfig(r=2, target_modules=["fc1"], bias="all"),
    "biases, its own": lambda: peft.LoraConfig(r=2, target_modules=["fc1"], bias="lora_only"),
    "biases of vera": lambda: peft.VeraConfig(r=2, target_modules=["fc1"], bias="vera_only"),
    "ia3, by a pattern": lambda: peft.IA3Config(target_modules=["square", "proj"], feedforward_modules=r".*\.square|square"),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_pefts_here(name: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(net(), THEIRS[name]()).eval()
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    model = net()
    vl.attach(model, vl.load_adapter(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), wrapped(X), rtol=1e-4, atol=1e-5)


class Stem(nn.Module):
    """A name that others end with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1 = nn.Conv2d(3, 8, 3, padding=1), nn.Module()
        self.layer1.conv1, self.layer1.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1.conv2(torch.relu(self.layer1.conv1(torch.relu(self.conv1(x)))))


@pytest.mark.parametrize("rank", [2, 3])
def test_patterns_for_a_name_that_others_end_with(rank: int, tmp_path: Path) -> None:
    def stem() -> nn.Module:
        torch.manual_seed(0)
        return Stem()

    generator = torch.Generator().manual_seed(1)
    modules = {}
    for name, alpha in {"conv1": 8.0, "layer1.conv1": 2.0, "layer1.conv2": 2.0}.items():
        weight, r = stem().get_submodule(name).weight, rank if name == "conv1" else 2
        down, up = (torch.randn(s, generator=generator) * 0.3 for s in ((r, *weight.shape[1:]), (8, r, 1, 1)))
        modules[f"model.{name}"] = AdapterModule.lora(down, up, alpha)
    model = stem()
    vl.attach(model, Adapter(modules))
    vl.save_adapter(Adapter(modules), tmp_path / "a", "peft")
    theirs, back = peft.PeftModel.from_pretrained(stem(), tmp_path / "a"), stem()
    vl.attach(back, vl.load_adapter(tmp_path / "a"))
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back(X), model(X), rtol=1e-4, atol=1e-5)


def test_parts_of_a_fused_layer_beside_the_whole(tmp_path: Path) -> None:
    """As merging an adapter of ours with one of PEFT's gives."""
    generator = torch.Generator().manual_seed(1)
    modules = {
        f"model.attn.qkv{part}": AdapterModule.lora(
            torch.randn(2, 12, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3, alpha
        )
        for part, rows, alpha in ((".q", 12, 3.0), ("", 36, 5.0), (".v", 12, 2.0))
    }
    vl.save_adapter(Adapter(modules), tmp_path / "a", "peft")
    model = net()
    vl.attach(model, Adapter(modules))
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a")
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Layers of its own for q and v, as in timm's PVT and CaiT, and torch's packed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.packed = nn.ModuleDict({n: nn.Linear(3, 3) for n in "qv"}), nn.MultiheadAttention(3, 1)
        self.grouped, self.dilated = nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        self.token = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dilated(self.grouped(x)).flatten(2).mT + self.token
        return self.packed(*[self.attn["q"](x) + self.attn["v"](x)] * 3)[0]


def test_layers_called_q_and_v_are_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention()
    theirs = copy.deepcopy(model)
    handle = vl.inject(model, vl.AdapterConfig(rank=2, targets=r"re:attn\.[qv]"))
    shake(model)
    vl.save_adapter(handle.adapter(), tmp_path / "a", "peft")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    torch.testing.assert_close(wrapped(X), model(X), rtol=1e-4, atol=1e-5)


ODD = {
    "a weight used by its parent": (
        vl.AdapterConfig(rank=1, targets="packed.out_proj"), r"of packed\.out_proj .* its parent uses its weight",
    ),
    "packed attention": (vl.AdapterConfig(rank=1, targets="packed.q"), "is a part of torch's packed attention"),
    "groups": (vl.AdapterConfig(rank=1, targets="grouped"), "it is a convolution in groups"),
    "dilated": (vl.AdapterConfig(method="dora", rank=1, targets="dilated"), "it is a convolution that is dilated or pads"),
    "a parameter of the model": (
        vl.AdapterConfig(rank=1, targets=r"re:attn\.q", train="token"), "saves whole modules, .* the parameter token alone",
    ),
    "a bias alone": (
        vl.AdapterConfig(rank=1, targets=r"re:attn\.q", train="attn.v.bias"), r"the parameter attn\.v\.bias alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_peft_would_take_for_something_else(name: str, tmp_path: Path) -> None:
    config, words = ODD[name]
    adapter = vl.inject(Attention(), config).adapter()
    vl.save_adapter(adapter, tmp_path / "a.safetensors")
    kept = [vl.load_adapter(tmp_path / "a.safetensors")]
    if config.method == "lora" and not config.train_list:
        kept.append(vl.merge_adapters([(kept[0], 0.5)]).adapter)
    for one in kept:
        with pytest.raises(vl.VisionLoRAError, match=words):
            vl.save_adapter(one, tmp_path / "b", format="peft")
    assert not (tmp_path / "b").exists()


def test_pefts_lora_on_packed_attention_is_named(tmp_path: Path) -> None:
    peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["packed"])).save_pretrained(tmp_path / "a")
    with pytest.raises(vl.VisionLoRAError, match="adapts 'packed', torch's packed attention"):
        vl.load_adapter(tmp_path / "a")


@pytest.mark.parametrize("zero", [True, False])
def test_pefts_lora_on_a_layer_that_is_not_called(zero: bool, tmp_path: Path) -> None:
    """torch's attention reads the weight of `out_proj`: PEFT learns nothing there, and other factors act once it merges."""
    torch.manual_seed(0)
    model = Attention().eval().requires_grad_(False)  # frozen alike, both take the same path through torch
    lora = peft.LoraConfig(r=2, target_modules=["packed.out_proj"], init_lora_weights=zero)
    theirs = peft.get_peft_model(copy.deepcopy(model), lora)
    assert not theirs(X).requires_grad, "there is nothing to learn"
    theirs.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(theirs(X), model(X), rtol=0, atol=0)
    report = vl.attach(model, vl.load_adapter(tmp_path / "a")).report
    if zero:
        assert report.zero == ("packed.out_proj",) and not report.passed_by
    else:
        assert report.passed_by == ("packed.out_proj",)
        assert str(report) == "1 module used; PEFT has no effect on 1 of them (packed.out_proj) before it merges"
    torch.testing.assert_close(theirs.merge_and_unload()(X), model(X), rtol=1e-4, atol=1e-5)


def test_pefts_lora_on_a_convolution_in_groups_is_named(tmp_path: Path) -> None:
    peft.get_peft_model(Attention(), peft.LoraConfig(r=3, target_modules=["grouped"])).save_pretrained(tmp_path / "a")
    with pytest.raises(vl.VisionLoRAError, match="adapts 'grouped', a convolution in groups"):
        vl.load_adapter(tmp_path / "a")


@pytest.mark.parametrize(("entry", "title"), [("use_bdlora", "BD-LoRA"), ("kasa_config", "KaSA")])
def test_other_kinds_of_lora_are_named(entry: str, title: str, tmp_path: Path) -> None:
    peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, entry: {"nblocks": 2}}))
    with pytest.raises(vl.VisionLoRAError, match=f"holds PEFT's {title}, which visionlora does not read"):
        vl.load_adapter(tmp_path / "a")


def test_ia3_on_the_input_of_one_layer_alone_whose_name_another_ends_with(tmp_path: Path) -> None:
    vectors = {"conv1": (3, True), "layer1.conv1": (8, False)}
    modules = {
        f"model.{name}": AdapterModule(
            "ia3", {"vector": torch.linspace(0.5, 2, n)}, 1.0, {"on_input": side, "bias": True, "spatial": 2}
        )
        for name, (n, side) in vectors.items()
    }
    torch.manual_seed(0)
    model = Stem()
    vl.save_adapter(Adapter(modules), tmp_path / "a", "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    vl.attach(model, vl.load_adapter(tmp_path / "a"))
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [5, 0])
def test_an_adalora_that_was_pruned(alpha: int, tmp_path: Path) -> None:
    """PEFT saves the rows that are left, and divides by the rank at the start all the same."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=alpha, total_step=9, target_modules=["fc1", "fc2", "qkv"]
    )
    wrapped = peft.get_peft_model(net(), config).eval()
    shake(wrapped)
    kept = {"fc1": [True, False, True, False, False, False], "fc2": [False] * 6, "qkv": [True] * 5 + [False]}
    names = [n for n, _ in wrapped.base_model.model.named_parameters() if n.endswith("lora_E.default")]
    pattern = {n: kept[n.split(".")[-3]] for n in names}
    wrapped.peft_config["default"].rank_pattern = pattern
    for n, p in wrapped.named_parameters():
        for name, rows in kept.items():
            if f"{name}.lora_E" in n:
                p.data[~torch.tensor(rows)] = 0
    wrapped.save_pretrained(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    model = net()
    vl.attach(model, vl.load_adapter(tmp_path / "a"))
    with torch.no_grad():
        assert (theirs(X) - net()(X)).abs().max() > 1e-3
        torch.testing.assert_close(model(X), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["visionlora", "kohya", "diffusers"])
def test_an_adalora_on_convolutions_as_a_file_for_diffusers(format: str, tiny_model: Path, tmp_path: Path) -> None:
    """PEFT keeps inputs and kernel in one there; the names of a UNet tell the kernel."""
    from diffusers import StableDiffusionPipeline

    layers = ["to_q", "to_k", "conv1", "conv_shortcut", "conv_out", "downsamplers.0.conv"]
    unet = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None).unet
    config = peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=layers)
    wrapped = peft.get_peft_model(unet, config).eval()
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    x = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 16)
    vl.save_adapter(vl.load_adapter(tmp_path / "a"), tmp_path / "a.safetensors", format)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    with torch.no_grad():
        expected, plain = wrapped(*x).sample, pipe.unet(*x).sample
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
        torch.testing.assert_close(pipe.unet(*x).sample, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2


def test_an_adalora_on_convolutions_of_other_models(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(
        net(), peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=["conv1", "fc1"])
    ).eval()
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    adapter = vl.load_adapter(tmp_path / "a")
    vl.save_adapter(adapter, tmp_path / "own.safetensors")
    merged = vl.merge_adapters([tmp_path / "own.safetensors"]).adapter
    for given in (adapter, vl.load_adapter(tmp_path / "own.safetensors"), merged):
        with pytest.raises(
            vl.VisionLoRAError, match=r"adapter of conv1 .* tell the kernel\. visionlora's own format keeps"
        ):
            vl.save_adapter(given, tmp_path / "b", "peft")
    model = net()
    vl.attach(model, merged)
    with torch.no_grad():
        torch.testing.assert_close(model(X), wrapped(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("context", "shape"), [(768, (3, 8, 1, 1)), (1024, (3, 8)), (40, (3, 8))])
def test_an_adalora_on_projections_of_known_families(context: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Convolutions in Stable Diffusion 1.x, linear layers in 2.x."""

    def pair(layer: str, width: int) -> dict[str, torch.Tensor]:
        start = f"base_model.model.mid_block.attentions.0.{layer}.lora_"
        return {start + "A": torch.ones(3, width), start + "B": torch.ones(8, 3), start + "E": torch.ones(3, 1)}

    tensors = pair("proj_in", 8) | pair("transformer_blocks.0.attn2.to_k", context)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "ADALORA", "lora_alpha": 3, "auto_mapping": {"base_model_class": "UNet2DConditionModel"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    modules = vl.load_adapter(tmp_path).modules
    assert modules["unet.mid_block.attentions.0.proj_in"].shape() == (8, *shape[1:])
    assert modules["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].shape() == (8, context)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_changes_the_base_when_peft_loads_it(init: str, tmp_path: Path) -> None:
    """PEFT takes the first B·A off the weights then: on the base as it is, the file would do something else."""
    wrapped = peft.get_peft_model(net(), peft.LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=init))
    start = tmp_path / "start"
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(start)
    wrapped.peft_config["default"].init_lora_weights = init
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(
        vl.VisionLoRAError, match=f"was started by '{init}', .* path_initial_model_for_weight_conversion"
    ):
        vl.load_adapter(tmp_path / "a")
    wrapped.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=str(start))
    model = net()
    vl.attach(model, vl.load_adapter(tmp_path / "b"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), wrapped.eval()(X), rtol=1e-3, atol=1e-4)


def test_its_weights_file_is_read_with_what_lies_beside_it(tmp_path: Path) -> None:
    """The scale is in the other file alone."""
    wrapped = peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=32, target_modules=["fc1"])).eval()
    shake(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    (found,) = vl.load_adapter(file).modules.values()
    assert found.scaling == 8
    file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(vl.VisionLoRAError, match=r"its scale is in adapter_config\.json alone"):
        vl.load_adapter(tmp_path / "alone.safetensors")


def test_refusals(tmp_path: Path) -> None:
    vera = vl.inject(net(), vl.AdapterConfig(method="vera", rank=4, targets="mlp")).adapter()
    with pytest.raises(vl.VisionLoRAError, match="holds one of lora, dora and ia3; this adapter holds vera"):
        vl.save_adapter(vera, tmp_path / "a", format="peft")
    with pytest.raises(vl.VisionLoRAError, match=r"There is no adapter format 'pefft'. Did you mean 'peft'\?"):
        vl.save_adapter(vera, tmp_path / "a", format="pefft")
    packed = nn.ModuleDict({"self_attention": nn.MultiheadAttention(8, 2)})
    handle = vl.inject(packed, vl.AdapterConfig(rank=2, targets="attn.q"))
    with pytest.raises(
        vl.VisionLoRAError, match="is a part of torch's packed attention, which PEFT has no way to hold"
    ):
        vl.save_adapter(handle.adapter(), tmp_path / "a", format="peft")
    wrapped = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fc1"]))
    wrapped.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(vl.VisionLoRAError, match=r"has no adapter_model\.safetensors: copy the whole folder"):
        vl.load_adapter(tmp_path / "b")
    peft.get_peft_model(net(), peft.OFTConfig(target_modules=["fc1"], oft_block_size=4)).save_pretrained(tmp_path / "c")
    with pytest.raises(vl.VisionLoRAError, match="holds PEFT's OFT; LORA, ADALORA, LOHA, LOKR, VERA, IA3 are read"):
        vl.load_adapter(tmp_path / "c")
