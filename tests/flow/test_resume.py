"""train-sd killed at any moment and resumed ends in the bytes of a run that was never cut off."""

import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora.errors import ConfigError, RunFinished, RunFolderError, TrainingError, VisionLoRAError
from visionlora.report.listener import Listener
from visionlora.report.logbook import Logbook
from visionlora.training.checkpoint import STATE_FILE, read_state, write_state
from visionlora.training.loop import Fit, Progress

from ..doubles import Ears, not_finite_after

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


def test_it_goes_on_when_the_adapter_that_it_learns_on_from_is_gone(
    tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path
) -> None:
    first = tmp_path / "first.safetensors"
    shutil.copy(whole / "adapter.safetensors", first)
    expected = train_sd(config(tiny_model, dogs, tmp_path / "uncut", start_from=str(first))).folder
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, tmp_path / "cut", start_from=str(first)), Killer(16))
    first.unlink()
    train_sd(resumed(tmp_path / "cut"))
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (expected / "adapter.safetensors").read_bytes()


def test_begun_anew_it_keeps_the_adapter_that_it_then_learns_on_from(
    tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path
) -> None:
    first, folder = tmp_path / "first.safetensors", tmp_path / "cut"
    shutil.copy(whole / "adapter.safetensors", first)
    for words in range(1, 30):  # cut off when the copy is there and no step was done
        with pytest.raises(Killed):
            train_sd(config(tiny_model, dogs, folder, start_from=str(first), resume="auto"), Killer(words))
        if (folder / "start.safetensors").exists():
            break
    assert not (folder / "checkpoints" / "state.pt").exists()
    before = vl.load_adapter(first)
    vl.save_adapter(vl.merge_adapters([(before, 0.5)]).adapter, first)
    train_sd(config(tiny_model, dogs, folder, start_from=str(first), resume="auto"))
    name, kept = next(iter(before.modules)), vl.load_adapter(folder / "start.safetensors")
    found = [a.modules[name].delta_weight() for a in (kept, vl.load_adapter(first), before)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


ASKED_TO_END = """
import os, signal
from visionlora.cli.main import main
from visionlora.report.logbook import Logbook

add = Logbook.add

def add_and_ask(self, progress, *more):
    add(self, progress, *more)
    if progress.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)

Logbook.add = add_and_ask
main()
"""


def test_sigterm_saves_and_says_how_to_go_on(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, cli) -> None:
    words = ["train-sd", "--images", dogs, "--model", tiny_model, "--output", "cut"]
    done = subprocess.run(
        [sys.executable, "-c", ASKED_TO_END, *map(str, words), *(f"{k}={v}" for k, v in SETTINGS.items())],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 130 and "Interrupted at step 3 of 12" in done.stdout, done.stdout + done.stderr
    assert "Go on with: visionlora train-sd --resume cut" in done.stdout
    code, out, err = cli("train-sd", "--resume", "cut")
    assert code == 0 and "Going on at step 3 of 12." in out, err
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def test_losses_that_are_not_finite_cost_the_steps_that_had_them_alone(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fit, "advance", not_finite_after(7, 0.005))
    folder = tmp_path / "run"
    asked = config(tiny_model, dogs, folder, checkpoints=1, sample_columns=0)
    with pytest.raises(TrainingError, match="The loss became nan at step 10") as caught:
        train_sd(asked)
    kept = folder / "checkpoints" / "step-000009.safetensors"
    assert f"All up to the last good step is kept; the adapter so far is in {kept}." in str(caught.value)
    assert str(caught.value).endswith(f"visionlora train-sd --resume {folder} --force learning_rate=0.0033")
    assert vl.load_adapter(kept).info["training"]["steps"] == 9
    ears = Ears()
    train_sd(resumed(folder, learning_rate=0.0033, force=True), ears)
    assert "Going on at step 9 of 12." in ears.lines
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [loss is None for loss in losses] == [False] * 7 + [True] * 2 + [False] * 3


def test_weights_that_a_step_has_ruined_do_not_take_the_place_of_good_ones(
    tiny_model: Path, dogs: Path, tmp_path: Path
) -> None:
    """They were kept as those of the last good step, and no rate was low enough to go on."""
    folder = tmp_path / "run"
    asked = config(tiny_model, dogs, folder, checkpoints=12, sample_columns=0, learning_rate=1000.0, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"The gradient became (inf|nan) at step \d") as caught:
        train_sd(asked)
    assert "have ruined the weights. What was learned up to step 0 is kept;" in str(caught.value)
    assert (
        not list((folder / "checkpoints").glob("step-*.safetensors")) and not (folder / "adapter.safetensors").exists()
    )
    ears = Ears()
    train_sd(resumed(folder, learning_rate=0.001, force=True), ears)
    assert "Going on at step 0 of 12." in ears.lines
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and None not in losses


def test_a_moment_whose_step_is_lost_is_made_up_for(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the moment before was told as that at the end."""
    monkeypatch.setattr(Fit, "advance", not_finite_after(11, 0, until=12))
    folder = tmp_path / "run"
    train_sd(config(tiny_model, dogs, folder, checkpoints=2, sample_columns=0, val_share=0.4))
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 6, 12]


def test_a_moment_is_owed_after_an_interruption_too(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, folder = Logbook.add, tmp_path / "run"

    def add_and_interrupt(self: Logbook, progress: Progress, what: str, detail: str) -> None:
        add(self, progress, what, detail)
        if progress.step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as broken:
        broken.setattr(Fit, "advance", not_finite_after(11, 0, until=12))
        broken.setattr(Logbook, "add", add_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_sd(config(tiny_model, dogs, folder, checkpoints=2, sample_columns=0, val_share=0.4))
    train_sd(resumed(folder))
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 6, 12]


def test_a_moment_that_is_made_up_for_at_the_end_is_owed_no_more(
    tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it wrote its report, the run looked at its last step twice."""
    folder = tmp_path / "run"

    def killed(self: Logbook) -> None:
        raise Killed

    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(Fit, "advance", not_finite_after(11, 0, until=12))
        broken.setattr(Logbook, "end", killed)
        train_sd(config(tiny_model, dogs, folder, checkpoints=2, sample_columns=0, val_share=0.4))
    train_sd(resumed(folder))
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 6, 12]


def test_values_that_are_not_finite_from_the_first_step_on_are_not_blamed_on_the_rate(
    tiny_model: Path, dogs: Path, tmp_path: Path
) -> None:
    asked = config(tiny_model, dogs, tmp_path / "run", sample_columns=0, alpha=1e30)
    with pytest.raises(
        TrainingError, match="so from the first step on, so the learning rate is not the cause"
    ) as caught:
        train_sd(asked)
    assert "--resume" not in str(caught.value) and "too high" not in str(caught.value)


def test_the_seconds_of_a_run_are_of_all_its_parts(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """They were those since it was resumed."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder, sample_columns=0), Killer(15))
    state = read_state(folder / "checkpoints" / "state.pt")
    assert state["run_seconds"] > 0
    write_state(folder / "checkpoints" / "state.pt", state | {"run_seconds": 1000.0})
    result = train_sd(resumed(folder))
    assert result.seconds > 1000 and json.loads((folder / "run.json").read_text())["seconds"] > 1000


def test_no_fewer_steps_than_are_done(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))
    with pytest.raises(ConfigError, match=r"\d steps of this run are done already, more than 2\."):
        train_sd(resumed(folder, steps=2, force=True))


def test_what_cannot_be_resumed(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is finished; .* Start a new one, .*: start_from="):
        train_sd(resumed(whole))
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))
    with pytest.raises(ConfigError, match="- rank: 2 -> 4"):
        train_sd(resumed(folder, rank=4))
    before = (folder / "checkpoints" / "state.pt").read_bytes()
    for picture in dogs.glob("*.png"):
        picture.with_suffix(".txt").write_text("a spotted dog")
    with pytest.raises(
        ConfigError, match=r"changed .*0 added, 0 removed, 3 with other captions.*go on with it by --force"
    ):
        train_sd(resumed(folder))
    assert (folder / "checkpoints" / "state.pt").read_bytes() == before


def test_a_missing_picture_costs_a_column_and_not_the_run(
    tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path
) -> None:
    folder = tmp_path / "cut"

    class AtTheLastStep(Listener):
        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            if what == "Training" and done == total - 1:
                raise Killed

    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), AtTheLastStep())
    with pytest.raises(RunFolderError, match=f"a run that is not finished .*Go on with it: --resume {folder}"):
        train_sd(config(tiny_model, dogs, folder))
    (folder / "samples" / "base_00.png").unlink()
    ears = Ears()
    train_sd(resumed(folder), ears)
    assert "base_00.png is missing, so the grid goes on without the column 'base'." in "\n".join(ears.lines)
    assert (folder / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    assert (folder / "grid.png").is_file()


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
    settings = {"learning_rate": 3.0, "patience": 2, "steps": 12, "checkpoints": 12}
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


# ---------------------------------------------------------------------------------------------------------------- auto


def test_auto_goes_on_until_the_end_and_then_is_success(
    tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, cli
) -> None:
    def auto(killer: Listener) -> None:
        train_sd(config(tiny_model, dogs, tmp_path / "cut", resume="auto"), killer)

    for words in (11, 9, 7):
        with pytest.raises(Killed):
            auto(Killer(words))
    auto(Listener())
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    with pytest.raises(RunFinished):
        auto(Listener())
    code, out, err = cli("train-sd", "--images", dogs, "--output", "cut", "--resume", "auto", "rank=2")
    assert (code, out, err) == (0, "The run in cut is finished; nothing is left to do.\n", "")


def test_pictures_need_not_be_named_again(tiny_model: Path, dogs: Path, tmp_path: Path, cli) -> None:
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, tmp_path / "cut"), Killer(15))
    code, out, err = cli("train-sd", "--output", "cut", "--resume", "auto")
    assert code == 0 and out.startswith("Resuming the run in cut.\n"), err


def test_pictures_may_have_moved(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, cli) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))
    (tmp_path / "album").mkdir()
    dogs.rename(tmp_path / "album" / "dog")
    code, _, err = cli("train-sd", "--images", "album/dog", "--resume", "cut")
    assert code == 0, err
    assert (folder / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def test_a_run_whose_settings_are_gone_says_so(tmp_path: Path, whole: Path, cli) -> None:
    """It said that images are missing."""
    (whole / "config.yaml").unlink()
    (whole / "run.json").unlink()
    code, _, err = cli("train-sd", "--resume", whole)
    assert code == 2 and "images" not in err
    assert (
        "it has no config.yaml. Put that file back, with the settings of the run, or start a new run that learns" in err
    )
    assert f"start_from={whole / 'checkpoints' / 'step-000012.safetensors'}" in err
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        code, _, err = cli("train-sd", "--resume", tmp_path / name)
        assert code == 2 and "is no run that can be resumed: it has no config.yaml. Name a run folder." in err


# --------------------------------------------------------------------------------------------------------------- force


def test_force_changes_settings_and_pictures_and_notes_it(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "cut", {"val_share": 0.0}
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder, **settings), Killer(15))
    (dogs / "0.png").unlink()
    shutil.copy(dogs / "1.png", dogs / "new.png")
    with (dogs / "new.png").open("ab") as file:  # the same picture in other bytes
        file.write(b"more")
    changes = {"steps": 15, "sample_steps": 2, "batch_size": 1, "weight_decay": 0.5}
    train_sd(resumed(folder, **changes, force=True))
    kept, told = yaml.safe_load((folder / "config.yaml").read_text()), json.loads((folder / "run.json").read_text())
    assert {name: kept[name] for name in changes} == changes and kept["force"] is False
    (change,) = told["changes"]
    assert change["what"][:2] == ["steps: 12 -> 15", "weight_decay: 0.01 -> 0.5"]
    assert change["what"][-1] == "pictures: 1 added, 1 removed, 0 with other captions"
    assert f"Changed on the way | at step {change['step']}, steps: 12 → 15" in (folder / "README.md").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 15


def test_another_number_of_processes_is_another_batch(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))
    state = folder / "checkpoints" / STATE_FILE
    kept = read_state(state)
    assert (kept["processes"], kept["images_per_step"]) == (1, 2)
    write_state(state, {**kept, "processes": 2, "images_per_step": 4})
    with pytest.raises(ConfigError, match=r"other batches \(pictures a step: 4 on 2 processes -> 2 on 1\)"):
        train_sd(resumed(folder))
    ears = Ears()
    train_sd(resumed(folder, gradient_accumulation=2, force=True), ears)
    assert "Going on with changes: gradient_accumulation: 1 -> 2." in ears.lines, "the batch is the same"


def test_a_forced_change_is_kept_and_noted_once(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """Cut off right after it was changed, the run goes on with the change without being told again."""
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(15))

    class AtOnce(Listener):
        def say(self, line: str) -> None:
            if line.startswith("Going on at step"):
                raise Killed

    class AtTheNextStep(Listener):
        def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
            if what == "Training":
                raise Killed

    for killer in (AtOnce(), AtTheNextStep()):
        with pytest.raises(Killed):
            train_sd(resumed(folder, steps=14, force=True), killer)
    train_sd(resumed(folder))
    (change,) = json.loads((folder / "run.json").read_text())["changes"]
    assert change["what"] == ["steps: 12 -> 14"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 14


def test_pictures_to_learn_from_never_become_those_that_judge(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    (apart := tmp_path / "apart").mkdir()
    shutil.move(dogs / "0.png", apart / "0.png")
    settings = {"val_share": 0.0, "validation": str(apart)}
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder, **settings), Killer(16))
    shutil.move(dogs / "1.png", apart / "1.png")
    with pytest.raises(ConfigError, match="1 pictures that this run has learned from would now be those that judge it"):
        train_sd(resumed(folder, force=True))


# ----------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(("keep", "left"), [(None, [6, 12]), (1, [12]), (0, [])])
def test_so_many_adapters_on_the_way_stay(
    tiny_model: Path, dogs: Path, tmp_path: Path, keep: int | None, left: list[int]
) -> None:
    folder = train_sd(config(tiny_model, dogs, tmp_path / "r", keep_checkpoints=keep)).folder / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == [f"step-{step:06d}.safetensors" for step in left]
    assert {"state.pt", "state-previous.pt", "best.safetensors"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(("keep", "left"), [(None, []), (3, [8, 10, 12])])
def test_adapters_on_the_way_without_pictures(
    tiny_model: Path, dogs: Path, tmp_path: Path, keep: int | None, left: list[int]
) -> None:
    """Whoever says how many stay wants them, at the moments at which the state is saved."""
    settings = {"keep_checkpoints": keep, "sample_columns": 0}
    folder = train_sd(config(tiny_model, dogs, tmp_path / "r", **settings)).folder / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == [f"step-{step:06d}.safetensors" for step in left]


def test_adapters_on_the_way_say_what_the_last_one_says(whole: Path) -> None:
    """Other programs show their title, trigger word and base too."""

    def public(name: str) -> dict[str, str]:
        with safe_open(whole / name, "pt") as file:
            told = file.metadata()
        return {k: v for k, v in told.items() if k.startswith(("ss_", "modelspec.")) and "hash" not in k}

    last = public("adapter.safetensors")
    assert last["modelspec.trigger_phrase"] and last["ss_steps"] == "12"
    assert public("checkpoints/step-000006.safetensors") == {**last, "ss_steps": "6"}
    best = public("checkpoints/best.safetensors")
    assert {**best, "ss_steps": "12"} == last


def test_a_state_that_cannot_be_read_costs_one_checkpoint(
    tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path
) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, folder), Killer(17))
    state = folder / "checkpoints" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    ears = Ears()
    train_sd(resumed(folder), ears)
    assert any("cannot be read" in line and "going on with the one before" in line for line in ears.lines)
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_disk_that_is_full_at_any_write(
    tiny_model: Path, dogs: Path, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with one sentence; what was written before is whole, and from there it ends in the same bytes."""
    real, writes, last = os.fsync, 0, math.inf

    def counted(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes > last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setenv("VISIONLORA_CACHE", str(tmp_path / "no" / "cache"))
    (tmp_path / "no").write_text("a file, so that nothing is cached")
    monkeypatch.setattr(os, "fsync", counted)
    whole = train_sd(config(tiny_model, dogs, tmp_path / "whole")).folder
    last, writes = int(writes * share), 0
    with pytest.raises(VisionLoRAError, match="No space left on device") as caught:
        train_sd(config(tiny_model, dogs, tmp_path / "cut"))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    last = math.inf
    train_sd(config(tiny_model, dogs, tmp_path / "cut", resume="auto"))
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tiny_model: Path, dogs: Path, tmp_path: Path, whole: Path, cli) -> None:
    """The real command under a limit that the first checkpoint keeps, and later ones with the optimizer's state do not."""
    limit = (whole / "checkpoints" / "state.pt").stat().st_size * 3 // 4
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from visionlora.cli.main import main\nmain()"
    words = [f"{name}={value}" for name, value in SETTINGS.items()]
    command = [
        sys.executable,
        "-c",
        code,
        "train-sd",
        "--images",
        dogs,
        "--model",
        tiny_model,
        "--output",
        "cut",
        *words,
    ]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "state.pt cannot be written (File too large); the last one is still whole" in line
    code_, _, err = cli("train-sd", "--images", dogs, "--output", "cut", "--resume", "auto")
    assert code_ == 0, err
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------- sudden ends

SERVER = """
import json, os, sys
import torch
from visionlora.cli.main import main
from visionlora.pipelines.train_sd import train_sd
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        sys.argv = ["visionlora", *json.loads(line)]
        try:
            main()
        except SystemExit as e:
            os._exit(e.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Starts the command in a process of its own for every line of words; what takes long is imported once."""
KILLS = 24


@pytest.fixture
def server(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "errors.txt").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        yield process


@pytest.mark.slow
def test_killed_at_random_moments(tiny_model: Path, dogs: Path, tmp_path: Path, server: subprocess.Popen) -> None:
    """SIGKILL again and again, wherever the run then is, each time started again with the same words."""
    settings = {**SETTINGS, "steps": 30, "checkpoints": 15}
    words = ["--images", str(dogs), "--model", str(tiny_model), *(f"{k}={v}" for k, v in settings.items())]

    def run(output: str, after: float | None = None) -> int:
        """Runs the command, and kills it after so many seconds."""
        server.stdin.write(json.dumps(["train-sd", "--output", output, "--resume", "auto", *words]) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = int(server.stdout.readline())
        assert code in (0, -signal.SIGKILL), (tmp_path / "errors.txt").read_text()
        return code

    def check_bytes(output: str) -> None:
        for name in FILES:
            assert (tmp_path / output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (output, name)
        lines = [[json.loads(x)["loss"] for x in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
                 for f in (output, "whole")]  # fmt: skip
        assert lines[0] == lines[1] and not list((tmp_path / output).rglob("*.tmp"))

    run("warm")
    began = time.monotonic()
    assert run("whole") == 0
    length = time.monotonic() - began
    dice, moments, number = random.Random(0), [], 0
    while len(moments) < KILLS:
        folder = tmp_path / f"cut{number}"
        if run(folder.name, dice.uniform(0.0, 0.7) * length) == 0:
            check_bytes(folder.name)
            number += 1
            continue
        steps = folder / "metrics.jsonl"
        moments.append(len(steps.read_bytes().splitlines()) if steps.exists() else -1)
    assert run(folder.name) == 0
    check_bytes(folder.name)
    assert len(set(moments)) >= 6, f"the kills fell on too few moments: {moments}"


def test_chosen_ranks_are_kept(tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again, on another batch or device, they may be others, and the state would fit no more."""
    settings = {"rank": "auto", "rank_budget": "4k", "alpha": 4.0, "train_text_encoder": True}
    expected = train_sd(config(tiny_model, dogs, tmp_path / "uncut", **settings)).folder
    with pytest.raises(Killed):
        train_sd(config(tiny_model, dogs, tmp_path / "cut", **settings), Killer(30))
    assert (tmp_path / "cut" / "checkpoints" / "state.pt").exists()
    for measuring in ("automatic_ranks", "text_share"):
        monkeypatch.setattr(f"visionlora.pipelines.sd_learning.{measuring}", None)
    train_sd(resumed(tmp_path / "cut"))
    assert (tmp_path / "cut" / "adapter.safetensors").read_bytes() == (expected / "adapter.safetensors").read_bytes()
