"""Files of every kind that LyCORIS writes load here with the ΔW of LyCORIS' own forward pass, layer by layer, in fp64.

Where `alpha/rank` is applied twice by LyCORIS' merge (LoHa, factored LoKr; seen in 3.x) the forward pass counts.
"""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl

lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Linear layers, 1x1 and 3x3 convolutions and norms, in a UNet's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv_shortcut = nn.Conv2d(16, 32, 1)
        self.conv1 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.proj_in, self.norm2, self.proj_out = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.conv_shortcut(self.norm(self.conv_in(x))))
        return self.proj_out(self.norm2(self.proj_in(x.flatten(2).mT)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

CASES = {
    "locon": {"algo": "lora"},
    "locon, Tucker": {"algo": "lora", "use_tucker": True},
    "rsLoRA": {"algo": "lora", "rs_lora": True},
    "scalar": {"algo": "lora", "use_scalar": True},
    "loha": {"algo": "loha"},
    "loha, Tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both factored": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "lokr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "lokr, full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "dora by rows": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora by columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "dora of loha": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "dora of lokr": {"algo": "lokr", "factor": 4, "dora_wd": True, "wd_on_output": True},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
    "ia3 on inputs": {"algo": "ia3", "train_on_input": True},
    "oft": {"algo": "diag-oft"},
    "oft, bounded and rescaled": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "boft": {"algo": "boft"},
}


def dtype_of(case: str) -> torch.dtype:
    """LyCORIS inverts matrices in fp32 alone."""
    return torch.float32 if "oft" in case else torch.float64


def written(case: str, folder: Path) -> tuple[nn.Module, Path]:
    """A model with LyCORIS' layers at work, and the file that LyCORIS saves of them."""
    options = {"linear_dim": 3, "conv_dim": 3, "linear_alpha": 5, "conv_alpha": 2, **CASES[case]}
    if "oft" in case:
        options["linear_dim"] = options["conv_dim"] = 4
    model, dtype = net().to(dtype_of(case)), dtype_of(case)
    lycoris.LycorisNetwork.apply_preset(
        {"target_module": ["Linear", "Conv2d", "GroupNorm", "LayerNorm"], "enable_conv": True}
    )
    network = lycoris.create_lycoris(model, 1.0, train_norm=case == "full", **options)
    network.apply_to()
    network.to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "dora_scale" in name:
                p *= 1 + 0.2 * torch.rand(p.shape, generator=generator, dtype=p.dtype)
            elif case == "full" and p.dim() > 1:
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            else:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    network.save_weights(str(folder / "a.safetensors"), dtype, {})
    return model, folder / "a.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_the_same_output(case: str, tmp_path: Path) -> None:
    theirs, path = written(case, tmp_path)
    adapter = vl.load_adapter(path)
    assert len(adapter.modules) >= 5
    ours, x = net().to(dtype_of(case)), X.to(dtype_of(case))
    with torch.no_grad():
        plain = ours(x)
    handle = vl.attach(ours, adapter, adapter.components[0] if len(adapter.components) == 1 else "")
    with torch.no_grad():
        expected = theirs(x)
        tolerance = 1e-6 if expected.dtype == torch.float64 else 1e-4
        assert (expected - plain).abs().max() > 1e-2, "the adapter must do something"
        torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)
        handle.merge()
        torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)
        handle.eject()
        assert torch.equal(ours(x), plain)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["visionlora", "kohya"])
def test_written_and_read_again_it_is_the_same(case: str, format: str, tmp_path: Path) -> None:
    _, path = written(case, tmp_path)
    tensors = {"lora_unet_" + n.removeprefix("lycoris_"): t.float() for n, t in load_file(path).items()}
    save_file(tensors, tmp_path / "unet.safetensors")
    first = vl.load_adapter(tmp_path / "unet.safetensors")
    assert first.components == ["unet"]
    vl.save_adapter(first, tmp_path / "b.safetensors", format)
    again = vl.load_adapter(tmp_path / "b.safetensors")
    assert first.modules.keys() == again.modules.keys()
    for name, old in first.modules.items():
        new = again.modules[name]
        if (
            old.kind == "lora" and format == "kohya" and old.alpha != new.alpha
        ):  # one alpha for the file, the rest in lora_up
            torch.testing.assert_close(new.delta_weight(), old.delta_weight(), rtol=1e-6, atol=1e-7)
            continue
        assert (old.kind, old.alpha, old.options) == (new.kind, new.alpha, new.options)
        assert old.tensors.keys() == new.tensors.keys()
        assert all(torch.equal(t, new.tensors[n]) for n, t in old.tensors.items()), name


def test_delta_of_a_loha_is_the_definition_and_not_the_doubly_scaled_merge(tmp_path: Path) -> None:
    _, path = written("loha", tmp_path)
    t = load_file(path)
    alpha, rank = float(t["lycoris_proj_in.alpha"]), len(t["lycoris_proj_in.hada_w1_b"])
    assert alpha / rank != 1
    one, two = (t[f"lycoris_proj_in.hada_{w}_a"] @ t[f"lycoris_proj_in.hada_{w}_b"] for w in ("w1", "w2"))
    adapter = vl.load_adapter(path)
    (name,) = (n for n in adapter.modules if n.endswith("proj_in"))
    torch.testing.assert_close(adapter.delta_weights()[name], (one * two * alpha / rank).float())


def test_a_full_lokr_has_no_scale_whatever_its_alpha_says(tmp_path: Path) -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
    for alpha in (1.0, math.inf, 9999999999.0):
        tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(alpha)}
        save_file({f"lora_unet_proj_in.{n}": copy.copy(t) for n, t in tensors.items()}, tmp_path / "a.safetensors")
        delta = vl.load_adapter(tmp_path / "a.safetensors").delta_weights()["unet.proj_in"]
        torch.testing.assert_close(delta, torch.kron(w1, w2))
