"""Several adapters at once: cost per step and per change of scales, what composing does to styles, and predicted interference.

python benchmarks/mixing.py                    everything (about half an hour on two cores)
python benchmarks/mixing.py speed-fp32 quality some of it

speed-fp32, speed-bf16   the UNet of Stable Diffusion 1.5 (random weights), 32x32 latents, rank 8 on q, k, v, out
beside-fp32, beside-bf16 eight adapters on that UNet: merged, stacked, and in diffusers; eight pictures, one adapter each
load                     the first ten files onto such a UNet, and the last ten of a hundred
scales                   eight adapters merged at new scales, beside diffusers' set_adapters and fuse_lora
quality                  two and three styles on concepts that no style adapter has seen, by composition
orthogonal               styles trained with `init: orthogonal`, so that they do not meet, beside ones trained as usual
interference             predicted by `visionlora overlap`, against what the embedded model does, block by block
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core import ATTENTION, RANK, call, inputs_of_unet, sharing, take_turns, unet_of_sd15
from judge import features, nearest, predict, shares, train_classifier
from peft import LoraConfig
from PIL import Image
from record import run_parts
from style_transfer import ASSETS, LEARNED
from torch import Tensor, nn
from visionlora.assets.build_emoji64 import base_set, read_split, to_tensor
from visionlora.pipelines.train_sd import train_sd

from visionlora.config import TrainSDConfig, build, read_yaml
from visionlora.diffusion.encode import encode_text
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.formats.inspection import block_of
from visionlora.loaders import load_adapter, save_adapter
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.overlap import overlap
from visionlora.lora.targets import resolve
from visionlora.mixing.entry import attach
from visionlora.mixing.scales import Scale
from visionlora.models.base import open_base
from visionlora.report.grid import draw_grid

SHORT = 300
"""Steps of the trainings that compare inits."""
PICTURES = 60
"""Held-out concepts drawn for each composition."""
COMPOSITIONS: dict[str, tuple[str, dict[str, Any], float]] = {
    "sum": ("sum", {}, 0.5),
    "balanced": ("balanced", {}, 0.5),
    "orthogonal": ("orthogonal", {}, 0.5),
    "iso-c": ("iso-c", {}, 0.5),
    "knots": ("knots", {}, 0.5),
    "k-lora": ("k-lora", {}, 0.7),
    "switch": ("switch", {"tau": 2}, 0.7),
    "composite": ("composite", {}, 0.7),
}
"""Name -> composition, options, scale of each adapter. Those in which one adapter acts at a time take a larger scale."""


def random_adapter(unet: nn.Module, seed: int) -> Adapter:
    """Rank 8 on the attention of a UNet."""
    generator, modules = torch.Generator().manual_seed(seed), {}
    for site in resolve(unet, AdapterConfig(targets="attn")).sites:
        o, i = site.weight.shape
        down, up = torch.randn(RANK, i, generator=generator) * 0.02, torch.randn(o, RANK, generator=generator) * 0.02
        modules[f"unet.{site.name}"] = AdapterModule.lora(down, up, float(RANK))
    return Adapter(modules)


def measure_speed(dtype: torch.dtype) -> dict[str, Any]:
    """Forward time over that of the bare UNet."""
    torch.manual_seed(0)
    base = unet_of_sd15().requires_grad_(False).eval().to(dtype)
    inputs = inputs_of_unet(dtype)
    adapters = {f"a{k}": random_adapter(base, k) for k in range(8)}
    runs: dict[str, Callable[[], object]] = {"bare": lambda: call(base, inputs)}
    for k in (1, 2, 4, 8):
        twin = sharing(base, unet_of_sd15).eval()
        attach(twin, dict(list(adapters.items())[:k]), mode="stacked")
        runs[f"stacked {k}"] = lambda twin=twin: call(twin, inputs)  # type: ignore[misc]
    twin = sharing(base, unet_of_sd15).eval()
    many = {f"m{k}": adapters[f"a{k % 8}"] for k in range(100)}
    attach(twin, many, scales={n: float(n in ("m0", "m1")) for n in many}, mode="stacked")
    runs["2 of 100 stacked"] = lambda: call(twin, inputs)
    with torch.no_grad():
        t = take_turns(runs, 20)
    return {"over_bare": {name: seconds / t["bare"] for name, seconds in t.items()}}


def measure_beside(dtype: torch.dtype) -> dict[str, Any]:
    """Forward time over that of the bare UNet, ours and diffusers' in the same turns."""
    torch.manual_seed(0)
    base = unet_of_sd15().requires_grad_(False).eval().to(dtype)
    inputs = inputs_of_unet(dtype)
    wide = {n: t if n == "timestep" else t.repeat(8, *[1] * (t.ndim - 1)) for n, t in inputs.items()}
    adapters = {f"a{k}": random_adapter(base, k) for k in range(8)}
    each = {n: Scale(images=[float(i == k) for i in range(8)]) for k, n in enumerate(adapters)}
    stacked, batched = (sharing(base, unet_of_sd15).eval() for _ in range(2))
    # With weights of its own, into which it merges, that come into memory as the base's do: else it is some percent slower.
    merged = unet_of_sd15().requires_grad_(False).eval().to(dtype)
    attach(stacked, adapters, mode="stacked")
    attach(merged, adapters, mode="merged")
    attach(batched, adapters, scales=each)
    theirs: dict[int, Any] = {}
    for k in (1, 8):
        theirs[k] = sharing(base, unet_of_sd15).eval()
        for name in list(adapters)[:k]:
            theirs[k].add_adapter(
                LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, init_lora_weights=False), name
            )
        theirs[k].set_adapters(list(adapters)[:k], [1.0] * k)
        theirs[k].to(dtype)

    def one_by_one() -> None:
        for _ in range(8):
            call(theirs[1], inputs)

    alone = {"bare": base, "merged 8": merged, "stacked 8": stacked, "diffusers 8": theirs[8]}
    with torch.no_grad():
        t = take_turns({name: partial(call, unet, inputs) for name, unet in alone.items()}, 20)
        w = take_turns(
            {"bare": lambda: call(base, wide), "batched": lambda: call(batched, wide), "diffusers": one_by_one}, 5
        )
    return {
        "over_bare": {name: seconds / t["bare"] for name, seconds in t.items()},
        "eight_pictures_over_bare": {name: seconds / w["bare"] for name, seconds in w.items()},
    }


