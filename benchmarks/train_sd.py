"""`visionlora train-sd` from end to end, beside the training loop that diffusers documents.

    python benchmarks/train_sd.py                    everything (about an hour on two cores)
    python benchmarks/train_sd.py emoji-64 quality   some of it
    python benchmarks/train_sd.py sd15-fp32 --steps 2   a trial: so many steps, one turn, one style and seed; not recorded

    sd15-fp32  the shapes of Stable Diffusion 1.5 with random weights, 256 px, batch 1, 40 steps (about 10 minutes)
    sd15-bf16  the same in bf16 (about 5 minutes; left out where the processor only imitates bf16)
    emoji-64   the embedded model, 64 px, batch 8, 300 steps, fp32 (about 5 minutes)
    quality    held-out loss of our defaults at half the steps beside that of the peer's whole run (about 30 minutes)

The first three measure whole processes, from a folder of 8 captioned pictures to a saved adapter file: wall time and peak
memory, starting Python and opening the model included. Each run is a fresh process, ours with an empty cache; the two take
turns, and the median counts. Both get the same pictures, captions, seed, steps, batch, rank, targets, rate,
precision and threads; neither draws samples. The peer is `benchmarks/diffusers_lora.py`.

The model of sd15 has SD 1.5's UNet, VAE and text encoder in full, except that the text encoder knows the 2,048 tokens of
the embedded model's tokenizer instead of CLIP's 49,408.

quality trains on the training pictures of three styles, three seeds each, and compares the loss on the held-out concepts
at fixed timesteps and noise. The peer runs at its documented rate, 1e-4 throughout, and at the best of `PEERS`, which is
chosen by style on the held-out pictures themselves with the first seed: that favours the peer.
"""

from __future__ import annotations

import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from core import unet_of_sd15
from diffusers_lora import WEIGHTS
from PIL import Image
from record import run_parts

from visionlora.loaders import load_adapter

