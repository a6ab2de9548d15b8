"""Does an adapter learn a style, and carry it to concepts it never saw in that style?

    python benchmarks/style_transfer.py                 train the three adapters and measure them
    python benchmarks/style_transfer.py --committed     measure the adapters under assets/adapters
    python benchmarks/style_transfer.py --save          also store the trained adapters there

Each adapter is trained by train-sd with the recipe `emoji64_style` on the training split of one style. On the held-out
concepts (a) the denoising loss at fixed timesteps and noise, base against adapter; (b) the style that a classifier sees
in pictures of them, at scale 0, 0.5 and 1; (c) whether the concept is kept: the nearest real picture of that style, and
of the base style, by the features of `emoji-vit`. The classifier was trained on real pictures of the training split, half of
them sent through the VAE, which softens every drawn picture; what it sees in real held-out pictures of each style is printed
beside, and how often the concept of these is found.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from judge import StyleClassifier, features, nearest, predict, shares, train_classifier
from PIL import Image
from record import record
from torch import Tensor
from visionlora.assets.build_emoji64 import STYLES, base_set, read_split, to_tensor
from visionlora.pipelines.train_sd import train_sd

from visionlora.config import TrainSDConfig, build, parse_words, read_yaml
from visionlora.data.folder import read_image_folder
from visionlora.diffusion.encode import encode_dataset
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.diffusion.validation import LEVELS, losses_at
from visionlora.loaders import apply, load_adapter
from visionlora.models.base import open_base
from visionlora.report.grid import draw_grid

ASSETS = Path(__file__).parents[1] / "assets"
LEARNED = ("fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
SCALES = (0.0, 0.5, 1.0)


def measure(
    style: str, adapter: Path, classifier: StyleClassifier, cells: int = 8
) -> tuple[dict[str, object], Image.Image]:
    """All numbers of one adapter, and a grid of held-out concepts: base, half, full, and the real picture."""
    base = open_base("emoji-64")
    folder = read_image_folder(ASSETS / "styles" / style / "heldout")
    data = encode_dataset(base, folder.items, base.resolution)
    captions = [item.caption for item in folder.items]
    real = [read_split(style, split) for split in ("train", "heldout")]
    real_captions = [c for _, part in real for c in part]
    real_features = features([Image.fromarray(p) for part, _ in real for p in part])
    base_pictures, base_captions = base_set()
    base_features = features([Image.fromarray(p) for p in base_pictures])

    def loss() -> Tensor:
        return losses_at(base.pipe.unet, base.noise_scheduler, data, LEVELS, seed=0)

    before = loss()
    (handle,) = apply(base, load_adapter(adapter))
    after = loss()
    result: dict[str, object] = {
        "held_out_pictures": len(captions),
        "loss_base": float(before.mean()),
        "loss_adapter": float(after.mean()),
        "loss_reduction": float(1 - after.mean() / before.mean()),
        "loss_reduction_by_timestep": dict(
            zip(map(str, LEVELS), (1 - after.mean(0) / before.mean(0)).tolist(), strict=True)
        ),
    }
    originals = [Image.open(item.path).convert("RGB") for item in folder.items]
    real_found = nearest(features(originals), base_features, base_captions, captions)
    result["real_base_concept_top1"] = float(real_found[:, 0].mean())
    result["real_base_concept_top5"] = float(real_found.any(1).mean())
    columns = []
    for scale in SCALES:
        handle.set_scale(scale)
        drawn = draw(base, captions, base.resolution, SamplingConfig(20, base.suggested["guidance_scale"], 0, 25))
        columns.append(drawn)
        seen = predict(classifier, to_tensor(np.stack([np.asarray(p) for p in drawn])))
        own = features(drawn)
        found = nearest(own, real_features, real_captions, captions)
        found_in_base = nearest(own, base_features, base_captions, captions)
        result[f"scale_{scale:g}"] = {
            "seen_as_this_style": float((seen == STYLES.index(style)).float().mean()),
            "seen_as": shares(seen),
            "concept_top1": float(found[:, 0].mean()),
            "concept_top5": float(found.any(1).mean()),
            "base_concept_top1": float(found_in_base[:, 0].mean()),
            "base_concept_top5": float(found_in_base.any(1).mean()),
        }
    shown = np.linspace(0, len(captions) - 1, cells).astype(int)
    grid = draw_grid(
        [[column[i] for i in shown] for column in (*columns, originals)],
        ["base", "scale 0.5", "scale 1", "the style's own picture"], [captions[i] for i in shown],
        title=f"{style}: concepts never seen in this style",
    )  # fmt: skip
    return result, grid


def main() -> None:
    """Trains, measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--committed", action="store_true", help="measure assets/adapters instead of training")
    parser.add_argument("--save", action="store_true", help="store the trained adapters under assets/adapters")
    parser.add_argument("--styles", nargs="+", default=LEARNED, choices=LEARNED)
    parser.add_argument("settings", nargs="*", help="key=value, on top of the recipe emoji64_style")
    args = parser.parse_args()
    classifier, real = train_classifier()
    print("style classifier on real held-out pictures:", real)
    results: dict[str, object] = {"real_seen_as": real, "timesteps": LEVELS}
    with tempfile.TemporaryDirectory() as temporary:
        for style in args.styles:
            adapter = ASSETS / "adapters" / style / "adapter.safetensors"
            if not args.committed:
                images = str(ASSETS / "styles" / style / "train")
                config = build(TrainSDConfig, read_yaml("emoji64_style"), parse_words(args.settings, TrainSDConfig),
                               {"images": images, "output": f"{temporary}/{style}"})  # fmt: skip
                run = train_sd(config)
                print(f"{style}: trained in {run.seconds:.0f} s")
                if args.save:
                    adapter.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(run.adapter, adapter)
                else:
                    adapter = run.adapter
            result, grid = measure(style, adapter, classifier)
            results[style] = result
            print(f"{style}: held-out loss down by {result['loss_reduction']:.1%}")
            for scale in SCALES:
                print(f"  scale {scale:g}: {result[f'scale_{scale:g}']}")
            folder = Path(__file__).parent / "results"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"style_transfer_{style}.png")
    if set(args.styles) == set(LEARNED) and not args.settings:
        print("recorded:", record("style_transfer", results))


if __name__ == "__main__":
    main()
