"""Options that the training verbs share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer
from typer.core import TyperCommand

from visionlora.config import OPTIMIZERS, PRECISIONS, RESUME_AUTO, TrainingConfig, build, parse_words, read_yaml
from visionlora.config.checking import COMMANDS, commands_for, unknown
from visionlora.config.reading import MOST_NAMED
from visionlora.errors import ConfigError

C = TypeVar("C", bound=TrainingConfig)


class TrainingCommand(TyperCommand):
    """A training verb: settings that are written like options are explained, and of two folders none is left out in silence.

    Of other options that are given twice the last counts, as everywhere: scripts append what they change.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click.

        Raises:
            ConfigError: for a setting that is written like an option, and for two folders of pictures.
        """
        options = {word: p for p in self.params for word in getattr(p, "opts", ()) if word.startswith("--")}
        known = {f.name for f in fields(COMMANDS[self.name or ""])}
        images: str | None = None
        for i, arg in enumerate(args[: args.index("--") if "--" in args else None]):
            word, equals, value = arg.partition("=")
            name, value = word.removeprefix("--").replace("-", "_"), value if equals else "".join(args[i + 1 : i + 2])
            if word == "--images":
                if images not in (None, value):
                    raise ConfigError(_twice(images, value, several="folders" in known))
                images = value
            elif word in options:
                continue
            elif word.startswith("--") and (own := f"--{name.replace('_', '-')}") in options:
                raise ConfigError(f"{word} is not an option; it is written {own}.")
            elif word.startswith("--") and name in known:
                shown = shlex.quote(value) if value and not value.startswith("--") else "…"
                raise ConfigError(
                    f"{word} is not an option but a setting, which is written without dashes: {name}={shown}"
                )
        return super().parse_args(ctx, args)


def _twice(first: str, second: str, several: bool) -> str:
    """What to say of two folders of pictures; `several` is whether there may be as many."""
    how = "leave one of them out."
    if several:
        both = f"folders=[{{path: {first}}}, {{path: {second}}}]"
        how = f"several folders are one setting, each with its own prompt, captions and repeats: {shlex.quote(both)}"
    return f"--images is given twice, as {first!r} and {second!r}: {how}"


Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Any setting as key=value, for instance warmup_steps=50; `visionlora settings` lists them."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Output = Annotated[Optional[str], typer.Option(help="Run folder to create.")]  # noqa: UP045
Steps = Annotated[Optional[int], typer.Option(help="Optimizer steps.")]  # noqa: UP045
Epochs = Annotated[Optional[float], typer.Option(help="Passes over the training pictures, instead of steps.")]  # noqa: UP045
Rank = Annotated[Optional[str], typer.Option(help="Rank of each layer's change, or auto.")]  # noqa: UP045
Alpha = Annotated[Optional[float], typer.Option(help="Scaling numerator; the rank by default.")]  # noqa: UP045
LearningRate = Annotated[Optional[float], typer.Option(help="Learning rate, after warm-up.")]  # noqa: UP045
Optimizer = Annotated[Optional[str], typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]  # noqa: UP045
BatchSize = Annotated[Optional[int], typer.Option(help="Pictures per forward pass.")]  # noqa: UP045
Accumulation = Annotated[Optional[int], typer.Option(help="Forward passes per step.")]  # noqa: UP045
Precision = Annotated[Optional[str], typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]  # noqa: UP045
Seed = Annotated[Optional[int], typer.Option(help="Of everything random.")]  # noqa: UP045
SkipBroken = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--skip-broken", help="Leave out pictures that cannot be used."),
]
Resume = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Run folder to go on with; auto: the last unfinished run of these pictures, or a new one."),
]
Force = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--force", help="With --resume: go on with other settings or pictures than the run had."),
]
Config = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="A YAML file or the name of a recipe; repeat for more."),
]


def resolved(kind: type[C], given: Mapping[str, Any]) -> C:
    """The configuration from a command's arguments: config files, then key=value words, then flags.

    Args:
        kind: of configuration.
        given: the arguments by name; `settings` and `config` are the words and the files, the others flags.

    Raises:
        ConfigError: for what cannot be used.
    """
    flags = {k: v for k, v in given.items() if k not in ("settings", "config") and v is not None}
    mappings = (f"{k}={v}" for k, v in flags.items() if isinstance(v, str) and v.lstrip().startswith("{"))
    flags |= parse_words(mappings, kind)  # as YAML writes them; texts stay as they are
    files = [settings_for(kind, name) for name in given.get("config") or []]
    words = parse_words(given.get("settings") or [], kind)
    layers = [*files, words, flags]
    resume, output = (next((str(x[k]) for x in reversed(layers) if x.get(k)), "") for k in ("resume", "output"))
    if resume and not any(layer.get(name) for layer in layers for name in ("images", "folders")):
        auto = resume == RESUME_AUTO
        layers.insert(0, pictures_of(output if auto else resume, may_be_new=auto))
    return build(kind, *layers)


def settings_for(kind: type[TrainingConfig], name: str) -> dict[str, Any]:
    """The settings of a config file for a command.

    Raises:
        ConfigError: when it cannot be read, or is for another command.
    """
    settings = read_yaml(name)
    commands = commands_for(settings)
    if all(COMMANDS[command] is not kind for command in commands):
        own = next(command for command, configured in COMMANDS.items() if configured is kind)
        foreign = ", ".join(unknown(own, settings)[:MOST_NAMED])
        raise ConfigError(
            f"{name} is for `visionlora {commands[0]}`, and {own} has no {foreign}. Use it so: visionlora {commands[0]} "
            f"--images FOLDER --config {shlex.quote(name)}"
        )
    return settings


def finished(config: TrainingConfig) -> str | None:
    """What is said instead of training, when `--resume auto` finds nothing left to do at `--output`."""
    if config.resume != RESUME_AUTO:
        return None
    from visionlora.report.resume import finished_run

    return finished_run(config)


def pictures_of(folder: str, may_be_new: bool) -> dict[str, Any]:
    """Where the run in a folder has its pictures: it knows them itself.

    Args:
        folder: of the run; none when empty.
        may_be_new: whether a folder in which no run is will do, for one that then begins there.
    """
    file = Path(folder).expanduser() / "config.yaml"
    if folder and file.is_file():
        return {name: value for name, value in read_yaml(str(file)).items() if name in ("images", "folders") and value}
    # Named as the pictures, so that what is said is what is wrong with the folder, not that pictures are missing.
    return {"images": folder} if folder and not (may_be_new and file.parent.is_dir()) else {}
