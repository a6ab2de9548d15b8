"""Lines, progress bars and errors on the terminal; plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from visionlora.atomic import is_full
from visionlora.models.devices import process_of
from visionlora.report.listener import Listener

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal a stage prints at most one line in this time, and its last."""
WIDE, NARROW = 80, 60
"""Characters in a line of the terminal from which there is a bar, and the time that has passed."""
PATIENCE = 10.0
"""Seconds in which the first process of a launch may say what another was about to."""


def speaks() -> bool:
    """Whether this process tells what a run has found: of several, the first."""
    return process_of()[0] == 0


def tell(text: str, err: bool = False) -> None:
    """Prints, in the process that speaks."""
    if speaks():
        typer.echo(text, err=err)


def fail(message: str, code: int) -> NoReturn:
    """Prints an error and ends the process."""
    leave_to_first(code)
    where = "" if speaks() else f" on rank {process_of()[0]}"
    print(f"Error{where}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def leave_to_first(code: int) -> None:
    """Returns where an error has to be told by this process: by the first of a launch, or by one that has it alone.

    What all have is the first one's to tell, and then the launcher ends the others. An error of one alone is left standing
    meanwhile: the first may wait for it, but goes on.
    """
    if not speaks():
        try:
            time.sleep(PATIENCE)
        except KeyboardInterrupt:
            sys.exit(code)


def file_problem(error: OSError) -> str:
    """What is said of a file that cannot be read or written.

    >>> file_problem(FileNotFoundError(2, "No such file or directory", "no/x.yaml"))
    'no/x.yaml cannot be read or written: there is no folder no.'
    """
    if is_full(error):
        return f"{error.filename or 'A file'} cannot be written: {error.strerror}. Free some space and try again."
    folder = Path(error.filename).parent
    if isinstance(error, FileNotFoundError) and not folder.exists():
        return f"{error.filename} cannot be read or written: there is no folder {folder}."
    return f"{error.filename} cannot be read or written: {error.strerror or type(error).__name__}."


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(90), duration(600)
    ('90 s', '10.0 min')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


class Lasting:
    """A stream that outlives its reader: where a pipe or terminal is gone (`| head`, a lost connection) it falls silent.

    Work of hours must not end because nobody listens any longer.
    """

    def __init__(self, stream: IO[str]) -> None:
        """Args: `stream` is written to while it can be."""
        self.stream, self.lost = stream, False

    def write(self, text: str) -> int:
        """As a file's."""
        if not self.lost:
            try:
                return self.stream.write(text)
            except OSError:
                self.fall_silent()
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        if not self.lost:
            try:
                self.stream.flush()
            except OSError:
                self.fall_silent()

    def fall_silent(self) -> None:
        """What is in the stream's buffer, and what others write, goes nowhere from now on."""
        self.lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Words(TextColumn):
    """Of a bar: words that are cut where there is no room, before any number is."""

    def __init__(self, text: str) -> None:
        """Args: `text` is a format, as of `TextColumn`."""
        super().__init__(text, markup=False, table_column=Column())  # rich shrinks those first that it may wrap

    def render(self, task: Task) -> Text:
        """In one line."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def columns_for(width: int) -> list[ProgressColumn]:
    """What a bar shows on a terminal of that many characters: on a narrow one no bar, on a very narrow one less of the time."""
    bar = [BarColumn(bar_width=min(28, width - WIDE + 8))] if width >= WIDE else []
    elapsed = [TimeElapsedColumn()] if width >= NARROW else []
    count = TextColumn("{task.completed:.0f}/{task.total:.0f}")
    left = [TextColumn("eta"), TimeRemainingColumn()]
    return [Words("{task.description}"), *bar, count, *elapsed, *left, Words("{task.fields[detail]}")]


class ConsoleListener(Listener):
    """Draws what a pipeline reports, in the process that speaks; use as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        """Args: `quiet` keeps standard output free for a program's answer; what is told goes to standard error."""
        stream = Lasting(sys.stderr if quiet else sys.stdout)
        self.console = Console(
            highlight=False, emoji=False, soft_wrap=True, quiet=not speaks(), file=cast(IO[str], stream)
        )
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet
        self.bars = Progress(
            *columns_for(self.console.width),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}
        self.printed: dict[str, float] = {}

    def __enter__(self) -> ConsoleListener:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        """One line, above the bars."""
        self.console.print(line, markup=False)

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Moves the bar of a stage, or prints a line now and then."""
        now = time.monotonic()
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total, detail=detail)
            self.bars.update(self.tasks[what], completed=done, total=total, detail=detail)
            return
        started = self.started.setdefault(what, now)
        if done < total and now - self.printed.get(what, started) < SECONDS_BETWEEN_LINES:
            return
        self.printed[what] = now
        eta = (now - started) / max(1, done) * (total - done)
        text = f"{what} {done}/{total}" + (f"  eta {eta:.0f} s" if done < total and now > started else "")
        self.console.print(f"{text}  {detail}".rstrip(), markup=False)
