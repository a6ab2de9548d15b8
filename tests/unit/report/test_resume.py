"""Which run goes on, with which settings; what is said when it cannot."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from visionlora.atomic import hold, let_go
from visionlora.config import ClassifyConfig, TrainingConfig, TrainSDConfig, build, to_yaml
from visionlora.errors import ConfigError, RunFinished, RunFolderError
from visionlora.report.resume import LearnedFrom, Start, begin, finished_run, holding
from visionlora.report.settings import plain
from visionlora.training.checkpoint import PREVIOUS_FILE, STATE_FILE, write_state

from ...doubles import Ears

STATE = {"fit": {}, "history": [], "data": ""}
"""What each state has."""
FILLED = TrainSDConfig(images="dog", steps=12, batch_size=2, learning_rate=0.01)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    let_go()


def a_run(folder: str, config: object = FILLED, step: int | None = 3, age: int = 0, **state: object) -> Path:
    """A run folder as one leaves it that was cut off."""
    path = Path(folder)
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    if step is not None:
        write_state(path / "checkpoints" / STATE_FILE, {**STATE, "step": step, "settings": plain(config), **state})
    for file in (path / "config.yaml", path / "checkpoints" / STATE_FILE):
        if file.exists():
            os.utime(file, (1_000_000_000 - age,) * 2)
    return path


def started(config: object = None, **given: object) -> tuple[Start, list[str]]:
    """What `begin` finds, and what it says."""
    said = Ears()
    found = begin(config or build(TrainSDConfig, {"images": "dog", **given}), "sd", said)
    let_go()
    return found, said.lines


# ---------------------------------------------------------------------------------------------------------------- auto


def test_auto_without_any_run_starts_a_new_one() -> None:
    found, (line,) = started(resume="auto")
    assert found.state is None and found.folder.parent == Path("runs") and found.folder.name.startswith("sd-dog-")
    assert line == f"There is no unfinished run of dog in runs; starting a new one in {found.folder}."
    assert found.config.resume is None and found.config.output is None


def test_auto_takes_the_newest_unfinished_run_of_the_same_pictures() -> None:
    a_run("runs/old", age=10)
    a_run("runs/right", age=5)
    a_run("runs/cat", dataclasses.replace(FILLED, images="cat"))
    a_run("runs/pets", ClassifyConfig(images="dog"))
    (a_run("runs/done") / "run.json").write_text("{}")
    (Path("runs") / "notes.txt").write_text("mine")
    found, (line,) = started(resume="auto", images="./dog")
    assert found.folder == Path("runs/right") and found.state is not None and found.state["step"] == 3
    assert line == "Resuming runs/right, the last unfinished run of ./dog."
    assert found.config.steps == 12 and found.config.images == "./dog"


def test_auto_with_an_output_takes_that_run_alone() -> None:
    a_run("runs/newer")
    a_run("r", age=9)
    found, (line,) = started(resume="auto", output="r")
    assert found.folder == Path("r") and line == "Resuming the run in r."
    found, (line,) = started(resume="auto", output="s")
    assert found.folder == Path("s") and found.state is None and line == "There is no run in s yet; starting one."


def test_auto_looks_into_a_folder_of_runs() -> None:
    a_run("mine/a")
    found, (line,) = started(resume="auto", output="mine")
    assert found.folder == Path("mine/a") and line == "Resuming mine/a, the last unfinished run of dog."
    (Path("mine/a/run.json")).write_text("{}")
    found, (line,) = started(resume="auto", output="mine")
    assert found.state is None and found.folder.parent == Path("mine")
    assert line == f"There is no unfinished run of dog in mine; starting a new one in {found.folder}."


def test_a_run_without_a_step_starts_anew_in_its_folder() -> None:
    folder = a_run("r", step=None)
    (folder / "samples").mkdir()
    (folder / "samples" / "base_00.png").write_text("old")
    (folder / "mine.txt").write_text("mine")
    (folder / "checkpoints" / ".state.pt.77.tmp").write_text("half")
    found, (line, changes) = started(resume="auto", output="r", steps=7)
    assert changes == "It starts with changes: steps: 12 -> 7."
    assert line == "The run in r was cut off before its first checkpoint; it starts anew, nothing is lost."
    assert found.state is None and found.config.steps == 7
    found.open(found.config)
    assert "steps: 7" in (folder / "config.yaml").read_text()
    left = sorted(p.name for p in folder.rglob("*") if p.is_file())
    assert left == ["asked.yaml", "config.yaml", "mine.txt"]


def test_a_run_that_starts_anew_has_the_settings_that_it_was_begun_with() -> None:
    """It trained another model, at defaults."""
    a_run("r", dataclasses.replace(FILLED, model="my/base", rank=2), step=None)
    found, lines = started(resume="auto", output="r", steps=7, seed=3)
    assert found.config == dataclasses.replace(FILLED, model="my/base", rank=2, steps=7, seed=3)
    assert found.asked["rank"] == 2 and lines[-1] == "It starts with changes: steps: 12 -> 7; seed: 0 -> 3."
    with pytest.raises(ConfigError, match=r"begun with other settings \(rank: 2 -> 4\)\. It has learned nothing yet"):
        started(resume="auto", output="r", rank=4)


def begun(kind: type[TrainingConfig], asked: dict[str, object], **filled_in: object) -> TrainingConfig:
    """A run in `r` that is killed before its first checkpoint; returns what it was asked for."""
    given = build(kind, {"images": "dog", "output": "r", "resume": "auto", **asked})
    start = begin(given, "sd", Ears())
    start.open(dataclasses.replace(start.config, **filled_in))
    let_go()
    return start.config


@pytest.mark.parametrize(
    ("kind", "asked", "filled_in"),
    [
        (TrainSDConfig, {"auto_batch": True, "gradient_accumulation": 4},
         {"auto_batch": False, "batch_size": 32, "gradient_accumulation": 1, "steps": 600}),
        (TrainSDConfig, {}, {"steps": 600, "learning_rate": 1e-3, "model": "emoji-64"}),
        (ClassifyConfig, {"epochs": 2}, {"epochs": None, "steps": 40}),
        (ClassifyConfig, {"targets": "auto"}, {"targets": "attn.qv"}),
        (ClassifyConfig, {"find_rate": True}, {"find_rate": False, "learning_rate": 0.1, "head_learning_rate": 0.1}),
    ],
)  # fmt: skip
def test_the_same_command_starts_anew_as_it_began(
    kind: type[TrainingConfig], asked: dict[str, object], filled_in: dict[str, object]
) -> None:
    """What was filled in counted as asked for: 32 pictures a step became 128, and targets=auto was a change."""
    first = begun(kind, asked, **filled_in)
    for _ in range(2):
        found, lines = started(build(kind, {"images": "dog", "output": "r", "resume": "auto", **asked}))
        assert found.config == first
        assert lines == ["The run in r was cut off before its first checkpoint; it starts anew, nothing is lost."]
        found.open(dataclasses.replace(found.config, **filled_in))
        let_go()
    (Path("r") / "config.yaml").unlink()  # cut off between the two files
    assert started(build(kind, {"images": "dog", "output": "r", "resume": "auto"}))[0].config == first


def test_the_folder_of_a_run_without_a_step_is_refused_with_the_way_to_start_it_anew() -> None:
    first = begun(ClassifyConfig, {"epochs": 2}, epochs=None, steps=40)
    with pytest.raises(
        RunFolderError,
        match=r"ended before its first checkpoint .* --resume auto --output r\. Or choose another, such as",
    ):
        started(build(ClassifyConfig, {"images": "dog", "output": "r"}))
    found, _ = started(build(ClassifyConfig, {"images": "dog", "output": "r", "resume": "auto"}))
    assert found.folder == Path("r") and found.anew and found.config == first


def test_a_run_that_starts_anew_takes_other_settings_too() -> None:
    begun(TrainSDConfig, {"rank": 2, "epochs": 2}, epochs=None, steps=40, alpha=2.0)
    found, lines = started(resume="auto", output="r", rank=4, steps=7)
    assert (found.config.rank, found.config.steps, found.config.epochs, found.config.alpha) == (4, 7, None, None)
    assert lines[-1] == "It starts with changes: steps: none -> 7; rank: 2 -> 4."
    assert found.asked["rank"] == 4 and found.asked["steps"] == 7


def test_settings_that_do_not_go_with_those_that_a_run_was_begun_with() -> None:
    begun(ClassifyConfig, {"find_rate": True}, find_rate=False, learning_rate=0.1)
    given = {"images": "dog", "output": "r", "resume": "auto", "learning_rate": 0.2}
    with pytest.raises(ConfigError, match=r"(?s)find_rate is True.*as the run in r was begun with it: give it too"):
        started(build(ClassifyConfig, given))
    assert started(build(ClassifyConfig, {**given, "find_rate": False}))[0].config.learning_rate == 0.2


def test_an_edited_config_file_counts_when_a_run_starts_anew() -> None:
    begun(ClassifyConfig, {"epochs": 2}, epochs=None, steps=40)
    file = Path("r/config.yaml")
    file.write_text(file.read_text().replace("steps: 40", "steps: 15").replace("images: dog", "images: cat"))
    found, lines = started(build(ClassifyConfig, {"images": "cat", "output": "r", "resume": "auto"}))
    assert (found.config.steps, found.config.epochs, found.config.images) == (15, None, "cat") and len(lines) == 1


def test_a_record_of_what_was_asked_that_is_something_else() -> None:
    begun(TrainSDConfig, {})
    Path("r/asked.yaml").write_text("rank: 3\n")
    with pytest.raises(
        RunFolderError, match=r"`asked` and `filled_in` must hold settings\. Put it right, or remove it"
    ):
        started(resume="auto", output="r")


def test_resume_and_another_output() -> None:
    a_run("r")
    another = r"the output s \(of the command line or a config file\) is another\. Give --output r, or none at all"
    with pytest.raises(ConfigError, match=f"--resume r goes on in that folder, and {another}"):
        started(resume="r", output="s")
    assert started(resume="r", output="./r")[0].folder == Path("r")


def test_adapters_are_pointed_at_where_no_state_is_left() -> None:
    folder = a_run("r", step=None) / "checkpoints"
    with pytest.raises(RunFolderError, match=r"ended before its first one\. Start it anew: --resume auto --output r"):
        started(resume="r")
    (folder / "step-000006.safetensors").write_text("")
    learn_on = "a new run that learns on: start_from=r/checkpoints/step-000006.safetensors"
    with pytest.raises(
        RunFolderError, match=f"There is no checkpoint at .* any more. Put it back, or start {learn_on}"
    ):
        started(resume="r")
    (folder / STATE_FILE).write_bytes(b"half")
    with pytest.raises(RunFolderError, match=f"cannot be read .*, nor can one before it. Start {learn_on}"):
        started(resume="r")


def test_a_state_that_is_another_file() -> None:
    torch.save({"weight": torch.ones(1)}, a_run("r") / "checkpoints" / STATE_FILE)
    with pytest.raises(RunFolderError, match=r"is no checkpoint of a run \(it has no fit, history, data\)"):
        started(resume="r")


def test_the_newest_run_without_a_step_starts_anew_too() -> None:
    a_run("runs/a", step=None)
    found, (line,) = started(resume="auto")
    assert found.folder == Path("runs/a") and found.anew
    assert line == "The last run of dog, runs/a, was cut off before its first checkpoint; it starts anew."


@pytest.mark.parametrize("name", [".asked.yaml.77.tmp", ".config.yaml.77.tmp"])
def test_a_folder_that_was_cut_off_while_its_first_file_was_written(name: str) -> None:
    Path("r").mkdir()
    Path("r", name).write_text("half")
    found, _ = started(resume="auto", output="r")
    found.open(found.config)
    assert sorted(p.name for p in Path("r").iterdir() if p.is_file()) == ["asked.yaml", "config.yaml"]


@pytest.mark.parametrize("names", [("asked.yaml",), ("asked.yaml", ".config.yaml.77.tmp"), (".asked.yaml.77.tmp",)])
def test_the_same_command_takes_a_folder_in_which_no_run_had_begun(names: tuple[str, ...]) -> None:
    """A disk that was full between the two files: nothing of it is worth keeping, and the folder was said to be in use."""
    Path("r").mkdir()
    for name in names:
        Path("r", name).write_text("half")
    found, lines = started(output="r", rank=3)
    assert found.config.rank == 3 and lines == [] and not found.anew
    found.open(found.config)
    assert sorted(p.name for p in Path("r").iterdir()) == ["asked.yaml", "config.yaml"]
    assert "rank: 3" in Path("r/config.yaml").read_text()
    with pytest.raises(RunFolderError, match="already holds a run"):
        started(output="r")


def test_a_run_that_had_not_begun_among_others() -> None:
    begun(TrainSDConfig, {"rank": 2})
    (Path("r") / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"ended before it began\. Start it anew: --resume auto --output r\."):
        started(resume="r")
    for place in ("runs", "mine"):
        Path(place).mkdir()
        Path("r").rename(f"{place}/r")
        found, (line,) = started(resume="auto", **({} if place == "runs" else {"output": place}))
        assert found.folder.parent == Path(place) and found.folder.name.startswith("sd-dog-")
        assert line == f"There is no unfinished run of dog in {place}; starting a new one in {found.folder}."
        Path(place, "r").rename("r")


def test_adapters_without_a_state_are_not_thrown_away() -> None:
    folder = a_run("r", step=None)
    (folder / "checkpoints" / "step-000009.safetensors").write_text("work")
    with pytest.raises(RunFolderError, match="There is no checkpoint at"):
        started(resume="auto", output="r")
    assert (folder / "checkpoints" / "step-000009.safetensors").exists()


def test_a_folder_with_other_things_is_refused() -> None:
    Path("r").mkdir()
    Path("r/mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"is not empty \(mine.txt\)"):
        started(resume="auto", output="r")


def test_a_finished_run_is_success() -> None:
    folder = a_run("r")
    (folder / "run.json").write_text("{}")

    def said(**given: object) -> str | None:
        return finished_run(build(TrainSDConfig, {"images": "dog", "output": "r", **given}))

    assert said(resume="auto") == "The run in r is finished; nothing is left to do."
    assert said(resume="auto", steps=12) == "The run in r is finished; nothing is left to do."
    assert said(resume="auto", rank=3, alpha=2) == (
        "The run in r is finished; nothing is left to do. It had another alpha, rank; a new run needs an --output of its own."
    )
    assert said() is None and said(resume="r") is None
    (folder / "asked.yaml").write_text("asked: {rank: 3}\nfilled_in: {}\n")
    assert said(resume="auto", rank=3) == "The run in r is finished; nothing is left to do."
    with pytest.raises(RunFinished, match="The run in r is finished"):
        started(resume="auto", output="r")


def test_a_run_that_trains_right_now_is_left_alone() -> None:
    a_run("runs/a")
    a_run("runs/b", age=5)
    Path("begins").mkdir()
    Path("begins/asked.yaml").touch()
    code = "import sys\nfrom pathlib import Path\nfrom visionlora.atomic import hold\n"
    code += "assert hold(Path('runs/a')) and hold(Path('begins'))\nprint('held', flush=True)\nsys.stdin.read()\n"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        assert started(resume="auto")[0].folder == Path("runs/b")
        for given in ({"resume": "runs/a"}, {"resume": "auto", "output": "runs/a"}, {"output": "runs/a"}):
            with pytest.raises(RunFolderError, match="Another process is training in runs/a right now"):
                started(**given)
        with pytest.raises(RunFolderError, match="Another process is training in begins right now"):
            started(output="begins")
    finally:
        other.kill()
        other.wait()
    other.stdin.close()
    other.stdout.close()
    assert started(resume="auto")[0].folder == Path("runs/a"), "a killed process holds nothing"


def test_a_decorated_function_lets_go_of_its_folders() -> None:
    Path("r").mkdir()
    asked = [
        sys.executable,
        "-c",
        "from pathlib import Path; from visionlora.atomic import hold; print(hold(Path('r')))",
    ]

    @holding
    def trains() -> str:
        assert hold(Path("r"))
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    assert trains() == "False"
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "True"


# ------------------------------------------------------------------------------------------------------ other settings


def test_settings_that_differ_are_named_with_what_can_be_done() -> None:
    a_run("r")
    with pytest.raises(ConfigError) as caught:
        started(resume="r", steps=20, sample_prompts=["a", "b"], warmup_steps=20)
    assert str(caught.value) == textwrap.dedent("""\
        The run in r had other settings:
        - steps: 12 -> 20
        - sample_prompts: none -> a, b
        Either leave them out (in config.yaml: put them back) to go on as before, or go on with the new ones by --force, \
