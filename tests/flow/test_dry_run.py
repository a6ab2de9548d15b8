"""`train-sd --dry-run`: says what a run would do, close to what it then does, and writes nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from visionlora.pipelines.classify_dry_run import classify_dry_run
from visionlora.pipelines.dry_run import dry_run

from visionlora.config import ClassifyConfig, TrainSDConfig, build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers
FIGURES = r"(\d[\d,.]*)"


def figure(out: str, pattern: str) -> float:
    found = re.search(pattern.replace("#", FIGURES), out)
    assert found, f"{pattern!r} is not in:\n{out}"
    return float(found[1].replace(",", ""))


def test_it_says_what_the_run_would_do_and_writes_nothing(cli, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--steps", 30, "--rank", 2, "--dry-run",
                         "--batch-size", 2)  # fmt: skip
    assert code == 0, err
    assert figure(out, r"Targets     attn: # layers") == 32
    assert "Pictures    3, width x height in px: 32x32: 3" in out
    assert "Steps       30 of 2 pictures, 20.0 times over all pictures" in out
    assert figure(out, "Time        # minutes") >= 0 and figure(out, "Memory      # GiB") > 0.1
    assert (
        "GiB: latents of 3 pictures 0.00, text of 2 captions 0.00" in out and figure(out, "its disk has # GiB free") > 0
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_of_the_class_and_to_judge_by_count(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    own = {"images": str(dogs), "model": str(tiny_model), "steps": 2, "batch_size": 2, "rank": 2, "sample_columns": 0}
    (tmp_path / "class").mkdir()
    shutil.copy(next(dogs.glob("*.png")), tmp_path / "class" / "there.png")
    shutil.copytree(tmp_path / "class", tmp_path / "judge")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "judge" / "there.png")
    plain = dry_run(build(TrainSDConfig, own))
    more = {"prior_prompt": "a pet", "prior_images": str(tmp_path / "class"), "prior_count": 5}
    found = dry_run(build(TrainSDConfig, {**own, **more, "validation": str(tmp_path / "judge")}))
    assert (plain.beside, found.beside) == (0, 6)
    assert found.captions == plain.captions + 1, (
        "the class's; the picture to judge by has none and is read under training's"
    )
    assert found.latent_bytes == 3 * plain.latent_bytes
    assert plain.class_seconds == 0 < found.class_seconds < found.seconds
    assert plain.validation_seconds == 0 < found.validation_seconds < found.seconds
    assert "s on validation pictures, " in found.lines()[4] and "validation" not in plain.lines()[4]
    assert "latents of 9 pictures" in found.lines()[-1] and len(list((tmp_path / "class").iterdir())) == 1


@pytest.mark.parametrize(("kind", "budget"), [("train-sd", "12k"), ("train-sd", "1M"), ("classify", "0.01MB")])
def test_rank_auto_is_counted_by_its_budget(
    kind: str, budget: str, tiny_model: Path, tiny_vit: Path, dogs: Path, shapes: Path
) -> None:
    own = {"steps": 1, "batch_size": 1, "rank": "auto", "rank_budget": budget}
    if kind == "train-sd":
        more = {"images": str(dogs), "model": str(tiny_model), "sample_columns": 0, "train_text_encoder": True}
        trained = dry_run(build(TrainSDConfig, {**own, **more})).trained_parameters
    else:
        found = classify_dry_run(build(ClassifyConfig, {**own, "images": str(shapes), "model": str(tiny_vit)}))
        trained = found.trained_parameters - 25 * 3  # of the head
    low, high = {"12k": (9_000, 12_000), "1M": (12_001, 100_000), "0.01MB": (2_400, 2_621)}[budget]
    assert low < trained <= high


@pytest.mark.parametrize("kind", ["train-sd", "classify"])
def test_a_batch_larger_than_memory_is_foretold_not_tried(
    kind: str, tiny_model: Path, tiny_vit: Path, dogs: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2**27
    monkeypatch.setattr("visionlora.training.memory.free_memory", lambda device: free)
    own = {"steps": 2, "batch_size": 1_000_000}
    found: Any
    if kind == "train-sd":
        found = dry_run(
            build(TrainSDConfig, {**own, "images": str(dogs), "model": str(tiny_model), "sample_columns": 0})
        )
    else:
        found = classify_dry_run(build(ClassifyConfig, {**own, "images": str(shapes), "model": str(tiny_vit)}))
    assert found.pictures_per_step == 1_000_000 and found.peak_bytes > free and found.step_seconds > 0
    (line,) = [line for line in found.lines() if line.startswith("Memory")]
    assert 1 <= figure(line, "batch_size=#") < 1_000_000
    assert ("auto_batch=true" in line) == (kind == "train-sd")


def test_what_cannot_train_is_refused_as_the_run_would(cli, tiny_model: Path, dogs: Path) -> None:
    code, _, err = cli("train-sd", "--images", dogs, "--model", tiny_model, "--dry-run", "--resolution", 33)
    assert code == 2 and "A resolution of 33 px does not fit" in err


def test_a_figure_that_the_labels_have_not_is_refused_as_by_the_run(cli, tiny_vit: Path, shapes: Path) -> None:
    code, _, err = cli("classify", "--images", shapes, "--model", tiny_vit, "--dry-run", "select_by=map")
    assert (
        code == 2
        and "'map' does not apply to pictures with one label each. Allowed: balanced_accuracy, loss, macro_f1, top1."
        in err
    )


MEASURED = """
import resource, sys
from visionlora.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit:
    pass
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
def test_the_memory_is_that_of_the_run(tmp_path: Path) -> None:
    dogs = Path(__file__).parents[2] / "assets" / "dog"
    words = ["train-sd", "--images", str(dogs), "--model", "emoji-64", "--steps", "20", "--batch-size", "64"]
    told, real = (
        subprocess.run(
            [sys.executable, "-c", MEASURED, *words, *more], cwd=tmp_path, capture_output=True, text=True
        ).stdout
        for more in (["--dry-run"], ["--output", "run"])
    )
    estimate = figure(told, "Memory      # GiB") * 2**30
    assert estimate == pytest.approx(figure(real, "peak #"), rel=0.15)
