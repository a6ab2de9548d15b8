"""Numbers reach TensorBoard's files, a run that goes on goes on in its curves, and a tracker cannot end a run."""

from pathlib import Path

import pytest

from visionlora.errors import ConfigError
from visionlora.report.runfolder import RunFolder
from visionlora.report.trackers import Trackers, run_id
from visionlora.training.loop import new_accelerator

from ...doubles import Ears

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's protobuf


def trackers(folder: Path, *words: str, run: bool = True) -> Trackers:
    folder.mkdir(exist_ok=True)
    accelerator = new_accelerator("fp32", words, folder)
    return Trackers(accelerator, RunFolder(folder) if run else None, Ears(), {"rank": 4, "targets": ["a"]})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "logs" / "visionlora"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_numbers_reach_the_files_and_are_flushed_at_once(tmp_path: Path) -> None:
    own = trackers(tmp_path / "run", "tensorboard")
    assert not (tmp_path / "run" / "logs").exists()  # before the first number nothing is written
    own.log({"validation_loss": 3.0}, 0)
    for step in (1, 2, 3):
        own.log({"loss": step / 2, "learning_rate": 0.25}, step)
    assert curves(tmp_path / "run") == {
        "validation_loss": [(0, 3.0)],
        "loss": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "learning_rate": [(1, 0.25), (2, 0.25), (3, 0.25)],
    }
    own.close()
    own.log({"loss": 9.0}, 4)
    assert curves(tmp_path / "run")["loss"][-1] == (3, 1.5)


def test_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = trackers(tmp_path / "run", "tensorboard")
    for step in (1, 2, 3, 4):
        first.log({"loss": float(step)}, step)
    first.close()
    second = trackers(tmp_path / "run", "tensorboard")  # its checkpoint was after step 2
    for step in (3, 4, 5):
        second.log({"loss": 10.0 * step}, step)
    second.close()
    assert curves(tmp_path / "run")["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_without_trackers_or_a_folder_nothing_is_written(tmp_path: Path) -> None:
    for own in (trackers(tmp_path / "run"), trackers(tmp_path / "run", "tensorboard", run=False)):
        own.log({"loss": 1.0}, 1)
        own.close()
    assert not list((tmp_path / "run").iterdir())


def test_one_that_fails_on_the_way_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trackers(tmp_path / "run", "tensorboard")
    own.log({"loss": 1.0}, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(own.accelerator.trackers[0], "log", full)
    own.log({"loss": 1.0}, 2)
    own.log({"loss": 1.0}, 3)
    own.close()
    assert own.tell.lines == [
        "The trackers failed (OSError: No space left on device); the run goes on with metrics.jsonl alone."
    ]


def test_one_that_cannot_start_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = trackers(tmp_path / "run", "tensorboard")

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(own.accelerator, "init_trackers", refused)
    with pytest.raises(ConfigError, match=r"cannot be started \(RuntimeError: no API key\)\. Leave trackers out"):
        own.log({"loss": 1.0}, 1)


def test_the_name_of_a_run_stays_in_its_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert run_id(one) == run_id(one) != run_id(other)
