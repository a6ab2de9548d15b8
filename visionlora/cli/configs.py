"""`visionlora configs`, `copy-config` and `check`: the installed recipes, and config files before they are used."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from visionlora.config import TrainingConfig, config_text, read_yaml, recipe_names
from visionlora.config.checking import COMMANDS, check_file, commands_for
from visionlora.errors import ConfigError, nearest
from visionlora.lora.config import known


def list_configs() -> None:
    """List the installed recipes: name, the command that each is for, and its first line."""
    names = recipe_names()
    for name in names:
        command = commands_for(read_yaml(name))[0]
        line = config_text(name).splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<{max(map(len, names))}}  {command:<{max(map(len, COMMANDS))}}  {line}")


def copy_config(
    name: Annotated[str, typer.Argument(help="A recipe, see `visionlora configs`.")],
    destination: Annotated[Path, typer.Argument(help="File to write; by default NAME.yaml here.")] = Path(),
) -> None:
    """Copy a recipe here to edit it: `visionlora copy-config emoji64_dog`."""
    if name not in recipe_names():
        raise ConfigError(f"There is no recipe {name!r}. {nearest(name, recipe_names())}")
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target} exists already; name another file: visionlora copy-config {name} FILE.")
    target.write_text(config_text(name), encoding="utf-8")
    command, file = commands_for(read_yaml(name))[0], shlex.quote(str(target))
    typer.echo(f"Wrote {target}. Use it: visionlora {command} --images FOLDER --config {file}")


def check(
    files: Annotated[list[str], typer.Argument(help="Config files, or names of recipes.")],
) -> None:
    """Look for mistakes in config files, without a model: `visionlora check mine.yaml`."""
    wrong = False
    for name in files:
        try:
            found = check_file(name, unknown_words)
        except ConfigError as e:
            typer.echo(str(e))
            wrong = True
            continue
        what = " or ".join(found.commands)
        if not found.problems:
            typer.echo(f"{name}: OK for {what}.")
            continue
        wrong = True
        count = len(found.problems)
        typer.echo(f"{name}{f' (for {what})' if what else ''}: {count} problem{'s' if count > 1 else ''}")
        for problem in found.problems:
            typer.echo(f"  {problem}")
    if wrong:
        raise typer.Exit(2)


def unknown_words(config: TrainingConfig) -> list[str]:
    """Methods and inits that do not exist; each line begins with the name of the setting."""
    return [
        f"{what} is {word!r}. {nearest(word, known(what))}"
        for what, word in (("method", config.method), ("init", config.init))
        if word not in known(what)
    ]
