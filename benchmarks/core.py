"""The LoRA core beside PEFT and diffusers, on the shapes people train: time, memory kept for backward, load and merge.

    python benchmarks/core.py                  everything (about 20 minutes on two cores)
    python benchmarks/core.py unet-fp32 vit    some of it

Weights are random; only shapes matter. Ours and theirs share the base weights, run in one process and take turns; every
number is the median of at least 5 turns, every comparison a ratio.

    unet-fp32, unet-bf16   the UNet of Stable Diffusion 1.5 (860 M), 32x32 latents, batch 1, rank 8 on q, k, v, out
    kinds                  where the time of a step on that UNet goes
    vit                    timm ViT-B/16 at 224 px, batch 8
    load                   a Stable Diffusion 1.5 adapter into a ready UNet
    looking                memory of looking at pictures, beside that of learning from one (Linux alone)
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import run_parts
from torch import Tensor, nn

from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import attach, inject
from visionlora.lora.layers import heavy_by_matmul
from visionlora.models.class_token import shorten
from visionlora.models.memory import give_back
from visionlora.training.memory import bytes_kept

TURNS = 5
RANK = 8
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def take_turns(contestants: dict[str, Callable[[], object]], turns: int = TURNS) -> dict[str, float]:
    """Median seconds of each, after one warm-up turn; they alternate, so that a slow moment hits all.

    Each turn counts by its own pace, the median of all contestants in it: machines are faster and slower for minutes on end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # each follows each other in turn
            run = contestants[name]
            gc.collect()  # nobody pays for the garbage of the one before
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    paces = [statistics.median(turn) for turn in zip(*seconds.values(), strict=True)]
    usual = statistics.median(paces)
    return {
        name: usual * statistics.median(s / pace for s, pace in zip(values, paces, strict=True))
        for name, values in seconds.items()
    }


