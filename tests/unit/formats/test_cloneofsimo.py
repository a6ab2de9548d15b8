"""Files that number their layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import visionlora as vl
from visionlora.formats.cloneofsimo import ORDERS, text_layers, unet_layers
from visionlora.lora.config import AdapterConfig
from visionlora.lora.targets import resolve

from .test_names import unet


def numbered(layers, component: str = "unet") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for k, (_, o, i) in enumerate(layers):
        tensors[f"{component}:{k}:up"] = torch.randn(o, 2, generator=generator)
        tensors[f"{component}:{k}:down"] = torch.randn(2, i, generator=generator)
    return tensors


def test_the_table_is_the_unet_of_stable_diffusion_1() -> None:
    names = {n for n, _, _ in unet_layers(ORDERS[0], feed_forward=True)}
    known = {s.name for s in resolve(unet("sd1"), AdapterConfig(targets="attn,mlp.in")).sites}
    assert names == known and len(names) == 144
    modules = dict(unet("sd1").named_modules())
    assert all(modules[n].weight.shape == (o, i) for n, o, i in unet_layers(ORDERS[0], feed_forward=True))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_layers_are_found_by_their_place(order: tuple[str, ...], tmp_path: Path) -> None:
    layers, text = list(unet_layers(order, True)), list(text_layers())
    tensors = numbered(layers) | numbered(text, "text_encoder") | {"<s1>": torch.randn(768)}
    save_file(tensors, tmp_path / "a.safetensors", {"unet": '["GEGLU", "CrossAttention"]', "<s1>": "<embed>"})
    adapter = vl.load_adapter(tmp_path / "a.safetensors")
    assert adapter.format == "cloneofsimo" and len(adapter.modules) == 144 + 48
    assert adapter.embeddings["<s1>"]["text_encoder"].shape == (1, 768)
    for k, (name, _, _) in enumerate(layers):
        module = adapter.modules[f"unet.{name}"]
        assert torch.equal(module.tensors["lora_A"], tensors[f"unet:{k}:down"]) and module.scaling == 1
    vl.save_adapter(adapter, tmp_path / "b.safetensors", "kohya")
    assert set(vl.load_adapter(tmp_path / "b.safetensors").modules) == set(adapter.modules)


def test_another_order_is_refused(tmp_path: Path) -> None:
    layers = list(unet_layers(ORDERS[0], True))
    layers[0], layers[4] = layers[4], layers[0]
    save_file(numbered(layers), tmp_path / "a.safetensors")
    with pytest.raises(vl.VisionLoRAError, match=r"has not the shapes of Stable Diffusion 1\.x in that order"):
        vl.load_adapter(tmp_path / "a.safetensors")


def test_a_training_that_diverged_is_refused(tmp_path: Path) -> None:
    tensors = numbered(unet_layers(ORDERS[0], True))
    tensors["unet:7:up"][3, 1] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(vl.VisionLoRAError, match=r"has NaN or infinite values in 'unet\.down_blocks\.0"):
        vl.load_adapter(tmp_path / "a.safetensors")
