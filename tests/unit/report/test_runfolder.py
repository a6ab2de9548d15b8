import json
import math
import os
import re
import stat
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from visionlora.errors import RunFolderError
from visionlora.report import runfolder
from visionlora.report.runfolder import (
    RunFolder,
    check_place,
    check_run_folder,
    default_run_folder,
    open_run_folder,
    write_atomic,
)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "a" / "b")
    assert run.path.is_dir() and everything(run.path) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert open_run_folder(tmp_path).path == tmp_path


def test_checking_changes_nothing(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "a" / "b")
    assert everything(tmp_path) == []


def test_subfolders_are_made_on_first_use(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path)
    assert everything(tmp_path) == []
    assert run.samples == run.samples == tmp_path / "samples"
    assert run.checkpoints.is_dir() and everything(tmp_path) == ["checkpoints", "samples"]


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "adapter.safetensors"])
def test_the_folder_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / name).touch()
    free = re.escape((tmp_path / "dog-2").as_posix())
    with pytest.raises(RunFolderError, match=f"already holds a run \\({name}\\).*--output {free}, or remove"):
        open_run_folder(tmp_path / "dog")


def test_any_other_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(RunFolderError, match=r"is not empty \(0.png, 1.png, 2.png, 3.png, 4.png and 2 more\)"):
        check_run_folder(tmp_path)


def test_the_suggested_folder_is_free(tmp_path: Path) -> None:
    for name in ("dog", "dog-2", "dog-3"):
        open_run_folder(tmp_path / name).write_json("run.json", {})
    with pytest.raises(RunFolderError, match="dog-4,"):
        check_run_folder(tmp_path / "dog")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dog").write_text("mine")
    for path, message in ((tmp_path / "dog", "is a file"), (tmp_path / "dog" / "run", "dog is a file")):
        with pytest.raises(RunFolderError, match=message):
            open_run_folder(path)
    assert (tmp_path / "dog").read_text() == "mine"


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RunFolderError, match="is not writable"):
        check_run_folder(tmp_path / "a" / "b")


def test_a_name_the_system_refuses_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        open_run_folder(tmp_path / ("x" * 300))


def test_a_folder_that_appears_after_the_check_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_then_lose_the_race(path: Path) -> None:
        check_run_folder(path)
        RunFolder(path).path.mkdir()
        (path / "run.json").touch()

    monkeypatch.setattr(runfolder, "check_run_folder", check_then_lose_the_race)
    with pytest.raises(RunFolderError, match="cannot be written"):
        open_run_folder(tmp_path / "dog")


def test_text_and_json_are_written_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_text("config.yaml", "old")
    assert run.write_text("config.yaml", "name: für\n").read_text(encoding="utf-8") == "name: für\n"
    values = {"path": Path("a/b"), "loss": math.nan, "list": (1, math.inf), "text": "für"}
    written = run.write_json("run.json", values)
    assert json.loads(written.read_text(encoding="utf-8")) == {
        "path": str(Path("a/b")), "loss": None, "list": [1, None], "text": "für",
    }  # fmt: skip
    assert everything(tmp_path) == ["config.yaml", "run.json"]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    written = write_atomic(tmp_path / "written", b"")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    run = RunFolder(tmp_path)
    run.write_text("README.md", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFolderError, match=r"README\.md cannot be written: No space left on device"):
        run.write_text("README.md", "new")
    assert (tmp_path / "README.md").read_text() == "old" and everything(tmp_path) == ["README.md"]


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunFolder(tmp_path).write_json("run.json", {"x": object()})
    assert everything(tmp_path) == []


def test_lines_are_added_one_by_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(3):
        run.append_jsonl("metrics.jsonl", {"step": step, "text": "two\nlines"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_writing_into_a_lost_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written"):
        run.append_jsonl("metrics.jsonl", {})
    with pytest.raises(RunFolderError, match=r"run\.json cannot be written"):
        run.write_json("run.json", {})
    with pytest.raises(RunFolderError, match="samples cannot be written"):
        assert run.samples


def test_default_folder_says_what_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_run_folder("sd", "My dogs/2024: best!")
    assert re.fullmatch(r"runs/sd-My-dogs-2024-best-\d{8}-\d{6}", first.as_posix())
    assert everything(tmp_path) == []


def test_default_folder_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Stopped":
            return cls(2025, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runfolder, "datetime", Stopped)
    names = []
    for _ in range(3):
        names.append(open_run_folder(default_run_folder("sd", "dog")).path.name)
    assert names == ["sd-dog-20250102-030405", "sd-dog-20250102-030405-2", "sd-dog-20250102-030405-3"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("out.PNG", "a picture"), ("out.safetensors", "a file of weights"), ("out.pt", "a file of weights")],
)
def test_a_folder_is_not_named_like_a_file(tmp_path: Path, name: str, kind: str) -> None:
    for check in (check_place, check_run_folder, open_run_folder):
        with pytest.raises(RunFolderError, match=rf"named like {kind}, but would be a folder; .* such as \S*out\.$"):
            check(tmp_path / name)
    assert not (tmp_path / name).exists()
    (tmp_path / name).mkdir()
    check_place(tmp_path / name)
    assert open_run_folder(tmp_path / name).path.is_dir()
    assert open_run_folder(tmp_path / "v1.5").path.is_dir()
