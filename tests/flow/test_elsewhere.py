"""What runs on a CPU runs on another device too, and gives the same: no tensor stays behind. See `tests/elsewhere.py`."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from visionlora.pipelines import generate as drawing
from visionlora.pipelines.classify import classify
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora import classifier
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import METHODS

from .. import elsewhere

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not elsewhere.register(), reason="this torch cannot be told of a device in Python"),
]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Says whether runs are elsewhere or on the CPU."""
    from accelerate.state import AcceleratorState, PartialState

    def say(there: bool) -> None:
        place = elsewhere.DEVICE if there else torch.device("cpu")
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(place))
        for module in (drawing, classifier):
            monkeypatch.setattr(module, "usable_device", lambda word="auto": place)
        AcceleratorState._reset_state()
        PartialState._reset_state()

    yield say
    say(False)


@pytest.fixture
def unet(tiny_model: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")


def read(unet: nn.Module, place: torch.device) -> torch.Tensor:
    """What a UNet says of four noisy pictures."""
    dice = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(4, 4, 8, 8, generator=dice),
        torch.randn(4, 5, unet.config.cross_attention_dim, generator=dice),
    )
    return unet(x.to(place), torch.tensor(500).to(place), text.to(place)).sample


def learned(unet: nn.Module, method: str, seed: int) -> vl.Adapter:
    """An adapter that changes every layer of the attention a little."""
    model = copy.deepcopy(unet)
    handle = vl.inject(model, vl.AdapterConfig(method=method, rank=2, targets="attn"), seed=seed)
    dice = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=dice)
    return handle.adapter("unet")


