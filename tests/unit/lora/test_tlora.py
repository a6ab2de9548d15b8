"""T-LoRA: the rank follows the timestep, in training, in a mix and in a file; what would lose that is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import visionlora as vl
from visionlora.errors import AdapterFileError, ConfigError, VisionLoRAError
from visionlora.lora.methods.tlora import TLoRA

RANK, LEAST, WIDTH = 6, 2, 8


class Denoiser(nn.Module):
    """Called as a UNet is: pictures, a timestep for all or for each."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.to_q = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.to_q(self.mid(sample).flatten(2).mT.contiguous())


def adapted(**options: object) -> tuple[Denoiser, vl.Handle]:
    torch.manual_seed(0)
    model = Denoiser()
    config = {"method": "tlora", "rank": RANK, "min_rank": LEAST, "targets": "mid,to_q", "init": "orthogonal"}
    handle = vl.inject(model, vl.AdapterConfig(**{**config, **options}))
    for m in handle.methods.values():
        m.lora_B.data.normal_()
    return model, handle


def by_hand(model: Denoiser, handle: vl.Handle, x: Tensor, timesteps: list[float]) -> Tensor:
    """The base with ΔW of the first r(t) components, picture by picture."""
    rows = []
    for picture, t in zip(x, timesteps, strict=True):
        rank = int((RANK - LEAST) * (1000 - t) / 1000) + LEAST
        plain = Denoiser()
        for name in ("mid", "to_q"):
            own, layer = handle.methods[name], plain.get_submodule(name)
            delta = own.lora_B[:, :rank].flatten(1) @ own.lora_A[:rank].flatten(1)
            layer.weight.data = model.get_submodule(name).weight + own.scale * own.scaling * delta.view_as(layer.weight)
            layer.bias.data = model.get_submodule(name).bias
        rows.append(plain(picture[None], torch.tensor(t)))
    return torch.cat(rows)


