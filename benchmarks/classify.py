"""How well and how fast `visionlora classify` works, on the embedded backbone.

    python benchmarks/classify.py                   everything (about 40 minutes on two cores)
    python benchmarks/classify.py digits predict    some of it

    digits    scikit-learn's digits, 1,797 scans that nobody here made; half of them, the same for every seed, are the test
    digits-auto  the digits with rank auto, at the same number of parameters
    styles    in which of four styles an emoji is drawn; the test holds concepts that were never seen in any style
    rank      rank auto against one rank everywhere at equal parameters, on the digits
    retrieval how often the nearest picture of the base style is that of the same emoji, for concepts never seen
    predict   pictures per second with 1 and with 8 adapters attached, beside the bare backbone of timm
    index     50,000 small files: time and memory

Adapter, linear probe and full fine-tuning see the same pictures and start from the same head; the best moment of each is
chosen on validation pictures, and the test is looked at once. Speed of training beside PEFT is in `benchmarks/core.py`.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from core import take_turns
from PIL import Image
from record import run_parts
from visionlora.pipelines.classify import ClassifyResult, classify

from visionlora.classifier import load_classifier
from visionlora.config import ClassifyConfig
from visionlora.data.classes import read_labelled
from visionlora.data.decoded import check_pictures
from visionlora.data.preprocess import Preprocessing
from visionlora.models.heads import as_logits
from visionlora.models.vision import open_backbone

SEEDS = (0, 1, 2)
STYLES = Path(__file__).parents[1] / "assets" / "styles"
LORA: dict[str, Any] = {"method": "lora", "rank": 6, "targets": "attn,mlp", "learning_rate": 0.012}
DIGITS: dict[str, Any] = {
    "flip": False, "augment": "affine", "warmup_steps": 60, "precision": "bf16", "label_smoothing": 0.1,
}  # fmt: skip
# Turning and shearing strokes change what styles differ by: chosen, as the rates, on the validation pictures (seeds 0-2).
STYLE: dict[str, Any] = {
    "augment": "none", "head_learning_rate": 0.0002, "precision": "bf16",
}  # fmt: skip
FILES = 50_000


def digits_folder(root: Path) -> Path:
    """Class folders of 64 px pictures below train/ and test/."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    sides = train_test_split(np.arange(len(found.target)), test_size=0.5, stratify=found.target, random_state=0)
    for side, rows in zip(("train", "test"), sides, strict=True):
        for i in rows.tolist():
            folder = root / side / str(found.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (255 - found.images[i] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return root


def styles_folder(root: Path) -> Path:
    """Class folders by style. Validation and test are concepts that the backbone never saw, each concept on one side."""
    for style in sorted(p.name for p in STYLES.iterdir() if p.is_dir()):
        for picture in (STYLES / style).glob("*/*.png"):
            even = hashlib.sha256(picture.stem.encode()).digest()[0] % 2
            side = "train" if picture.parent.name == "train" else ("val", "test")[even]
            folder = root / side / style
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder / picture.name)
    return root


def compared(
    images: Path, work: Path, baselines: tuple[str, ...] = ("probe", "full"), **settings: Any
) -> dict[str, Any]:
    """Adapter, linear probe and full fine-tuning for every seed."""
    runs: list[ClassifyResult] = []
    for seed in SEEDS:
        config = ClassifyConfig(
            images=str(images), output=str(work / f"seed-{seed}"), seed=seed, baselines=baselines,
            **{**LORA, **settings},
        )  # fmt: skip
        runs.append(classify(config))
        print(
            seed, {c.name: c.test.to_dict().get("top1") for c in runs[-1].contenders if c.test is not None}, flush=True
        )
    found: dict[str, Any] = {"settings": {**LORA, **settings}, "test_pictures": runs[0].metrics.pictures}
    for k, contender in enumerate(runs[0].contenders):
        scores = [float(r.contenders[k].test.to_dict()["top1"]) for r in runs]
        found[contender.name] = {
            "top1": scores,
            "mean": statistics.mean(scores),
            "spread": statistics.stdev(scores),
            "trained_share": contender.trained_parameters / contender.base_parameters,
            "file_bytes": contender.file_bytes,
        }
    return found


def measure_digits() -> dict[str, Any]:
    """The digits."""
    with tempfile.TemporaryDirectory() as folder:
        return compared(digits_folder(Path(folder) / "digits"), Path(folder), **DIGITS, epochs=40.0)


def measure_digits_auto() -> dict[str, Any]:
    """The digits with ranks measured on them, at the parameters of the uniform rank."""
    with tempfile.TemporaryDirectory() as folder:
        return compared(
            digits_folder(Path(folder) / "digits"), Path(folder), ("none",), **DIGITS, epochs=40.0, rank="auto",
            rank_budget=str(LORA["rank"]),
        )  # fmt: skip


def measure_styles() -> dict[str, Any]:
    """The styles."""
    with tempfile.TemporaryDirectory() as folder:
        return compared(styles_folder(Path(folder) / "styles"), Path(folder), **STYLE, epochs=12.0)


def measure_rank() -> dict[str, Any]:
    """Rank auto against uniform ranks."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = digits_folder(Path(folder) / "digits")
        for seed in SEEDS:
            row: dict[str, Any] = {"seed": seed}
            for rank in (2, "auto"):
                config = ClassifyConfig(
                    images=str(images), output=str(Path(folder) / f"{seed}-{rank}"), seed=seed, epochs=15.0,
                    learning_rate=0.012, rank=rank, rank_budget="2", targets="attn,mlp", baselines=("none",), **DIGITS,
                )  # fmt: skip
                contender = classify(config).contenders[0]
                test = contender.test.to_dict() if contender.test is not None else {}
                row[str(rank)] = {
                    "loss": test["loss"],
                    "top1": test["top1"],
                    "parameters": contender.trained_parameters,
                }
            print(row, flush=True)
            rows.append(row)
    return {
        "runs": rows,
        "loss_auto_over_uniform": statistics.mean(r["auto"]["loss"] / r["2"]["loss"] for r in rows),
        "top1_auto_minus_uniform": statistics.mean(r["auto"]["top1"] - r["2"]["top1"] for r in rows),
        "lower_loss_in": sum(r["auto"]["loss"] < r["2"]["loss"] for r in rows),
    }


def measure_retrieval() -> dict[str, Any]:
    """The backbone's own features, beside those of random weights."""
    from visionlora.assets.build_emoji_vit import HERE, measure, size_of

    folder = HERE / "emoji-vit"
    return {
        "found": measure(folder),
        "parameters": size_of(folder),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }


def measure_predict() -> dict[str, Any]:
    """Throughput of prepared batches."""
    with tempfile.TemporaryDirectory() as folder:
        images = digits_folder(Path(folder) / "digits")
        adapter = classify(
            ClassifyConfig(images=str(images), output=str(Path(folder) / "run"), steps=2, **LORA)
        ).adapter
        bare = open_backbone("emoji-vit")
        bare.new_head(10, 0)
        one, eight = load_classifier(adapter), load_classifier({f"t{i}": adapter for i in range(8)})
    x = torch.randn(64, 3, 64, 64)
    mixed = [f"t{i % 8}" for i in range(64)]

    def plain() -> object:
        with torch.no_grad():
            return as_logits(bare.model(x))

    contestants: dict[str, Callable[[], object]] = {
        "bare": plain,
        "one": lambda: one.logits(x),
        "eight, one used": lambda: eight.logits(x, "t3"),
    }
    t = take_turns(contestants, turns=25)
    mixed_t = take_turns({"bare": plain, "eight, all used": lambda: eight.logits(x, mixed)}, turns=9)
    names = [f"t{i}" for i in range(8)]

    def switch() -> None:
        for name in names:
            eight.logits(x[:1], name)

    def stay() -> None:
        for _ in names:
            eight.logits(x[:1], "t0")

    switches = take_turns({"switch": switch, "stay": stay}, turns=9)
    return {
        "batch": len(x),
        "bare_pictures_per_second": len(x) / t["bare"],
        "one_over_bare": t["one"] / t["bare"],
        "eight_over_bare": t["eight, one used"] / t["bare"],
        "mixed_batch_over_bare": mixed_t["eight, all used"] / mixed_t["bare"],
        "switch_ms": 1000 * (switches["switch"] - switches["stay"]) / len(names),
    }


def measure_index() -> dict[str, Any]:
    """Many small files, in a process whose memory is watched."""
    with tempfile.TemporaryDirectory() as folder:
        root, random = Path(folder), np.random.default_rng(0)
        for i in range(FILES):
            place = root / "data" / f"{i % 20:02d}"
            if i < 20:
                place.mkdir(parents=True)
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(place / f"{i}.png", compress_level=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        data = read_labelled(root / "data")
        indexed = time.perf_counter() - start
        seconds: Sequence[float] = []
        for _ in range(2):
            start = time.perf_counter()
            check_pictures(data, Preprocessing(64), root / "cache")
            seconds = [*seconds, time.perf_counter() - start]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "files": FILES,
        "index_s": indexed,
        "first_check_s": seconds[0],
        "second_check_s": seconds[1],
        "decoded_mib": FILES * 64 * 64 * 3 / 2**20,
        "memory_grew_mib": (after - before) / 2**10,
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "digits": measure_digits,
    "digits-auto": measure_digits_auto,
    "styles": measure_styles,
    "rank": measure_rank,
    "retrieval": measure_retrieval,
    "predict": measure_predict,
    "index": measure_index,
}


if __name__ == "__main__":
    run_parts("classify", PARTS, __doc__)
