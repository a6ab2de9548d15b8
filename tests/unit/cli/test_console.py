"""What a run prints where there is no terminal."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from visionlora.atomic import replace_file
from visionlora.cli import console
from visionlora.cli.console import ConsoleListener, fail, file_problem

from ...doubles import become_process


def test_plain_lines_name_the_stage_its_end_and_the_detail(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleListener() as listener:
        listener.say("Base [model]: x :dog:")
        for step in range(1, 101):
            listener.progress("Training", step, 100, f"loss {1 / step:.2f}")
    assert capsys.readouterr().out.splitlines() == ["Base [model]: x :dog:", "Training 100/100  loss 0.01"]


@pytest.mark.parametrize(("width", "bar"), [(40, False), (60, False), (80, True), (100, True)])
def test_a_narrow_terminal_shows_count_and_time_rather_than_a_bar(
    monkeypatch: pytest.MonkeyPatch, width: int, bar: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    listener, drawn = ConsoleListener(), Console(file=io.StringIO(), width=width)
    listener.bars.add_task("Training lora", total=300, completed=137, detail="loss 0.1234  top1 0.938")
    drawn.print(listener.bars.make_tasks_table(listener.bars.tasks))
    (line,) = drawn.file.getvalue().splitlines()
    assert " 137/300 " in line and "eta -:--:--" in line and "Train" in line and "lo" in line and ("━" in line) == bar
    assert width < 80 or (line.startswith("Training lora ") and line.rstrip().endswith("top1 0.938"))


def test_long_stages_print_now_and_then_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with ConsoleListener() as listener:
        for step in range(1, 6):
            listener.progress("Training", step, 5)
    assert capsys.readouterr().out.splitlines() == ["Training 3/5  eta 8 s", "Training 5/5"]


def test_work_goes_on_when_nobody_reads_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(console.sys, "stdout", pipe)
        with ConsoleListener() as listener:
            listener.say("heard")
            assert os.read(reader, 100) == b"heard\n"
            os.close(reader)
            for step in range(3):
                listener.say(f"step {step}")
                listener.progress("Training", 3, 3)
        assert listener.console.file.lost


def test_errors_go_to_standard_error_with_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fail("It broke.", 2)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "Error: It broke.\n"


def test_what_all_processes_of_a_launch_have_to_tell_is_left_to_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the others when the first has ended; an error that one has alone is told by it."""
    become_process(monkeypatch, 1)
    waited: list[float] = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as caught:
        fail("It broke.", 2)
    assert caught.value.code == 2 and waited == [console.PATIENCE]
    assert capsys.readouterr().err == "Error on rank 1: It broke.\n"

    def ended(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(console.time, "sleep", ended)
    with pytest.raises(SystemExit) as caught:
        fail("It broke.", 2)
    assert caught.value.code == 2 and capsys.readouterr().err == ""


def test_one_process_of_a_launch_draws_bars_and_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    become_process(monkeypatch, 1)
    with ConsoleListener() as listener, ConsoleListener(quiet=True) as other:
        for ears in (listener, other):
            ears.say("Base: x")
            ears.progress("Training", 3, 3)
    assert capsys.readouterr() == ("", "")


def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "file" / "x.png", b"")
    assert file_problem(caught.value) == f"{tmp_path}/file/x.png cannot be read or written: Not a directory."
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "none" / "x.png", b"")
    assert file_problem(caught.value).endswith(
        f"none/x.png cannot be read or written: there is no folder {tmp_path}/none."
    )


def test_a_terminal_without_cursor_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars on it are first seen when all is done."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    with ConsoleListener() as listener:
        listener.progress("Training", 3, 3)
        assert "Training 3/3" in capsys.readouterr().out
