"""Adapter files: what diffusers makes of a file with an alpha per module, and how long reading, listing and merging take.

python benchmarks/formats.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import nn

from visionlora.formats.inspection import summarise
from visionlora.loaders import load_adapter, save_adapter
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import Size, merge_adapters
from visionlora.lora.config import AdapterConfig
from visionlora.lora.functional import stack_factors
from visionlora.lora.inject import attach
from visionlora.lora.targets import resolve

RUNS = 5
FILES, SDXL_LAYERS = 100, 722
WRONG = 0.01
"""Relative error of ΔW from which a module counts as wrong."""


def seconds(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Median wall time."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def small_sd15() -> nn.Module:
    """A UNet with the layers of Stable Diffusion 1.5, all of them, and a tenth of its width."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=768, attention_head_dim=8, norm_num_groups=8
    )
    return unet


def adapter_of(unet: nn.Module, ranks: Callable[[int], int], alpha: Callable[[int], float]) -> Adapter:
    """Random factors on every linear layer and projection of the transformers."""
    generator, modules = torch.Generator().manual_seed(0), {}
    for k, site in enumerate(resolve(unet, AdapterConfig(targets="attn,mlp,proj")).sites):
        o, *rest = site.weight.shape
        rank = ranks(k)
        down = torch.randn(rank, *rest, generator=generator)
        up = torch.randn(o, rank, *(1,) * (len(rest) - 1), generator=generator)
        modules[f"unet.{site.name}"] = AdapterModule.lora(down, up, alpha(rank))
    return Adapter(modules)


def wrong_modules(folder: Path) -> dict[str, int]:
    """A file as kohya's dynamic resize leaves it (ranks 2 to 16, alpha half the rank): modules off in each loader."""
    unet = small_sd15()
    adapter = adapter_of(unet, lambda k: 2 + (5 * k) % 15, lambda rank: rank / 2)
    save_adapter(adapter, folder / "dynamic.safetensors", "kohya")
    true = adapter.delta_weights()
    handle = attach(unet, load_adapter(folder / "dynamic.safetensors"))
    ours = {f"unet.{n}": m.delta_weight(m.site.weight) for n, m in handle.methods.items()}
    handle.eject()
    from diffusers import StableDiffusionPipeline

    state, alphas = StableDiffusionPipeline.lora_state_dict(
        folder, weight_name="dynamic.safetensors", unet_config=unet.config
    )
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    theirs = {
        f"unet.{n}": m.get_delta_weight(next(iter(m.scaling))).detach()
        for n, m in unet.named_modules()
        if hasattr(m, "get_delta_weight")
    }

    def off(found: dict[str, torch.Tensor]) -> int:
        return sum(
            n not in found or float((found[n].view_as(d) - d).norm() / d.norm()) > WRONG for n, d in true.items()
        )

    return {"modules": len(true), "visionlora": off(ours), "diffusers": off(theirs)}


def as_large_as_sdxl() -> Adapter:
    """As many layers as an adapter of SDXL's UNet has with kohya's defaults; how wide they are does not matter here."""
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    names = [
        f"unet.{side}_blocks.{b}.attentions.{a}.transformer_blocks.{t}.attn{k}.to_{n}"
        for side in ("down", "up") for b in range(4) for a in range(3) for t in range(10) for k in (1, 2) for n in "qkv"
    ]  # fmt: skip
    return Adapter({n: AdapterModule.lora(down.clone(), up.clone(), 4.0) for n in names[:SDXL_LAYERS]})


def main() -> None:
    """Measures and records."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found: dict[str, Any] = {"dynamic": wrong_modules(folder)}
        print(found)
        save_adapter(as_large_as_sdxl(), folder / "one.safetensors", "kohya")
        many = folder / "many"
        many.mkdir()
        for k in range(FILES):
            os.link(folder / "one.safetensors", many / f"{k}.safetensors")
        paths = sorted(many.iterdir())
        found["listing"] = {
            "files": FILES,
            "tensors": 3 * SDXL_LAYERS,
            "s": seconds(lambda: [*map(summarise, paths)]),
        }
        generator = torch.Generator().manual_seed(0)
        pairs = [
            (torch.randn(16, 1280, generator=generator), torch.randn(1280, 16, generator=generator), 0.5)
            for _ in range(4)
        ]
        layer = [Adapter({"unet.a": AdapterModule.lora(a, b, 16.0)}) for a, b, _ in pairs]
        stacked = stack_factors(pairs)
        found["merge_1280"] = {
            "adapters": len(pairs),
            "rank": 16,
            "exact_s": seconds(lambda: merge_adapters([(a, 0.5) for a in layer])),
            "to_rank_16_s": seconds(lambda: merge_adapters([(a, 0.5) for a in layer], size=Size(rank=16))),
            "dense_svd_s": seconds(lambda: torch.linalg.svd(stacked[1] @ stacked[0], full_matrices=False), 1),
        }
        print(record("formats", found).read_text())


if __name__ == "__main__":
    main()