def measure_load() -> dict[str, Any]:
    """Seconds for a file to be read and be on a UNet at scale 0, where two act: the first ten of a hundred and the last ten."""
    unet = unet_of_sd15().requires_grad_(False).eval()
    mix, seconds = attach(unet, {}), []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(8):
            save_adapter(random_adapter(unet, k), Path(folder) / f"{k}.safetensors")
        for k in range(100):
            start = time.perf_counter()
            mix.add(f"a{k}", Path(folder) / f"{k % 8}.safetensors", scale=float(k < 2))
            seconds.append(time.perf_counter() - start)
    return {"first_ten_s": statistics.median(seconds[:10]), "last_ten_s": statistics.median(seconds[-10:])}


def measure_scales() -> dict[str, Any]:
    """Seconds for eight merged adapters at new scales."""
    torch.manual_seed(0)
    base = unet_of_sd15().requires_grad_(False).eval()
    twin = sharing(base, unet_of_sd15).eval()
    twin.load_state_dict({n: t.clone() for n, t in base.state_dict().items()}, assign=True)
    names = [f"a{k}" for k in range(8)]
    mix = attach(twin, {n: random_adapter(twin, k) for k, n in enumerate(names)})
    turn = itertools.count()

    unet: Any = unet_of_sd15().requires_grad_(False)
    for n in names:
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, init_lora_weights=False), n)

    def scales() -> dict[str, float]:
        k = next(turn)
        return {n: 0.1 + 0.05 * ((i + k) % 8) for i, n in enumerate(names)}

    def ours() -> None:
        mix.set_scales(scales())

    def diffusers() -> None:
        found = scales()
        unet.unfuse_lora()
        unet.set_adapters(list(found), list(found.values()))
        unet.fuse_lora()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.fuse_lora()
        t = take_turns({"ours": ours, "diffusers": diffusers})
    return {"ours_s": t["ours"], "diffusers_s": t["diffusers"], "ours_over_diffusers": t["ours"] / t["diffusers"]}


