"""Adapters trained here load in PEFT, and PEFT's load here, with the same output."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """A convolution, a fused projection and an MLP, in timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.attn, self.mlp = nn.Conv2d(3, 12, 3, padding=1), nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mlp.fc1, self.mlp.fc2, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).mT
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
