"""Whole runs with other optimizers and a tracker: cut off and resumed they end in the same bytes and the same curves."""

import json
from pathlib import Path

import pytest
from visionlora.pipelines.classify import classify
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl

from ..doubles import Ears

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers and tensorboard

TRACKED = {"loss", "learning_rate", "grad_norm", "images_per_second"}


class Killed(BaseException):
    """As sudden as a power cut, within one process."""


class Heard(Ears):
    """Keeps what is said, and ends the run at a step."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last = last

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what.startswith("Training") and done == self.last:
            raise Killed


@pytest.fixture(autouse=True)
def one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "logs" / "visionlora"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def check_curves(folder: Path, steps: int, evaluations: int) -> None:
    """TensorBoard has every step of metrics.jsonl once, and every evaluation."""
    found = curves(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found.keys() >= TRACKED | {"validation_loss"}
    assert [step for step, _ in found["loss"]] == [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [value for _, value in found["loss"]] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert len(found["validation_loss"]) == evaluations


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["schedulefree", "prodigy", "lion"])
def test_train_sd(optimizer: str, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    package = {"lion": "lion_pytorch", "prodigy": "prodigyopt"}.get(optimizer, optimizer)
    for name in ("tensorboard", package):
        pytest.importorskip(name)
    runs = [tmp_path / "whole", tmp_path / "cut"]
    whole, cut = (
        vl.TrainSDConfig(
            images=str(dogs), model=str(tiny_model), output=str(run), optimizer=optimizer, trackers=("tensorboard",),
            rank=2, steps=50, batch_size=2, checkpoints=5, sample_columns=1, sample_steps=1, val_share=0.3,
        )
        for run in runs
    )  # fmt: skip
    heard = Heard()
    train_sd(whole, heard)
    with pytest.raises(Killed):
        train_sd(cut, Heard(27))
    train_sd(vl.TrainSDConfig(images=str(dogs), resume=str(runs[1])), Heard())
    for name in ("adapter.safetensors", "validation.jsonl", "checkpoints/best.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    notes = [json.loads((run / "run.json").read_text())["noise_scale"] for run in runs]
    assert notes[0] == notes[1]
    assert any(line.startswith(f"Optimizer {optimizer}, schedule ") for line in heard.lines)
    for run in runs:
        check_curves(run, 50, 6)


def test_classify(tiny_vit: Path, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("schedulefree")
    heard = Heard()
    found = classify(
        vl.ClassifyConfig(
            images=str(shapes), model=str(tiny_vit), output=str(tmp_path / "run"), optimizer="schedulefree",
            trackers=("tensorboard",), rank=2, steps=60, batch_size=8, evaluations=3, baselines=("none",),
        ),
        heard,
    )  # fmt: skip
    check_curves(found.folder, 60, 4)
    settings = json.loads((found.folder / "run.json").read_text())
    told = [line for line in heard.lines if line.startswith("Gradient noise: ")]
    assert len(told) == 1 and ("at least" in told[0]) == (settings["noise_scale"] is None)
