"""The writer of kohya's files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import visionlora as vl
from visionlora.lora.adapter import Adapter, AdapterModule

START = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"


def written(alphas: list[float], dtype: torch.dtype, path: Path, size: float = 1.0) -> dict[str, torch.Tensor]:
    """The tensors of a file of a LoRA with these alphas, by `q.alpha`, `q.lora_up.weight` …; ups are of this size."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"unet.{START}{part}": AdapterModule.lora(
            torch.randn(2, 4, generator=generator).to(dtype),
            (torch.randn(4, 2, generator=generator) * size).to(dtype),
            alpha,
        )
        for part, alpha in zip("qkv", alphas, strict=False)
    }
    vl.save_adapter(Adapter(modules), path / "a.safetensors", "kohya")
    return {k.partition("_to_")[2]: t for k, t in load_file(path / "a.safetensors").items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_alpha_and_the_rest_in_the_factor(dtype: torch.dtype, tmp_path: Path) -> None:
    same, found = written([4.0, 4.0, 4.0], dtype, tmp_path), written([4.0, 4.0, 1.0], dtype, tmp_path)
    assert {float(found[f"{p}.alpha"]) for p in "qkv"} == {4.0}
    assert torch.equal(found["v.lora_up.weight"], same["v.lora_up.weight"] / 4)  # exact, so in its dtype
    rest = same.keys() - {"v.lora_up.weight"}
    assert all(torch.equal(found[k], same[k]) for k in rest)
    third = written([4.0, 4.0, 3.0], dtype, tmp_path)["v.lora_up.weight"]
    assert third.dtype == torch.float32
    torch.testing.assert_close(third, same["v.lora_up.weight"].float() * 0.75, rtol=1e-7, atol=0)


def test_layers_of_alpha_zero_have_the_alpha_of_the_others(tmp_path: Path) -> None:
    found = written([0.0, 0.0, 4.0], torch.float32, tmp_path)
    assert {float(found[f"{p}.alpha"]) for p in "qkv"} == {4.0}
    assert not found["q.lora_up.weight"].any() and found["v.lora_up.weight"].all()
    none = written([0.0] * 3, torch.float32, tmp_path)
    assert {float(none[f"{p}.alpha"]) for p in "qkv"} == {2.0} and not any(
        none[f"{p}.lora_up.weight"].any() for p in "qkv"
    )


def test_what_would_not_be_finite_keeps_its_alpha(tmp_path: Path) -> None:
    found = written([1.0, 1.0, 1e9], torch.float32, tmp_path, size=1e35)
    assert [float(found[f"{p}.alpha"]) for p in "qkv"] == [1.0, 1.0, 1e9]
    half = written([1.0, 1.0, 64.0], torch.float16, tmp_path, size=1e4)
    assert float(half["v.alpha"]) == 1.0 and half["v.lora_up.weight"].dtype == torch.float32
