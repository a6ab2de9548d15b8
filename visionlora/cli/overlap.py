"""`visionlora overlap`: do these adapters get into each other's way?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.cli.options import Overwrite


def command(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapters of one base model.")],
    picture: Annotated[Optional[Path], typer.Option(help="Draw a heat map by block to this PNG.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs, with every layer.")] = False,
) -> None:
    """Show what adapters share, pair by pair, and how to compose them: `visionlora overlap dog.safetensors ink.safetensors`."""
    with ConsoleListener() as listener:
        from visionlora.pipelines.overlap import overlap

        progress = None if as_json else lambda done, total: listener.progress("Comparing", done, total)
        pairs = overlap(adapters, picture, progress, overwrite)
    if as_json:
        typer.echo(json.dumps([p.to_dict() for p in pairs], indent=1))
        return
    width = max(len(f"{p.first} + {p.second}") for p in pairs)
    typer.echo(f"{'':<{width}}  layers  same outputs  same inputs  cosine  shared energy  interference     ‖ΔW‖")
    for p in pairs:
        columns = [f"{p.mean(what):.2f}" for what in ("outputs", "inputs", "cosine", "shared")]
        typer.echo(
            f"{p.first + ' + ' + p.second:<{width}}  {len(p.layers):>6}  {columns[0]:>12}  {columns[1]:>11}  {columns[2]:>6}  "
            f"{columns[3]:>13}  {p.interference:>12.2f}  {p.first_norm:.1f}, {p.second_norm:.1f}"
        )
    typer.echo("")
    for p in pairs:
        typer.echo(f"{p.first} + {p.second}: {p.advice}.")
    if picture is not None:
        typer.echo(f"Drawn to {picture}.")