@given(st.integers(1, 64), st.data())
def test_the_rank_falls_with_the_noise(rank: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, rank))
    model = Denoiser()
    m = vl.inject(model, vl.AdapterConfig(method="tlora", rank=min(rank, WIDTH), targets="to_q")).methods["to_q"]
    assert isinstance(m, TLoRA)
    assert m.least == -(-m.rank // 2)
    m.least = min(least, m.rank)
    ranks = [m.rank_at(t) for t in range(1000)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == m.rank and ranks[999] == m.least == m.rank_at(5000.0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("timesteps", [[700.0] * 3, [0.0, 999.0, 400.0]])
def test_each_picture_has_the_components_of_its_timestep(timesteps: list[float], grad: bool) -> None:
    model, handle = adapted()
    x = torch.randn(3, 3, 4, 4)
    given = torch.tensor(timesteps) if len(set(timesteps)) > 1 else torch.tensor(timesteps[0])
    with torch.set_grad_enabled(grad):
        found = model(x, timestep=given)
    torch.testing.assert_close(found, by_hand(model, handle, x, timesteps), rtol=1e-4, atol=1e-5)


def test_components_that_do_not_act_get_no_gradient() -> None:
    model, handle = adapted()
    for timesteps, acting in ((torch.tensor([999, 999]), LEAST), (torch.tensor([999, 500]), 4)):
        model(torch.randn(2, 3, 4, 4), timesteps).square().sum().backward()
        for m in handle.methods.values():
            assert m.lora_A.grad[:acting].flatten(1).norm(dim=1).min() > 0 and not m.lora_A.grad[acting:].any()
            assert m.lora_B.grad[:, :acting].any() and not m.lora_B.grad[:, acting:].any()
            m.lora_A.grad = m.lora_B.grad = None


def test_starts_as_the_identity_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x, t = Denoiser(), torch.randn(2, 3, 4, 4), torch.tensor([3, 900])
    before = model(x, t)
    handle = vl.inject(model, vl.AdapterConfig(method="tlora", rank=4, targets="mid,to_q"))
    assert torch.equal(model(x, t), before)
    handle.methods["to_q"].lora_B.data.normal_()
    twin = copy.deepcopy(model)
    expected = twin(x, t)
    model(x, torch.tensor(5))
    assert torch.equal(twin(x, t), expected)
    handle.eject()
    assert torch.equal(model(x, t), before) and not model._forward_pre_hooks


def test_a_file_keeps_the_schedule_and_a_mix_follows_it(tmp_path: Path) -> None:
    model, handle = adapted()
    x, file = torch.randn(2, 3, 4, 4), tmp_path / "t.safetensors"
    handle.save(file, component="unet")
    expected = {t: by_hand(model, handle, x, [t, t]) for t in (950.0, 420.0, 10.0)}
    base = model(x, torch.tensor(10))
    handle.eject()
    base = model(x, torch.tensor(10))
    mix = vl.attach(model, {"t": file, "same": vl.load_adapter(file)}, scales={"t": 0.75, "same": 0.25})
    assert mix.running == "stacked"
    for t, wanted in expected.items():
        with torch.no_grad():
            torch.testing.assert_close(model(x, torch.tensor(t)), wanted, rtol=1e-4, atol=1e-4)
    mix.detach()
    assert torch.equal(model(x, torch.tensor(10)), base)
    assert set(vl.load_adapter(file).modules["unet.to_q"].options) == {"least", "timesteps"}


def test_what_would_lose_the_schedule_is_refused(tmp_path: Path) -> None:
    model, handle = adapted()
    adapter = handle.adapter("unet")
    with pytest.raises(ConfigError, match=r"follows the timestep \(T-LoRA\), so it cannot be merged"):
        handle.merge()
    assert not handle.merged
    with pytest.raises(ConfigError, match="mode 'merged' cannot have"):
        vl.attach(Denoiser(), {"t": adapter}, mode="merged")
    for act in (
        lambda: vl.merge_adapters([(adapter, 1.0)]),
        lambda: vl.resize_adapter(adapter, vl.Size(rank=2)),
        adapter.delta_weights,
        lambda: handle.methods["to_q"].delta_weight(model.to_q.weight),
    ):
        with pytest.raises(AdapterFileError, match="T-LoRA"):
            act()
    for spelling, name in (("kohya", "a.safetensors"), ("diffusers", "a.safetensors"), ("peft", "a")):
        with pytest.raises(VisionLoRAError, match=r"T-LoRA|tlora"):
            vl.save_adapter(adapter, tmp_path / name, format=spelling)
        assert not (tmp_path / name).exists()
    with pytest.raises(ConfigError, match="which Sequential is not given: it is for the UNets"):
        vl.inject(nn.Sequential(nn.Linear(4, 4)), vl.AdapterConfig(method="tlora", rank=2, targets="0"))
    with pytest.raises(ConfigError, match="min_rank is 9; it is for method 'tlora', and between 1 and the rank"):
        vl.AdapterConfig(method="tlora", rank=8, min_rank=9)
    model(torch.randn(2, 3, 4, 4), torch.tensor([1, 999]))
    for m in handle.methods.values():
        m.sample_scale = torch.ones(2)
    with torch.no_grad(), pytest.raises(ConfigError, match="do not go with T-LoRA at a timestep per picture"):
        model(torch.randn(2, 3, 4, 4), torch.tensor([1, 999]))


@pytest.mark.parametrize(
    ("option", "value"), [("least", "x"), ("least", 0), ("least", RANK + 1), ("timesteps", None), ("timesteps", 1e999)]
)
def test_a_file_with_a_schedule_that_cannot_be_is_refused(option: str, value: object, tmp_path: Path) -> None:
    _model, handle = adapted()
    adapter = handle.adapter("unet")
    broken = {n: replace(m, options={**m.options, option: value}) for n, m in adapter.modules.items()}
    vl.save_adapter(replace(adapter, modules=broken), tmp_path / "t.safetensors")
    with pytest.raises(AdapterFileError, match=r"its least rank is|its timesteps are"):
        vl.load_adapter(tmp_path / "t.safetensors")