def measure_quality() -> dict[str, Any]:
    """Which styles a classifier sees, and whether the concept is kept, by composition."""
    classifier, _ = train_classifier()
    base = open_base("emoji-64")
    adapters = {s: load_adapter(ASSETS / "adapters" / s / "adapter.safetensors") for s in LEARNED}
    held_out = [set(read_split(s, "heldout")[1]) for s in LEARNED]
    captions = sorted(set.intersection(*held_out))[:PICTURES]
    base_pictures, base_captions = base_set()
    base_features = features([Image.fromarray(p) for p in base_pictures])
    found: dict[str, Any] = {"pictures": len(captions)}
    for size in (2, 3):
        for styles in itertools.combinations(LEARNED, size):
            columns: list[tuple[str, list[Image.Image]]] = []
            for name, (compose, options, scale) in COMPOSITIONS.items():
                if name == "k-lora" and size > 2:
                    continue  # it is between two
                mix = attach(
                    base.pipe, {s: adapters[s] for s in styles}, scales=dict.fromkeys(styles, scale * 2 / size),
                    compose=compose, **options,
                )  # fmt: skip
                drawn = draw(base, captions, 64, SamplingConfig(20, base.suggested["guidance_scale"], 0, 20))
                mix.detach()
                seen = shares(predict(classifier, to_tensor(np.stack([np.asarray(p) for p in drawn]))))
                kept = nearest(features(drawn), base_features, base_captions, captions)
                entry = {
                    "seen_as": seen,
                    "learned": sum(seen[s] for s in styles),
                    "least_seen": min(seen[s] for s in styles),
                    "base_concept_top5": float(kept.any(1).mean()),
                }
                found.setdefault(" + ".join(styles), {})[name] = entry
                columns.append((name, drawn))
                print(styles, name, entry, flush=True)
            sheet = draw_grid(
                [[pictures[k] for _, pictures in columns] for k in range(0, len(captions), len(captions) // 6)][:6],
                [captions[k] for k in range(0, len(captions), len(captions) // 6)][:6], [n for n, _ in columns],
                title=" + ".join(styles),
            )  # fmt: skip
            sheet.quantize(256).save(Path(__file__).parent / "results" / f"mixing_{'_'.join(styles)}.png")
    return found


def measure_orthogonal() -> dict[str, Any]:
    """Two styles trained with `init: orthogonal` on different parts of the shared basis, beside two trained as usual."""
    classifier, _ = train_classifier()
    styles = ("fluent-emoji-flat", "fxemoji")
    captions = sorted(set.intersection(*(set(read_split(s, "heldout")[1]) for s in styles)))[:PICTURES]
    base_pictures, base_captions = base_set()
    base_features = features([Image.fromarray(p) for p in base_pictures])
    found: dict[str, Any] = {"styles": styles, "steps": SHORT, "pictures": len(captions)}
    for init in ("kaiming", "orthogonal"):
        adapters = {}
        with tempfile.TemporaryDirectory() as temporary:
            for k, style in enumerate(styles):
                words = {
                    "steps": SHORT,
                    "init": init,
                    "basis_index": k if init == "orthogonal" else 0,
                    "images": str(ASSETS / "styles" / style / "train"),
                }
                words["output"] = f"{temporary}/{style}"
                run = train_sd(build(TrainSDConfig, read_yaml("emoji64_style"), words))
                adapters[style] = load_adapter(run.adapter)
            (pair,) = overlap(adapters)
            base = open_base("emoji-64")
            entry: dict[str, Any] = {what: pair.mean(what) for what in ("inputs", "outputs", "shared", "cosine")}
            tries = (("first alone", styles[:1], 1.0), ("second alone", styles[1:], 1.0), ("sum", styles, 0.5))
            for name, names, scale in tries:
                mix = attach(base.pipe, {s: adapters[s] for s in names}, scales=dict.fromkeys(names, scale))
                drawn = draw(base, captions, 64, SamplingConfig(20, base.suggested["guidance_scale"], 0, 20))
                mix.detach()
                seen = shares(predict(classifier, to_tensor(np.stack([np.asarray(p) for p in drawn]))))
                kept = nearest(features(drawn), base_features, base_captions, captions)
                entry[name] = {
                    "learned": sum(seen[s] for s in names),
                    "least_seen": min(seen[s] for s in names),
                    "base_concept_top5": float(kept.any(1).mean()),
                }
        found[init] = entry
        print(init, entry, flush=True)
    return found


@torch.no_grad()
def measure_interference() -> dict[str, Any]:
    """What both adapters do together beyond what each does alone, block by block, against the prediction."""
    base = open_base("emoji-64")
    adapters = {s: load_adapter(ASSETS / "adapters" / s / "adapter.safetensors") for s in LEARNED}
    captions = read_split("noto", "heldout")[1][:16]
    text = encode_text(base, captions)
    x = torch.randn(len(captions), base.pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks = dict.fromkeys(block_of(n) for n in adapters[LEARNED[0]].modules)

    def predicted(parts: dict[str, Adapter]) -> Tensor:
        mix = attach(base.pipe.unet, parts) if parts else None
        out: Tensor = base.pipe.unet(x, torch.tensor(500), text).sample
        if mix is not None:
            mix.detach()
        return out

    plain = predicted({})
    points: list[dict[str, Any]] = []
    for one, two in itertools.combinations(LEARNED, 2):
        for block in blocks:
            part = {
                s: Adapter({n: m for n, m in adapters[s].modules.items() if block_of(n) == block}) for s in (one, two)
            }
            alone = [predicted({s: part[s]}) - plain for s in (one, two)]
            beyond = predicted(part) - plain - alone[0] - alone[1]
            measured = float(beyond.norm() / (alone[0].norm() ** 2 + alone[1].norm() ** 2).sqrt())
            (pair,) = overlap(part)
            strength = math.sqrt(pair.first_norm * pair.second_norm)
            points.append(
                {"pair": [one, two], "block": block, "measured": measured, "shared": pair.mean("shared"),
                 "interference": pair.interference, "strength": strength}
            )  # fmt: skip
    found: dict[str, Any] = {"points": points}
    for what in ("shared", "interference", "strength"):
        found[f"rank_correlation_{what}"] = rank_correlation([p[what] for p in points], [p["measured"] for p in points])
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "speed-fp32": lambda: measure_speed(torch.float32),
    "speed-bf16": lambda: measure_speed(torch.bfloat16),
    "beside-fp32": lambda: measure_beside(torch.float32),
    "beside-bf16": lambda: measure_beside(torch.bfloat16),
    "load": measure_load,
    "scales": measure_scales,
    "quality": measure_quality,
    "orthogonal": measure_orthogonal,
    "interference": measure_interference,
}


if __name__ == "__main__":
    run_parts("mixing", PARTS, __doc__)