def of_other_trainers(unet: nn.Module) -> vl.Adapter:
    """Of kinds that are read and not trained here, one after the other on the layers of the attention."""
    dice, modules = torch.Generator().manual_seed(7), {}

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=dice)

    layers = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in n]
    for i, (name, layer) in enumerate(layers):
        o, n = layer.weight.shape
        sides = {f"hada_w{k}_{s}": random(*((o, 2) if s == "a" else (2, n))) for k in (1, 2) for s in "ab"}
        modules[f"unet.{name}"] = (
            AdapterModule("loha", sides, 8.0),
            AdapterModule("lokr", {"lokr_w1": random(2, 2), "lokr_w2": random(o // 2, n // 2)}, 1.0),
            AdapterModule("oft", {"oft_blocks": random(2, o // 2, o // 2)}, 1.0, {"constraint": 0.5}),
        )[i % 3]
    return vl.Adapter(modules)


def check_same_elsewhere(unet: nn.Module, does: Callable[[nn.Module, torch.device], list[torch.Tensor]]) -> None:
    """What it gives on the CPU it gives elsewhere, with all that the model holds there."""
    found = []
    for place in (torch.device("cpu"), elsewhere.DEVICE):
        model = copy.deepcopy(unet).to(place)
        found.append([tensor.detach().cpu() for tensor in does(model, place)])
        left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type != place.type]
        assert not left
    assert len(found[0]) == len(found[1]) > 0
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    x = torch.ones(2, 3).to(elsewhere.DEVICE)
    assert x.device == elsewhere.DEVICE and (x * torch.tensor(2.0)).sum().item() == 12 and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="tensors elsewhere and on the CPU"):
        x + torch.ones(2, 3)
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear-probe"])
def test_methods_train(unet: nn.Module, method: str) -> None:
    def steps(model: nn.Module, place: torch.device) -> list[torch.Tensor]:
        handle = vl.inject(model, vl.AdapterConfig(method=method, rank=2, targets="all"), seed=1)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
        said = []
        for _ in range(2):
            said.append(read(model, place).square().mean())
            said[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*said, *(t for m in handle.adapter("unet").modules.values() for t in m.tensors.values())]

    check_same_elsewhere(unet, steps)


@pytest.mark.parametrize("mode", ["merged", "stacked", "batched"])
def test_mixes_in_every_mode(unet: nn.Module, mode: str) -> None:
    adapters = {method: learned(unet, method, seed) for seed, method in enumerate(("lora", "dora", "vera", "ia3"))}
    adapters["others"] = of_other_trainers(unet)

    @torch.no_grad()
    def mixed(model: nn.Module, place: torch.device) -> list[torch.Tensor]:
        mix = vl.attach(model, adapters, mode=mode)
        said = [read(model, place)]
        mix.set_scales({"lora": vl.Scale(0.5, blocks={"up": 1.2}), "dora": 0.3})
        said.append(read(model, place))
        if mode == "batched":
            mix.set_scales({"lora": vl.Scale(images=[1, 0.5, 0, 2])})
            said.append(read(model, place))
        mix.remove("ia3")
        mix.replace("vera", learned(unet, "lora", 9))
        said.append(read(model, place))
        mix.detach()
        return [*said, read(model, place)]

    check_same_elsewhere(unet, mixed)


@pytest.mark.parametrize(
    ("compose", "options"),
    [
        ("balanced", {}),
        ("orthogonal", {}),
        ("switch", {}),
        ("composite", {}),
        ("k-lora", {}),
        ("knots", {}),
        ("iso-c", {}),
        ("regional", {"regions": {"a": [0, 0, 0.5, 1], "b": [0.5, 0, 1, 1]}}),
    ],
)
def test_compositions(unet: nn.Module, compose: str, options: dict) -> None:
    adapters = {"a": learned(unet, "lora", 1), "b": learned(unet, "lora", 2)}

    @torch.no_grad()
    def mixed(model: nn.Module, place: torch.device) -> list[torch.Tensor]:
        mix = vl.attach(model, adapters, compose=compose, **options)
        said = [read(model, place)]
        mix.detach()
        return said

    check_same_elsewhere(unet, mixed)


def trained(images: Path, model: Path, output: Path, **settings: object) -> vl.Adapter:
    fixed = {"steps": 2, "rank": 2, "batch_size": 2, "sample_steps": 1, "sample_columns": 1, "prompt": "a dog"} | {
        "optimizer": "sgd", "learning_rate": 0.1,  # Adam makes as much of rounding as of a gradient
    }  # fmt: skip
    config = vl.TrainSDConfig(images=str(images), model=str(model), output=str(output), **{**fixed, **settings})
    return vl.load_adapter(train_sd(config).folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_snr_gamma": 5.0, "val_share": 0.4, "ema_decay": 0.9, "prior_prompt": "a dog"},
        {"train_text_encoder": True, "text_encoder_stop": 0.5, "gradient_checkpointing": True, "rank": "auto"},
        {"precision": "bf16", "base_precision": "bf16", "method": "dora"},
    ],
)
def test_a_run_of_train_sd(away, dogs: Path, tiny_model: Path, tmp_path: Path, settings: dict) -> None:
    found = []
    for there in (False, True):
        away(there)
        adapter = trained(dogs, tiny_model, tmp_path / str(there), **settings)
        found.append({(n, k): t for n, m in adapter.modules.items() for k, t in m.tensors.items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=1e-3 if "precision" in settings else 1e-5)


def test_a_run_of_classify_and_its_predictions(away, tmp_path: Path) -> None:
    for k, colour in enumerate(("red", "blue")):
        (tmp_path / "pets" / colour).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (64, 64), colour).rotate(0).resize((64 - i, 64)).save(
                tmp_path / "pets" / colour / f"{i}.png"
            )
            Image.effect_noise((64, 64), 20 + 9 * k).convert("RGB").save(tmp_path / "pets" / colour / f"n{i}.png")
    away(True)
    result = classify(
        vl.ClassifyConfig(
            images=str(tmp_path / "pets"), output=str(tmp_path / "run"), steps=2, batch_size=8, ema_decay=0.9, mixup=0.2,
            baselines=("probe", "full"),
        )
    )  # fmt: skip
    pictures = [Image.open(path) for path in sorted((tmp_path / "pets" / "red").glob("*.png"))[:4]]
    said = []
    for there in (True, False):
        away(there)
        both = vl.load_classifier({"a": result.adapter, "b": result.adapter})
        said.append(both.predict(pictures, tasks=["a", "b", "b", "a"]))
    for one, two in zip(*said, strict=True):
        assert one.labels == two.labels and one.probabilities == pytest.approx(two.probabilities, abs=1e-4)


def test_pictures_are_drawn(away, dogs: Path, tiny_model: Path, tmp_path: Path) -> None:
    trained(dogs, tiny_model, tmp_path / "run", sample_columns=0)
    one, two = tmp_path / "run" / "adapter.safetensors", tmp_path / "two.safetensors"
    shutil.copy(one, two)
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    started = {"init_image": dogs / "0.png", "mask": tmp_path / "mask.png"}
    for k, more in enumerate(({"compose": "orthogonal"}, {"negative_prompt": "b", **started}, {"guidance_scale": 5.0})):
        drawn = []
        for there in (False, True):
            away(there)
            config = vl.GenerateConfig(
                prompts=["a dog", "a (cat:1.2)"], loras=[f"{one}:0.5@up=1.2", str(two)], model=str(tiny_model), steps=2,
                batch_size=2, precision="fp32", output=tmp_path / f"{k}-{there}", **more,
            )  # fmt: skip
            drawing.generate(config)
            drawn.append(sorted(config.output.glob("*.png")))
        assert len(drawn[0]) == 2 and [p.name for p in drawn[0]] == [p.name for p in drawn[1]]
        for here, there_ in zip(*drawn, strict=True):
            difference = torch.tensor(list(Image.open(here).getdata())) - torch.tensor(
                list(Image.open(there_).getdata())
            )
            assert difference.abs().max() <= 2, "to rounding"