ROOT = Path(__file__).parents[1]
STYLES, EMBEDDED = ROOT / "assets" / "styles", ROOT / "assets" / "emoji-64"
PEER = Path(__file__).with_name("diffusers_lora.py")
LEARNED = ("fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
PICTURES, RANK, RATE = 8, 8, 1e-4
TURNS, SHORT_TURNS = 1, 3
"""Runs of each contestant, with SD 1.5 and with the embedded model: the longer a run, the less of it is chance."""
PEERS = (
    (1e-4, "constant"),
    (1e-3, "constant"),
    (2e-3, "cosine"),
    (5e-3, "cosine"),
)
"""Rates and schedules of the sweep; the first is the documented one."""

MOST_BF16_OVER_FP32 = 5
"""Time of a convolution above which nobody would train in bf16, and a run of SD 1.5 would take a day."""

# A process's peak memory begins at that of the one it was forked from, so a small one starts and watches each contestant.
WATCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class Case:
    """What both contestants are told."""

    steps: int
    resolution: int
    """px."""
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    steps: int | None = None
    """In place of each part's own."""
    turns: int = TURNS
    short_turns: int = SHORT_TURNS
    styles: Sequence[str] = LEARNED
    seeds: Sequence[int] = (0, 1, 2)
    peers: Sequence[tuple[float, str]] = PEERS


def trial(steps: int) -> Plan:
    """A little of everything."""
    return Plan(steps, turns=1, short_turns=1, styles=LEARNED[:1], seeds=(0,), peers=PEERS[:2])


# ------------------------------------------------------------------------------------------------------------ processes


def watched(command: Sequence[object], cache_folder: Path) -> tuple[float, float]:
    """Runs a command to its end: (seconds, peak MiB).

    Raises:
        RuntimeError: with the end of what it printed, when it fails.
    """
    environment = {
        **os.environ,
        "VISIONLORA_CACHE": str(cache_folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, "-S", "-c", WATCH, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} could not be started:\n{done.stderr[-2000:]}")
    seconds, peak, code = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(words)} ended with {code}:\n{done.stderr[-2000:]}")
    return seconds, peak / (2**20 if sys.platform == "darwin" else 2**10)


def our_command(images: Path, model: Path, output: Path, steps: int, seed: int, *settings: str) -> list[object]:
    """Train-sd with its defaults, without a grid, and `settings` as key=value."""
    return [sys.executable, "-m", "visionlora", "train-sd", "--images", images, "--model", model, "--output", output,
            "--steps", steps, "--seed", seed, "sample_columns=0", *settings]  # fmt: skip


def peer_command(images: Path, model: Path, output: Path, case: Case, seed: int, rate: float, schedule: str = "constant"
                 ) -> list[object]:  # fmt: skip
    """The loop of diffusers and PEFT."""
    return [sys.executable, PEER, "--images", images, "--model", model, "--output", output, "--steps", case.steps,
            "--seed", seed, "--resolution", case.resolution, "--batch-size", case.batch_size, "--rank", RANK,
            "--precision", case.precision, "--learning-rate", rate, "--schedule", schedule]  # fmt: skip


def parameters(file: Path) -> int:
    """Trained numbers in an adapter file."""
    return sum(t.numel() for m in load_adapter(file).modules.values() for t in m.tensors.values())


# ----------------------------------------------------------------------------------------------------- time and memory


def pictures(folder: Path, size: int) -> Path:
    """The first captioned pictures of a style, `size` px."""
    source = STYLES / LEARNED[0] / "train"
    lines = (source / "metadata.jsonl").read_text().splitlines()[:PICTURES]
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for line in lines:
        name = json.loads(line)["file_name"]
        with Image.open(source / name) as picture:
            picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@cache
def sd15_folder() -> Path:
    """A pipeline in the shapes of Stable Diffusion 1.5 with random weights in fp32, on disk until the program ends."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, projection_dim=768, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip
    noise_scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet_of_sd15(), scheduler=noise_scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(temporary.name)  # fmt: skip
    return Path(temporary.name)


def side_by_side(case: Case, model: Path, turns: int) -> dict[str, Any]:
    """Both contestants in turns.

    Raises:
        RuntimeError: when they did not train the same number of parameters.
    """
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    trained: dict[str, int] = {}
    settings = (f"rank={RANK}", "targets=attn", f"learning_rate={RATE}", "warmup_steps=0", "caption_dropout=0",
                f"batch_size={case.batch_size}", f"resolution={case.resolution}", f"precision={case.precision}",
                "checkpoints=1")  # fmt: skip
    for turn in range(turns):
        for name in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                images, output = pictures(folder / "pictures", 2 * case.resolution), folder / "run"
                if name == "ours":
                    command = our_command(images, model, output, case.steps, 0, *settings)
                else:
                    command = peer_command(images, model, output, case, 0, RATE)
                runs[name].append(watched(command, folder / "cache"))
                trained[name] = parameters(output / ("adapter.safetensors" if name == "ours" else WEIGHTS))
            print(name, "{:.1f} s, {:.0f} MiB".format(*runs[name][-1]), flush=True)
    if trained["ours"] != trained["peer"]:
        raise RuntimeError(f"The contestants trained different numbers of parameters, which is not fair: {trained}.")
    seconds, peak = ({name: statistics.median(r[i] for r in runs[name]) for name in runs} for i in (0, 1))
    return {
        "steps": case.steps,
        "resolution": case.resolution,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "turns": turns,
        "parameters": trained["ours"],
        "seconds": seconds,
        "peak_mib": peak,
        "ours_over_peer": {"seconds": seconds["ours"] / seconds["peer"], "peak": peak["ours"] / peak["peer"]},
        "runs": runs,
    }


def bf16_over_fp32() -> float:
    """How much longer a small convolution takes in bf16, which many processors only imitate."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = torch.nn.Conv2d(64, 64, 3).to(dtype), torch.randn(1, 64, 32, 32, dtype=dtype)
        with torch.no_grad():
            layer(x)
            start = time.perf_counter()
            layer(x)
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] / seconds[torch.float32]


