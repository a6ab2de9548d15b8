"""The verbs of the command line and what happens when one fails.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Errors meant for the user are printed without a traceback
(`VISIONLORA_DEBUG=1` shows it).
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from visionlora import __version__
from visionlora.atomic import is_full
from visionlora.cli import adapters, cache, classify, configs, generate, grid, inspect, overlap, plugins, train_sd
from visionlora.cli.console import fail, file_problem, leave_to_first, speaks
from visionlora.cli.options import TrainingCommand
from visionlora.errors import ConfigError, VisionLoRAError
from visionlora.models.devices import leave_launch, process_lost
from visionlora.training.interrupts import listen

INTERRUPTED = 130
SHARED = ("train-sd", "classify", "predict", "generate", "grid")
"""Verbs whose work the processes of a launch share; any other is the first one's alone."""

app = typer.Typer(
    name="visionlora",
    help="Fine-tunes image models with LoRA adapters and applies several of them at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train-sd", cls=TrainingCommand)(train_sd.command)
app.command("classify", cls=TrainingCommand)(classify.command)
app.command("predict")(classify.predict)
app.command("export")(classify.export)
app.command("generate")(generate.command)
app.command("grid")(grid.command)
app.command("show")(generate.show)
app.command("inspect")(inspect.command)
app.command("convert")(adapters.convert)
app.command("merge")(adapters.merge)
app.command("resize")(adapters.resize)
app.command("extract")(adapters.extract)
app.command("bake")(adapters.bake)
app.command("overlap")(overlap.command)
app.command("configs")(configs.list_configs)
app.command("copy-config")(configs.copy_config)
app.command("settings")(configs.settings)
app.command("check")(configs.check)
app.command("cache")(cache.command)
app.command("plugins")(plugins.command)


def show_version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        typer.echo(f"visionlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fine-tunes image models with LoRA adapters and applies several of them at once."""
    if not is_here():
        raise ConfigError("The folder in which this was started is not there any more; change into another one: cd ~")
    if context.invoked_subcommand in SHARED and os.environ.get("SOURCE_DATE_EPOCH"):
        from visionlora.report.environment import began

        began()  # libraries that read it too, as they are imported, say nothing that helps where it is no time
    if context.invoked_subcommand not in SHARED and not speaks():
        raise typer.Exit


def is_here() -> bool:
    """Whether there is a working directory; torch ends the process where there is none."""
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def main() -> None:
    """Runs the command line."""
    listen()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed; what is told goes nowhere
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Windows writes files and pipes in an encoding that has not every sign.
        sys.stdout.reconfigure(errors="replace")
    try:
        if speaks():
            app()
        else:
            sys.exit(app(standalone_mode=False))  # which leaves to us what is said of words that it does not know
    except VisionLoRAError as e:
        if os.environ.get("VISIONLORA_DEBUG"):
            raise
        fail(str(e), e.exit_code)
    except OSError as e:
        if isinstance(e, BrokenPipeError):
            sys.exit(1)
        if os.environ.get("VISIONLORA_DEBUG") or not (is_full(e) or isinstance(e.filename, str)):
            raise
        fail(file_problem(e), 1)
    except KeyboardInterrupt:
        interrupted()
    except SystemExit as e:
        if e.code == INTERRUPTED:  # what typer makes of Ctrl-C
            interrupted()
        if not e.code:
            leave_launch()
        raise
    except Exception as e:
        if (lost := process_lost(e)) is not None and not os.environ.get("VISIONLORA_DEBUG"):
            fail(str(lost), lost.exit_code)
        leave_to_first(code := getattr(e, "exit_code", 1))
        if speaks() or not hasattr(e, "show"):
            raise
        e.show()
        sys.exit(code)


def interrupted() -> NoReturn:
    """Ends the process after Ctrl-C."""
    if speaks():
        print("Interrupted.", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
