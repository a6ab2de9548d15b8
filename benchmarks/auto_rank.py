"""Does `rank: auto` reach a lower held-out loss than the same rank everywhere, at equal parameters?

    python benchmarks/auto_rank.py

On the embedded model, for each style and seed: two adapters with the recipe `emoji64_style` for `STEPS` steps, one of
uniform rank and one whose ranks were measured on the training pictures, with the same budget of parameters. Compared on
the held-out concepts of the style, at fixed timesteps and noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from record import record
from visionlora.pipelines.train_sd import train_sd

from visionlora.config import TrainSDConfig, build, read_yaml
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.encode import encode_dataset
from visionlora.diffusion.validation import LEVELS, losses_at
from visionlora.loaders import apply, load_adapter
from visionlora.models.base import open_base

STYLES = Path(__file__).parents[1] / "assets" / "styles"
LEARNED = ("fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
SEEDS = (0, 1, 2)
STEPS, RANK, TARGETS = 100, 4, "attn,mlp,proj"


def held_out_loss(style: str, adapter: Path | None) -> float:
    """Mean loss on the held-out concepts; of the base alone where there is no adapter."""
    base = open_base("emoji-64")
    data = encode_dataset(base, read_image_folder(STYLES / style / "heldout").items, base.resolution)
    if adapter is not None:
        apply(base, load_adapter(adapter))
    return float(losses_at(base.pipe.unet, base.noise_scheduler, data, LEVELS, seed=0).mean())


def trained(style: str, seed: int, rank: int | str, folder: Path) -> tuple[float, int]:
    """Held-out loss and parameters of one adapter."""
    settings = {"images": str(STYLES / style / "train"), "output": str(folder), "steps": STEPS, "rank": rank,
                "rank_budget": str(RANK), "targets": TARGETS, "seed": seed, "sample_columns": 1,
                "sample_steps": 1, "sample_prompts": ["dog"]}  # fmt: skip
    run = train_sd(build(TrainSDConfig, read_yaml("emoji64_style"), settings))
    adapter = load_adapter(run.adapter)
    parameters = sum(t.numel() for m in adapter.modules.values() for t in m.tensors.values())
    return held_out_loss(style, run.adapter), parameters


def main() -> None:
    """Trains, compares, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results: dict[str, object] = {"steps": STEPS, "mean_rank": RANK, "targets": TARGETS}
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        for style in LEARNED:
            rows = []
            for seed in SEEDS:
                (uniform, n), (auto, m) = (
                    trained(style, seed, rank, Path(temporary) / f"{style}-{seed}-{rank}") for rank in (RANK, "auto")
                )
                rows.append({"seed": seed, "uniform": uniform, "auto": auto, "parameters": [n, m]})
                ratios.append(auto / uniform)
                print(style, rows[-1], flush=True)
            results[style] = rows
    results["auto_over_uniform"] = statistics.mean(ratios)
    results["auto_better_in"] = sum(r < 1 for r in ratios) / len(ratios)
    print("auto over uniform:", results["auto_over_uniform"], "better in", results["auto_better_in"])
    print("recorded:", record("auto_rank", results))


if __name__ == "__main__":
    main()