or start a new run.""")


def test_force_goes_on_with_them() -> None:
    a_run("r")
    found, _ = started(resume="r", steps=20, force=True)
    assert found.config.steps == 20 and found.force and found.changes == ("steps: 12 -> 20",)
    assert found.config.batch_size == 2 and not found.config.force


def test_a_setting_can_be_forced_back_to_its_default() -> None:
    a_run("r", dataclasses.replace(FILLED, warmup_steps=50))
    found, _ = started(resume="r", warmup_steps=20, force=True)
    assert found.config.warmup_steps == 20


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rank", 4, "it shapes the adapter or its optimizer"),
        ("method", "dora", "it shapes the adapter or its optimizer"),
        ("targets", "all", "it shapes the adapter or its optimizer"),
        ("model", "other", "it shapes the adapter or its optimizer"),
        ("optimizer", "sgd", "it shapes the adapter or its optimizer"),
        ("init", "orthogonal", "it shapes the adapter or its optimizer"),
        ("seed", 1, "it decides which pictures are kept apart"),
    ],
)
def test_what_can_never_change(name: str, value: object, reason: str) -> None:
    a_run("r")
    with pytest.raises(ConfigError) as caught:
        started(resume="r", force=True, **{name: value})
    assert f"-> {value} (can never change: {reason})" in str(caught.value) and "--force" not in str(caught.value)


def test_a_configuration_made_by_hand_has_its_defaults_left_out() -> None:
    a_run("r", dataclasses.replace(FILLED, warmup_steps=50))
    found, _ = started(TrainSDConfig(images="x", resume="r"))
    assert found.config.warmup_steps == 50 and found.config.images == "dog"
    with pytest.raises(ConfigError, match="- steps: 12 -> 9"):
        started(TrainSDConfig(images="x", resume="r", steps=9))


def test_what_was_asked_for_may_be_asked_for_again() -> None:
    """A share of epochs became steps: asking for the same epochs is no change, for others it is."""
    filled = ClassifyConfig(images="pets", steps=40, learning_rate=0.1)
    a_run("r", filled, asked={"epochs": 4.0, "find_rate": True})

    def going_on(**given: object) -> Start:
        return started(build(ClassifyConfig, {"images": "pets", "resume": "auto", "output": "r", **given}))[0]

    assert going_on(epochs=4).config.steps == 40
    with pytest.raises(ConfigError, match=r"- epochs: none -> 6\.0"):
        going_on(epochs=6)
    found = going_on(epochs=6, force=True)
    assert (found.config.epochs, found.config.steps) == (6.0, None) and found.asked["epochs"] == 6.0


def test_an_edited_config_file_is_no_secret_change() -> None:
    folder = a_run("r")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 12", "steps: 15"))
    with pytest.raises(ConfigError, match="- steps: 12 -> 15"):
        started(resume="r")
    assert started(resume="r", force=True)[0].config.steps == 15


# ------------------------------------------------------------------------------------------------------------- foreign


def test_a_folder_without_a_run() -> None:
    Path("r").mkdir()
    with pytest.raises(RunFolderError) as caught:
        started(resume="r")
    assert str(caught.value) == "r is no run that can be resumed: it has no config.yaml. Name a run folder."


@pytest.mark.parametrize("given", [{"resume": "r"}, {"resume": "auto", "output": "r"}])
def test_a_run_of_another_command(given: dict[str, str]) -> None:
    a_run("r", ClassifyConfig(images="dog"))
    with pytest.raises(RunFolderError) as caught:
        started(**given)
    assert str(caught.value) == (
        "r is a run of `visionlora classify`, not of `visionlora train-sd`. Go on with it by: visionlora classify --resume r"
    )


def test_a_run_with_settings_of_a_newer_version() -> None:
    folder = a_run("r")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "telepathy: true\n")
    with pytest.raises(
        RunFolderError, match=r"does not know: telepathy\. .*if another version made the run, go on with that one"
    ):
        started(resume="r")


def test_a_checkpoint_of_a_newer_version() -> None:
    a_run("r", format=99)
    with pytest.raises(RunFolderError, match="was written by a newer version of visionlora"):
        started(resume="r")


# ------------------------------------------------------------------------------------------------------- broken states


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_the_state_before_stands_in_for_one_that_cannot_be_read(damage: str) -> None:
    folder = a_run("r")
    state = folder / "checkpoints" / STATE_FILE
    values = torch.arange(1000.0)
    write_state(state, {**STATE, "step": 4, "settings": plain(FILLED), "values": values})
    good = state.read_bytes()
    write_state(state, {**STATE, "step": 5, "settings": plain(FILLED), "values": values})
    if damage == "gone":
        state.unlink()
    else:
        whole = state.read_bytes()
        at = whole.index(values.numpy().tobytes()) + 100
        state.write_bytes(whole[:at] + (b"" if damage == "cut" else bytes([whole[at] ^ 1]) + whole[at + 1 :]))
    found, (line,) = started(resume="r")
    assert found.state is not None and found.state["step"] == 4
    assert line.startswith(f"The checkpoint {state} cannot be read (") and line.endswith(
        "going on with the one before."
    )
    found.open(found.config)
    assert state.read_bytes() == good and not state.with_name(PREVIOUS_FILE).exists()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_state_that_is_no_file(kind: str) -> None:
    """A folder ended in a traceback once the state before had been read, and a pipe was waited for without end."""
    state = a_run("r") / "checkpoints" / STATE_FILE
    state.replace(state.with_name(PREVIOUS_FILE))
    state.mkdir() if kind == "folder" else os.mkfifo(state)
    what = {"folder": "a folder", "pipe": "no regular file"}[kind]
    with pytest.raises(RunFolderError, match=f"{STATE_FILE} is {what}. Move it away, .* goes on with the one before"):
        started(resume="r")
    state.rmdir() if kind == "folder" else state.unlink()
    assert started(resume="r")[0].state is not None
    state.with_name(PREVIOUS_FILE).unlink()
    state.write_bytes(b"half")
    state.with_name(PREVIOUS_FILE).mkdir() if kind == "folder" else os.mkfifo(state.with_name(PREVIOUS_FILE))
    with pytest.raises(RunFolderError, match="nor can one before it"):
        started(resume="r")


def test_no_state_can_be_read() -> None:
    folder = a_run("r")
    (folder / "checkpoints" / STATE_FILE).write_bytes(b"no state")
    with pytest.raises(RunFolderError, match=r"cannot be read \(BadZipFile\), nor can one before it\. Start a new run"):
        started(resume="r")


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(*items: str, classes: tuple[str, ...] = (), text: str = "captions") -> LearnedFrom:
    parts = tuple((sha * 64, side, words) for sha, side, words in (item.split(":") for item in items))
    return LearnedFrom("|".join([*items, *classes]), parts, classes, text)


def test_changed_pictures_are_counted() -> None:
    kept = pictures("a:train:dog", "b:train:dog", "c:val:dog").state()
    assert pictures("a:train:dog", "b:train:dog", "c:val:dog").change_since(kept) == ""
    assert pictures("a:train:cat", "d:train:dog", "e:train:x", "c:val:dog").change_since(kept) == (
        "pictures: 2 added, 1 removed, 1 with other captions"
    )
    assert pictures("a:train:dog", "a:train:dog", "b:train:dog", "c:val:dog").change_since(kept) == (
        "pictures: others twice, or in another part"
    )


def test_no_run_is_judged_by_what_it_has_learned() -> None:
    kept = pictures("a:train:dog", "b:val:dog").state()
    with pytest.raises(ConfigError, match="1 pictures that this run has learned from would now be those that judge it"):
        pictures("a:val:dog", "b:train:dog").change_since(kept)
    assert pictures("a:train:dog", "b:train:dog").change_since(kept) == "pictures: others twice, or in another part"


def test_a_head_keeps_its_classes() -> None:
    kept = pictures("a:train:cat", classes=("cat", "dog"), text="classes").state()
    with pytest.raises(ConfigError, match="they were cat, dog, now they are cat, cow"):
        pictures("a:train:cat", classes=("cat", "cow"), text="classes").change_since(kept)


def test_a_state_is_read_without_running_code_and_is_plain() -> None:
    folder = a_run("r", pictures="x", classes=["a"], changes=[{"step": 1, "what": ["b"]}])
    found = started(resume="r")[0].state
    assert found is not None and json.loads(json.dumps(dict(found)))["changes"] == [{"step": 1, "what": ["b"]}]
    assert (folder / "checkpoints" / STATE_FILE).is_file()


def test_a_run_is_called_after_its_table_without_the_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.csv").touch()
    (tmp_path / "v1.2").mkdir()
    names = [begin(ClassifyConfig(images=n), "classify", Ears()).folder.name for n in ("pets.csv", "v1.2")]
    assert [n.rsplit("-", 2)[0] for n in names] == ["classify-pets", "classify-v1.2"]
