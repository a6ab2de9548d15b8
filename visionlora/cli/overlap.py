"""`visionlora overlap`: do these adapters get into each other's way?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.errors import AdapterFileError

if TYPE_CHECKING:
    from visionlora.lora.adapter import Adapter


def command(
    adapters: Annotated[list[Path], typer.Argument(help="Two or more adapters of one base model.")],
    picture: Annotated[Optional[Path], typer.Option(help="Draw a heat map by block to this PNG.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="For programs, with every layer.")] = False,
) -> None:
    """Show what adapters share, pair by pair, and how to compose them: `visionlora overlap dog.safetensors ink.safetensors`."""
    with ConsoleListener() as listener:
        from visionlora.loaders import load_adapter
        from visionlora.lora.overlap import overlap

        named = {name: load_adapter(path) for name, path in zip(short_names(adapters), adapters, strict=True)}
        for path, adapter in zip(adapters, named.values(), strict=True):
            check_comparable(path, adapter)
        pairs = overlap(named, None if as_json else lambda done, total: listener.progress("Comparing", done, total))
    if picture is not None:
        from visionlora.report.overlap import draw_overlap

        draw_overlap(pairs, picture)
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


def check_comparable(path: Path, adapter: Adapter) -> None:
    """Raises AdapterFileError, which names the file, when ΔW of a layer depends on the base."""
    from visionlora.lora.arithmetic import additive

    for layer, module in adapter.modules.items():
        try:
            if module.kind != "shift":
                additive(layer, module, "compared")
        except AdapterFileError as e:
            raise AdapterFileError(f"{path}: {e}") from None


def short_names(paths: list[Path]) -> list[str]:
    """Names that tell files apart: of run folders the folder's.

    >>> short_names([Path("runs/dog/adapter.safetensors"), Path("ink.safetensors"), Path("other/ink.safetensors")])
    ['dog', 'ink', 'other/ink']
    """
    found: list[str] = []
    for path in paths:
        name = path.parent.name if path.stem == "adapter" and path.parent.name else path.stem
        if name in found:
            name = f"{path.parent.name}/{name}"
        number = 2
        while name in found:
            name, number = f"{path.stem} {number}", number + 1
        found.append(name)
    return found
