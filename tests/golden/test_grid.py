"""A small grid drawn by the real command on the embedded model, compared with a committed picture."""

from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).with_name("train_sd_grid.png")
DOGS = Path(__file__).parents[2] / "assets" / "dog"


def test_the_grid_of_a_short_run_looks_as_it_did(cli, tmp_path: Path, regenerate_golden: bool) -> None:
    code, _, err = cli("train-sd", "--images", DOGS, "--config", "emoji64_dog", "--steps", 12, "sample_steps=8",
                       "sample_columns=1", "batch_size=4", "--output", tmp_path / "run",
                       "--model", "emoji-64")  # fmt: skip
    assert code == 0, err
    drawn = Image.open(tmp_path / "run" / "grid.png").convert("RGB")
    if regenerate_golden:
        drawn.save(GOLDEN, optimize=True)
    golden = Image.open(GOLDEN).convert("RGB")
    assert drawn.size == golden.size
    # Floating point differs in the last bits between processors: compare what an eye sees, 4x4 px at a time.
    small = [np.asarray(p.reduce(4), dtype=np.float32) for p in (drawn, golden)]
    difference = np.abs(small[0] - small[1])
    assert difference.mean() < 0.5, f"mean difference {difference.mean():.2f} of 255"
    assert difference.max() < 24, f"largest difference {difference.max():.0f} of 255"
