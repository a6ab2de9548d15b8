"""Does the embedded base model draw what it is asked for?

    python benchmarks/prompt_fidelity.py

- VAE: PSNR on held-out pictures of each style (the VAE saw none of them).
- Prompts: 200 captions of the base style, one picture each. The nearest picture of the whole base set, by the features of
  `emoji-vit`, should have that caption.
- A grid of 16 well-known prompts to look at: assets/emoji-64/samples.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from judge import features
from PIL import Image
from record import record
from visionlora.assets.build_emoji64 import STYLES, base_set, psnr, read_split

from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.models.base import open_base
from visionlora.report.grid import draw_grid

WELL_KNOWN = (
    "dog face", "red heart", "pizza", "rocket", "cat face", "red apple", "automobile", "sunflower",
    "penguin", "guitar", "umbrella", "hamburger", "fish", "house", "airplane", "skull",
)  # fmt: skip
PROMPTS = 200


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--grid", type=Path, default=Path(__file__).parents[1] / "assets" / "emoji-64" / "samples.png")
    args = parser.parse_args()
    base = open_base(args.model)
    quality = {style: round(psnr(base.pipe.vae, read_split(style, "heldout")[0]), 2) for style in STYLES}
    print("VAE, PSNR on held-out pictures (dB):", quality)

    pictures, captions = base_set()
    everything = features([Image.fromarray(p) for p in pictures])
    chosen = np.random.default_rng(0).permutation(len(captions))[:PROMPTS]
    sampling = SamplingConfig(args.steps, args.guidance_scale, seed=0, batch_size=25)
    start = time.monotonic()
    drawn = draw(base, [captions[i] for i in chosen], base.resolution, sampling)
    seconds = (time.monotonic() - start) / PROMPTS
    order = np.argsort(-features(drawn) @ everything.T, axis=1)
    rank = (order == chosen[:, None]).argmax(axis=1)
    top1, top5 = float((rank == 0).mean()), float((rank < 5).mean())
    print(f"{PROMPTS} prompts of {len(captions)}: top-1 {top1:.1%}, top-5 {top5:.1%}, {seconds:.2f} s a picture")
    print("missed:", ", ".join(captions[i] for i, r in zip(chosen, rank, strict=True) if r >= 5))

    famous = draw(base, list(WELL_KNOWN), base.resolution, sampling)
    cells = [famous[i : i + 8] for i in (0, 8)]
    grid = draw_grid(cells, ["", ""], [f"{a} / {b}" for a, b in zip(WELL_KNOWN[:8], WELL_KNOWN[8:], strict=True)],
                     title="emoji-64: sixteen prompts, one seed")  # fmt: skip
    grid.save(args.grid)
    print("grid:", args.grid)
    if args.model == "emoji-64":
        record("prompt_fidelity", {
            "vae_psnr_db": quality, "prompts": PROMPTS, "pictures": len(captions), "feature": "emoji-vit, cosine",
            "top1": top1, "top5": top5, "steps": args.steps, "guidance_scale": args.guidance_scale,
            "seconds_per_picture": round(seconds, 3),
        })  # fmt: skip


if __name__ == "__main__":
    main()
