"""train-sd killed at any moment and resumed ends in the bytes of a run that was never cut off."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora.errors import ConfigError, RunFolderError
from visionlora.report.listener import Listener

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers

SETTINGS = {"rank": 2, "steps": 12, "batch_size": 2, "checkpoints": 6, "sample_columns": 2, "sample_steps": 1,
            "dropout": 0.1, "ema_decay": 0.9, "learning_rate": 0.01, "val_share": 0.3}  # fmt: skip
FILES = ("adapter.safetensors", "grid.png", "config.yaml", "validation.jsonl", "checkpoints/best.safetensors")


class Killed(BaseException):
    """As sudden as a power cut, within one process."""


class Killer(Listener):
    """Ends the run at its n-th word."""

    def __init__(self, words: int) -> None:
        self.words = words

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        self.words -= 1
        if not self.words:
            raise Killed


@pytest.fixture(autouse=True)
def one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def config(tiny_model: Path, dogs: Path, output: Path, **more: object) -> vl.TrainSDConfig:
    return vl.TrainSDConfig(
        **{"images": str(dogs), "model": str(tiny_model), "output": str(output), **SETTINGS, **more}
    )


def resumed(folder: Path, **more: object) -> vl.TrainSDConfig:
    return vl.TrainSDConfig(**{"images": "x", "resume": str(folder), **more})


@pytest.fixture
def whole(tiny_model: Path, dogs: Path, tmp_path: Path) -> Path:
    return train_sd(config(tiny_model, dogs, tmp_path / "whole")).folder


@pytest.mark.parametrize("seed", range(8))
def test_cut_off_at_any_word(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, seed: int) -> None:
    """Cut off several times in a row, wherever the run then is: also before its first checkpoint."""
    dice, folder = random.Random(seed), tmp_path / "cut"
    try:
        train_sd(config(tiny_model, dogs, folder), Killer(dice.randint(6, 20)))
    except Killed:
        for _ in range(3):
            if not (folder / "checkpoints" / "state.pt").exists():
                with pytest.raises(RunFolderError, match=r"Start it anew|no run that can be resumed"):
                    train_sd(resumed(folder))
                return
            try:
                train_sd(resumed(folder), Killer(dice.randint(3, 12)))
                break
            except Killed:
                continue
        else:
            train_sd(resumed(folder))
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole)]
    assert [m["loss"] for m in lines[0]] == [m["loss"] for m in lines[1]]


def test_sigterm_saves_and_says_how_to_go_on(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, cli) -> None:
    words = [f"{k}={v}" for k, v in SETTINGS.items()]
    command = [
        sys.executable,
        "-m",
        "visionlora",
        "train-sd",
        "--images",
        dogs,
        "--model",
        tiny_model,
        "--output",
        "cut",
    ]
    process = subprocess.Popen(
        [*map(str, command), *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if lines.exists() and len(lines.read_bytes().splitlines()) > 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    if process.returncode != 0:  # a fast machine may have finished
        assert process.returncode == 130 and "Go on with: visionlora train-sd --resume cut" in out, out
        code, out, err = cli("train-sd", "--resume", "cut")
        assert code == 0, err
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def test_what_cannot_be_resumed(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(RunFolderError, match="is finished"):
        train_sd(resumed(whole))
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))
    with pytest.raises(ConfigError, match="A resumed run keeps its settings, but rank is 4 here and was 2"):
        train_sd(resumed(folder, rank=4))
    next(dogs.glob("*.png")).unlink()
    with pytest.raises(ConfigError, match="pictures or captions have changed"):
        train_sd(resumed(folder))


def test_cut_off_before_the_first_step(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "cut"

    class AtTheFirstStep(Listener):
        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            if what == "Training":
                raise Killed

    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), AtTheFirstStep())
    assert train_sd(resumed(folder)).folder == folder
    assert (folder / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def test_cut_off_after_it_had_stopped_by_itself(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 100.0, "patience": 2, "steps": 12, "checkpoints": 12}
    runs = [tmp_path / "whole", tmp_path / "cut"]
    train_sd(config(tiny_model, dogs, runs[0], **settings))

    class AtTheEnd(Listener):
        def say(self, line: str) -> None:
            if line.startswith("Stopped at step"):
                raise Killed

    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, runs[1], **settings), AtTheEnd())
    train_sd(resumed(runs[1]))
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in runs]
    assert len(lines[0]) == len(lines[1]) < 12
    assert (runs[0] / "adapter.safetensors").read_bytes() == (runs[1] / "adapter.safetensors").read_bytes()