def sharing(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A second model object on the same weights."""
    with torch.device("meta"):
        twin = build()
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.requires_grad_(False)


def unet_of_sd15() -> nn.Module:
    """Random weights in the shapes of Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    made: nn.Module = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return made


def inputs_of_unet(dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents of 256 px pictures and text."""
    return {
        "sample": torch.randn(1, 4, 32, 32, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 768, dtype=dtype),
    }


def call(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's prediction."""
    out: Tensor = model(**inputs).sample
    return out


def step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step without the optimizer: forward, loss, backward."""

    def run() -> None:
        forward().float().square().mean().backward()
        for p in model.parameters():
            p.grad = None

    return run


def peft_on(model: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    """PEFT's layers injected as diffusers does it."""
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", **options)
        made: nn.Module = inject_adapter_in_model(config, model, adapter_name=name)
    return made


def fill(model: nn.Module) -> None:
    """Factors B as after training."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)


def measure_unet(dtype: torch.dtype) -> dict[str, Any]:
    """Everything on the UNet in one dtype."""
    torch.manual_seed(0)
    base = unet_of_sd15().to(dtype).requires_grad_(False)
    inputs = inputs_of_unet(dtype)
    found: dict[str, Any] = {**train_steps(base, inputs), **many_active(base, inputs)}
    return found


@torch.no_grad()
def forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What a training step is compared with, twice."""
    call(model, inputs)


def frozen(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What no adapter can go below: forward and backward of the frozen model, to its input."""
    latents = inputs["sample"].clone().requires_grad_(True)
    call(model, {**inputs, "sample": latents}).float().square().mean().backward()


def train_steps(base: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Step times over the bare forward, and bytes kept."""
    bare = sharing(base, unet_of_sd15)
    names = ("ours", "ours, as in train-sd", "peft", "our DoRA", "peft DoRA")
    models = {name: sharing(base, unet_of_sd15) for name in names}
    heavy_by_matmul(models["ours, as in train-sd"])
    inject(models["ours, as in train-sd"], AdapterConfig(rank=RANK, targets="attn"))
    inject(models["ours"], AdapterConfig(rank=RANK, targets="attn"))
    inject(models["our DoRA"], AdapterConfig(method="dora", rank=RANK, targets="attn"))
    peft_on(models["peft"], target_modules=ATTENTION)
    peft_on(models["peft DoRA"], target_modules=ATTENTION, use_dora=True)
    if inputs["sample"].dtype != torch.float32:
        # As diffusers injects them, PEFT's adapters take the dtype of the base; PEFT's own default keeps them in fp32,
        # as ours are. Both are measured.
        models["peft, adapters in the base's dtype"] = models["peft"]
        models["peft"] = sharing(base, unet_of_sd15)
        peft_on(models["peft"], target_modules=ATTENTION)
        for name in ("peft", "peft DoRA"):
            in_fp32(models[name])
    for model in models.values():
        fill(model.train())

    steps = {name: step(m, lambda m=m: call(m, inputs)) for name, m in models.items()}  # type: ignore[misc]
    t = take_turns({"forward": lambda: forward(bare, inputs), "frozen": lambda: frozen(bare, inputs), **steps}, turns=9)
    kept = {name: bytes_kept(m, lambda m=m: call(m, inputs)) for name, m in models.items()}  # type: ignore[misc]
    return {
        "forward_s": t["forward"],
        "step_over_two_forwards": {n: t[n] / (2 * t["forward"]) for n in t if n != "forward"},
        "kept_mib": {n: v / 2**20 for n, v in kept.items()},
        "kept_ours_over_peft": kept["ours"] / kept["peft"],
        "dora_over_lora": {"ours": t["our DoRA"] / t["ours"], "peft": t["peft DoRA"] / t["peft"]},
    }


KINDS = {
    "attention": ("aten::_scaled_dot_product",),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::_slow_conv", "aten::thnn_conv"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
}
"""Beginnings of the names of operations."""


def measure_kinds() -> dict[str, Any]:
    """Where the time of a training step on the UNet goes."""
    found: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        base, inputs = unet_of_sd15().to(dtype).requires_grad_(False), inputs_of_unet(dtype)
        ours = sharing(base, unet_of_sd15)
        inject(ours, AdapterConfig(rank=RANK, targets="attn"))
        fill(ours.train())
        several = sharing(base, unet_of_sd15).eval()
        for i in range(8):
            inject(several, AdapterConfig(rank=RANK, targets="attn"), name=f"a{i}", seed=i)
        fill(several)
        several.requires_grad_(False)
        found[name] = seconds_by_kind({
            "one forward": partial(forward, base, inputs),
            "eight adapters": partial(forward, several, inputs),
            "frozen": partial(frozen, base, inputs),
            "ours": step(ours, partial(call, ours, inputs)),
        })  # fmt: skip
    return found


def seconds_by_kind(contestants: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Of each, median seconds in operations of a kind, those that they call not counted; the rest under `others`."""
    from torch.profiler import ProfilerActivity, profile

    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}

    def profiled(name: str) -> None:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            contestants[name]()
        found = dict.fromkeys([*KINDS, "others"], 0.0)
        for event in profiled.key_averages():
            kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "others")
            found[kind] += event.self_cpu_time_total / 1e6
        turns[name].append(found)

    take_turns({name: partial(profiled, name) for name in contestants})
    return {
        name: {kind: statistics.median(turn[kind] for turn in found[1:]) for kind in found[0]}
        for name, found in turns.items()
    }


def in_fp32(model: nn.Module) -> None:
    """PEFT's adapters in fp32."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()


def many_active(base: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Inference with 1, 4 and 8 adapters, and merging 8 at new scales."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Any] = {"active_over_bare": {}}
    for k in (1, 4, 8):
        bare, ours, theirs = (sharing(base, unet_of_sd15).eval() for _ in range(3))
        handles = []
        for i in range(k):
            handles.append(inject(ours, AdapterConfig(rank=RANK, targets="attn"), name=f"a{i}", seed=i))
            peft_on(theirs, f"a{i}", target_modules=ATTENTION)
        fill(ours)
        fill(theirs)
        ours.requires_grad_(False)
        layers = [m for m in theirs.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.set_adapter([f"a{i}" for i in range(k)])
        theirs.requires_grad_(False)
        with torch.no_grad():
            t = take_turns({n: lambda m=m: call(m, inputs) for n, m in  # type: ignore[misc]
                            (("bare", bare), ("ours", ours), ("peft", theirs))}, turns=7)  # fmt: skip
        found["active_over_bare"][str(k)] = {n: t[n] / t["bare"] for n in ("ours", "peft")}
    found["merge"] = merge_times(handles, layers)
    return found


def merge_times(handles: list[Any], layers: list[Any]) -> dict[str, float]:
    """8 adapters at new scales into the weights: ours against PEFT's set_scale + unmerge + merge."""
    scales = iter(float(i % 7 + 1) / 7 for i in range(1000))

    def ours() -> None:
        scale = next(scales)
        merge_all(handles, [scale * (i + 1) / len(handles) for i in range(len(handles))])

    def theirs() -> None:
        scale, names = next(scales), [f"a{i}" for i in range(len(handles))]
        for layer in layers:
            layer.unmerge() if layer.merged else None
            for i, name in enumerate(names):
                layer.set_scale(name, scale * (i + 1) / len(names))
            layer.merge(adapter_names=names)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        t = take_turns({"ours": ours, "peft": theirs})
    return {"ours_s": t["ours"], "peft_s": t["peft"], "ours_over_peft": t["ours"] / t["peft"]}


def merge_all(handles: list[Any], scales: list[float]) -> None:
    """New scales for several merged adapters, written once."""
    from visionlora.lora.merge import merge_together

    merge_together(handles, scales)


def measure_vit() -> dict[str, Any]:
    """Timm ViT-B/16, batch 8: q, v in the fused qkv for speed, every linear layer for memory."""
    import timm

    torch.manual_seed(0)

    def build() -> nn.Module:
        made: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=10)
        return made

    base, x = build().requires_grad_(False), torch.randn(8, 3, 224, 224)
    ours, short, theirs, our_all, their_all, bare = (sharing(base, build).train() for _ in range(6))
    inject(ours, AdapterConfig(rank=RANK, targets="attn.qv"))
    shorter = inject(short, AdapterConfig(rank=RANK, targets="attn.qv"))
    if not shorten(short.eval(), x[:1]):
        raise RuntimeError("The last block of this ViT is not shortened.")
    short.train()
    inject(our_all, AdapterConfig(rank=RANK, targets="attn,mlp"))
    peft_on(theirs, target_modules=["qkv"])
    peft_on(their_all, target_modules=r"blocks\..*\.(qkv|attn\.proj|fc1|fc2)")
    models = {"ours": ours, "ours, as classify": short, "peft": theirs, "our all": our_all, "peft all": their_all}
    for model in models.values():
        fill(model)

    @torch.no_grad()
    def forward(model: nn.Module) -> None:
        model(x)

    steps = {n: step(m, lambda m=m: m(x)) for n, m in models.items()}  # type: ignore[misc]
    t = take_turns({"forward": partial(forward, bare), **steps}, turns=9)
    shorter.merge()
    predict = take_turns({"bare": partial(forward, bare), "ours, as classify": partial(forward, short)}, turns=15)
    shorter.unmerge()
    kept = {n: bytes_kept(m, lambda m=m: m(x)) for n, m in models.items()}  # type: ignore[misc]
    return {
        "forward_s": t["forward"],
        "step_over_two_forwards": {n: t[n] / (2 * t["forward"]) for n in models},
        "qv_step_ours_over_peft": t["ours"] / t["peft"],
        "qv_step_as_classify_over_peft": t["ours, as classify"] / t["peft"],
        "predict_over_bare": predict["ours, as classify"] / predict["bare"],
        "kept_mib_per_picture": {n: v / 2**20 / len(x) for n, v in kept.items()},
        "kept_qv_ours_over_peft": kept["ours"] / kept["peft"],
        "kept_qv_as_classify_over_peft": kept["ours, as classify"] / kept["peft"],
        "kept_all_ours_over_peft": kept["our all"] / kept["peft all"],
    }


def measure_load() -> dict[str, Any]:
    """Reading a file and putting it on a UNet, with none and with 10 other adapters there."""
    from visionlora.loaders import load_adapter

    torch.manual_seed(0)
    base = unet_of_sd15().requires_grad_(False)
    ours, theirs = (sharing(base, unet_of_sd15) for _ in range(2))
    handle = inject(ours, AdapterConfig(rank=RANK, targets="attn"))
    fill(ours)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        handle.save(path, component="unet")
        handle.eject()
        return compare_loads(path, ours, theirs, load_adapter)


def compare_loads(path: Path, ours: Any, theirs: Any, load_adapter: Callable[[Path], Any]) -> dict[str, Any]:
    """Seconds by the number of adapters that are there already."""
    found: dict[str, Any] = {}
    count = {"ours": 0, "peft": 0}

    def our_load() -> None:
        count["ours"] += 1
        attach(ours, load_adapter(path), "unet", f"x{count['ours']}")

    def their_load() -> None:
        count["peft"] += 1
        theirs.load_lora_adapter(str(path), prefix="unet", adapter_name=f"x{count['peft']}")

    for already in (0, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = take_turns({"ours": our_load, "peft": their_load})
        found[f"from_{already}"] = {
            "ours_s": t["ours"], "diffusers_s": t["peft"], "diffusers_over_ours": t["peft"] / t["ours"],
        }  # fmt: skip
    return found


def measure_looking() -> dict[str, Any]:
    """MiB that a pass takes above what is there: learning from one picture, with and without checkpointing, looking at four."""
    torch.manual_seed(0)
    unet: Any = unet_of_sd15().requires_grad_(False)
    inject(unet, AdapterConfig(rank=RANK, targets="attn"))
    found: dict[str, Any] = {}
    for pixels in (256, 512):
        one = inputs_of_unet(torch.float32)
        one["sample"] = torch.randn(1, 4, pixels // 8, pixels // 8)
        four = {name: t.repeat(4, *[1] * (t.dim() - 1)) for name, t in one.items()}
        own = found[str(pixels)] = {}
        unet.train().disable_gradient_checkpointing()
        own["learning"] = mib_above(lambda one=one: call(unet, one).square().mean().backward())  # type: ignore[misc]
        unet.enable_gradient_checkpointing()
        own["checkpointed"] = mib_above(lambda one=one: call(unet, one).square().mean().backward())  # type: ignore[misc]
        unet.eval()
        own["looking_at_four"] = mib_above(lambda four=four: forward(unet, four))  # type: ignore[misc]
    return found


def mib_above(run: Callable[[], object]) -> float:
    """Peak of the process's memory while something runs, above that before, once it has run already."""
    run()
    give_back()
    proc = Path("/proc/self")
    (proc / "clear_refs").write_text("5")  # the peak counts from here
    sizes = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    before = float(sizes["VmRSS"].split()[0])
    run()
    sizes = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return (float(sizes["VmHWM"].split()[0]) - before) / 1024


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "unet-fp32": lambda: measure_unet(torch.float32),
    "unet-bf16": lambda: measure_unet(torch.bfloat16),
    "kinds": measure_kinds,
    "vit": measure_vit,
    "load": measure_load,
    "looking": measure_looking,
}


if __name__ == "__main__":
    run_parts("core", PARTS, __doc__)