def measure_sd15(precision: str, plan: Plan) -> dict[str, Any]:
    """Stable Diffusion 1.5; in bf16 only on a processor that computes in it."""
    if precision == "bf16" and (slower := bf16_over_fp32()) > MOST_BF16_OVER_FP32:
        return {"left_out": f"a convolution in bf16 takes {slower:.0f} x the time of fp32 on this processor"}
    return side_by_side(Case(plan.steps or 40, 256, 1, precision), sd15_folder(), plan.turns)


def measure_emoji64(plan: Plan) -> dict[str, Any]:
    """The embedded model."""
    return side_by_side(Case(plan.steps or 300, 64, 8, "fp32"), EMBEDDED, plan.short_turns)


# ------------------------------------------------------------------------------------------------------------- quality


def measure_quality(plan: Plan) -> dict[str, Any]:
    """Held-out losses by style and seed."""
    case = Case(plan.steps or 300, 64, 8, "fp32")
    half = max(1, case.steps // 2)
    found: dict[str, Any] = {"steps": {"ours": half, "peer": case.steps}, "peer_batch_size": case.batch_size}
    rows: list[dict[str, Any]] = []
    for style in plan.styles:
        found[style] = quality_of(style, case, half, plan)
        rows += found[style]["runs"]
    for peer in ("peer", "best_peer"):
        ratios = [row["ours"] / row[peer] for row in rows]
        found[f"ours_over_{peer}"] = statistics.mean(ratios)
        found[f"ours_lower_than_{peer}_in"] = sum(r <= 1 for r in ratios)
    return {**found, "compared": len(rows)}


def quality_of(style: str, case: Case, our_steps: int, plan: Plan) -> dict[str, Any]:
    """One style: the sweep of the peer with the first seed, and every seed of ours, of the documented and the best peer."""
    from auto_rank import held_out_loss

    train = STYLES / style / "train"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)

        def ours(seed: int) -> tuple[float, int]:
            output = work / f"ours-{seed}"
            watched(our_command(train, EMBEDDED, output, our_steps, seed), work / "cache")
            return held_out_loss(style, output / "adapter.safetensors"), parameters(output / "adapter.safetensors")

        @cache
        def peer(rate: float, schedule: str, seed: int) -> tuple[float, int]:
            output = work / f"peer-{rate:g}-{schedule}-{seed}"
            watched(peer_command(train, EMBEDDED, output, case, seed, rate, schedule), work / "cache")
            return held_out_loss(style, output / WEIGHTS), parameters(output / WEIGHTS)

        sweep = {p: peer(*p, plan.seeds[0])[0] for p in plan.peers}
        best = min(sweep, key=lambda p: sweep[p])
        runs = []
        for seed in plan.seeds:
            mine, documented, chosen = ours(seed), peer(*plan.peers[0], seed), peer(*best, seed)
            runs.append({"seed": seed, "ours": mine[0], "peer": documented[0], "best_peer": chosen[0],
                         "parameters": {"ours": mine[1], "peer": chosen[1]}})  # fmt: skip
            print(style, runs[-1], flush=True)
    return {
        "base": held_out_loss(style, None),
        "sweep": {f"{rate:g} {schedule}": loss for (rate, schedule), loss in sweep.items()},
        "best": {"rate": best[0], "schedule": best[1]},
        "runs": runs,
    }


def parts(plan: Plan) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured, by name."""
    return {
        "sd15-fp32": partial(measure_sd15, "fp32", plan),
        "sd15-bf16": partial(measure_sd15, "bf16", plan),
        "emoji-64": partial(measure_emoji64, plan),
        "quality": partial(measure_quality, plan),
    }


if __name__ == "__main__":
    run_parts("train_sd", parts(Plan()), __doc__, trial=lambda steps: parts(trial(steps)))
