"""Does T-LoRA learn a subject from one picture with less of the damage that a LoRA does?

    python benchmarks/one_picture.py             about ten minutes on two cores
    python benchmarks/one_picture.py --trial     one subject; not recorded

On the embedded model: each subject is one picture, drawn in a style that the base does not know, learned with `train-sd`
as LoRA, as LoRA of half the rank, and as T-LoRA between the two, all else being equal. What is learned: how near pictures
of the subject, drawn from other seeds, come to it (mean absolute difference of the pixels, 0 to 1, lower is nearer). What is
damaged: prompts for other things. A concept counts as kept when its picture is among the 5 nearest to what is drawn, of all
pictures of the base style, and as overrun when the subject's is the nearest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from judge import features, nearest
from PIL import Image
from record import record
from visionlora.assets.build_emoji64 import base_set, read_split
from visionlora.pipelines.train_sd import train_sd

from visionlora.config import TrainSDConfig
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.loaders import apply, load_adapter
from visionlora.models.base import open_base
from visionlora.report.grid import draw_grid

SUBJECTS = (
    ("fluent-emoji-flat", 3), ("fluent-emoji-flat", 40), ("fluent-emoji-flat", 90),
    ("fluent-emoji-high-contrast", 3), ("fluent-emoji-high-contrast", 40), ("fluent-emoji-high-contrast", 90),
)  # fmt: skip
"""A style, and which of its training pictures."""
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, rank 8": {"method": "lora", "rank": 8},
    "LoRA, rank 4": {"method": "lora", "rank": 4},
    "T-LoRA, rank 4 to 8": {"method": "tlora", "rank": 8, "min_rank": 4, "init": "orthogonal"},
}
SHARED: dict[str, Any] = {"steps": 200, "batch_size": 4, "learning_rate": 2e-3, "targets": "attn,mlp", "seed": 0}
OTHERS, SEEDS = 40, 4
"""Prompts for other things, and pictures of the subject."""


def others_than(caption: str) -> tuple[np.ndarray[Any, Any], list[str], list[int]]:
    """Features and captions of all base pictures, and positions of some that are not the subject's."""
    pictures, captions = base_set()
    found = features([Image.fromarray(p) for p in pictures])
    spread = np.linspace(0, len(captions) - 1, OTHERS + 1).astype(int).tolist()
    return found, captions, [i for i in spread if captions[i] != caption][:OTHERS]


def measure(style: str, number: int, work: Path) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Every method on one subject, and some pictures of each."""
    pictures, captions = read_split(style, "train")
    subject, caption = Image.fromarray(pictures[number]), captions[number]
    folder = work / f"{style}-{number}"
    folder.mkdir()
    subject.save(folder / "subject.png")
    real, names, positions = others_than(caption)
    wanted = [names[i] for i in positions]
    pixels, found, rows = np.asarray(subject, dtype=float) / 255, {}, []
    for method, settings in METHODS.items():
        config = TrainSDConfig(
            images=str(folder), prompt=caption, model="emoji-64", sample_columns=0, checkpoints=1,
            output=str(work / f"{folder.name} {method}"), **SHARED, **settings,
        )  # fmt: skip
        base = open_base("emoji-64")
        apply(base, load_adapter(train_sd(config).adapter))
        guidance = base.suggested["guidance_scale"]
        own = [draw(base, [caption], 64, SamplingConfig(20, guidance, seed))[0] for seed in range(1, SEEDS + 1)]
        drawn = draw(base, wanted, 64, SamplingConfig(20, guidance, 0, 20))
        seen = features(drawn)
        found[method] = {
            "difference": statistics.mean(float(np.abs(np.asarray(p) / 255 - pixels).mean()) for p in own),
            "kept_top5": float(nearest(seen, real, names, wanted).any(1).mean()),
            "overrun": float(nearest(seen, real, names, [caption] * len(wanted))[:, 0].mean()),
        }
        print(style, caption, method, found[method], flush=True)
        rows.append([subject, *own[:2], *drawn[::8]])
    return {"style": style, "caption": caption, **found}, rows


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="one subject; nothing is recorded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measured = [measure(*subject, Path(work)) for subject in (SUBJECTS[:1] if args.trial else SUBJECTS)]
    runs = [run for run, _ in measured]
    means = {
        method: {key: statistics.mean(run[method][key] for run in runs) for key in runs[0][method]}
        for method in METHODS
    }
    print(means)
    sheet = draw_grid(
        measured[0][1], list(METHODS), ["the one picture", "seed 1", "seed 2", *["something else"] * (OTHERS // 8)],
        title=f"{runs[0]['caption']}, learned from one picture",
    )  # fmt: skip
    if args.trial:
        sheet.save(Path(tempfile.gettempdir()) / "one_picture.png")
        return
    sheet.save(Path(__file__).parent / "results" / "one_picture.png")
    print("recorded:", record("one_picture", {"runs": runs, "means": means, "settings": SHARED}))


if __name__ == "__main__":
    main()
