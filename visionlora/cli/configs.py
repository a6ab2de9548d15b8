"""`visionlora configs` and `copy-config`: the installed recipes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from visionlora.config import recipe_names
from visionlora.errors import ConfigError, nearest


def list_configs() -> None:
    """List the installed recipes with their first line."""
    names = recipe_names()
    for name in names:
        text = (resources.files("visionlora.configs") / f"{name}.yaml").read_text(encoding="utf-8")
        typer.echo(f"{name:<{max(map(len, names))}}  {text.splitlines()[0].lstrip('# ')}")


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
    target.write_text((resources.files("visionlora.configs") / f"{name}.yaml").read_text(encoding="utf-8"))
    typer.echo(f"Wrote {target}. Use it with --config {target}.")
