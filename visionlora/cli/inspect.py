"""`visionlora inspect`: what is in an adapter file, or in every one of a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from visionlora.atomic import check_picture
from visionlora.cli.options import Overwrite
from visionlora.errors import AdapterFileError, ConfigError

LONG = 200
"""Letters of a comment that are shown."""

if TYPE_CHECKING:
    from visionlora.formats.inspection import Inspection, Summary


def command(
    files: Annotated[list[Path], typer.Argument(help="Adapter files, or folders of them for a table.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    model: Annotated[Optional[str], typer.Option(help="Base model, to compare ΔW with its weights.")] = None,  # noqa: UP045
    picture: Annotated[
        Optional[Path], typer.Option(help="Draw ‖ΔW‖ by block to this PNG.")  # noqa: UP045
    ] = None,
    overwrite: Overwrite = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every adapted layer.")] = False,
) -> None:
    """Show format, base, method, ranks, norms, training, tags, hashes and health: `visionlora inspect dog.safetensors`."""
    from visionlora.formats import peft
    from visionlora.formats.inspection import adapter_files, inspect_file, summarise
    from visionlora.formats.read import FOLDER_FILES

    folders = [
        f for f in files if f.is_dir() and not peft.is_folder(f) and not any((f / n).is_file() for n in FOLDER_FILES)
    ]
    if folders or len(files) > 1:
        for option, given in (("--picture", picture), ("--model", model), ("--modules", modules or None)):
            if given is not None:
                raise ConfigError(
                    f"{option} is for one adapter, and several are given: name one file, or leave it out."
                )
        paths = [p for f in files for p in (adapter_files(f) if f in folders else [f])]
        if not paths:
            raise AdapterFileError(f"There are no adapters in {', '.join(map(str, folders))}.")
        found = [summarise(p) for p in paths]
        typer.echo(json.dumps([asdict(s) for s in found], indent=2)) if as_json else table(found)
        return
    if picture is not None:
        check_picture(picture, overwrite)
    base = None
    if model is not None:
        import torch

        from visionlora.models.base import open_base

        base = torch.nn.ModuleDict(open_base(model).components())
    seen = inspect_file(files[0], base)
    if picture is not None:
        from visionlora.report.norms import draw_norms

        draw_norms(seen.blocks, files[0].name, picture)
    if as_json:
        typer.echo(json.dumps(seen.to_dict(), indent=2))
    else:
        page(seen, modules)
        if picture is not None:
            typer.echo(f"\nDrawn to {picture}.")


def table(found: list[Summary]) -> None:
    """One line per file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from visionlora.formats.called import SAME_EVERYWHERE

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "MB", "format", "base", "method", "layers", "rank", "alpha", "trigger"):
        shown.add_column(
            name, justify="right" if name in ("MB", "layers", "rank", "alpha") else "left", overflow="fold"
        )
    for s in found:
        path = Path(s.path)
        label = f"{path.parent.name}/{path.name}" if path.stem in SAME_EVERYWHERE else path.name
        if s.problem:
            shown.add_row(Text(label), "", Text(s.problem, "red") if len(s.problem) < 40 else "cannot be read")
            continue
        ranks = ", ".join(map(str, s.ranks[:3])) + (" …" if len(s.ranks) > 3 else "")
        alpha = "" if s.alpha is None else f"{s.alpha:g}"
        layers = str(sum(s.components.values()))
        row = (label, f"{s.size / 1e6:.1f}", s.format, s.base, s.method, layers, ranks, alpha, s.trigger)
        shown.add_row(*map(Text, row))  # names and triggers are no markup
    Console(width=None if Console().is_terminal else 160).print(shown)
    for s in found:
        if s.problem:
            typer.echo(f"  {s.problem}" if s.path in s.problem else f"  {s.path}: {s.problem}")


def page(seen: Inspection, modules: bool) -> None:
    """Everything about one file."""
    from visionlora.data.images import printable
    from visionlora.data.wording import first_names
    from visionlora.report.norms import bar

    s, history = seen.summary, seen.history
    tags = [f"{tag} {count}" for tag, count in history.tags.items()]
    lines = [
        ("file", f"{s.path}  ({s.size / 1e6:.2f} MB, {s.parameters:,} values)"),
        ("format", s.format),
        ("base", s.base or "not one of Stable Diffusion 1.x, 2.x, XL by its shapes"),
        ("method", s.method),
        ("layers", ", ".join(f"{n} in {c}" for c, n in s.components.items())),
        ("rank", ", ".join(map(str, sorted(s.ranks)))),
        ("alpha", ", ".join(f"{a:g}" for a in sorted({m.alpha for m in seen.modules if m.rank}))),
        ("values", ", ".join(dict.fromkeys(m.dtype for m in seen.modules))),
        ("trigger", s.trigger),
        ("tokens", ", ".join(f"{t} {shape}" for t, shape in seen.embeddings.items())),
        ("classes", f"{len(history.classes)}: {first_names(history.classes)}" if history.classes else ""),
        ("trained", ", ".join(printable(f"{word} {value[:LONG]}") for word, value in history.trained.items())),
        ("tags", f"in so many captions: {first_names(tags)}" if tags else ""),
        *seen.hashes.items(),
    ]
    for name, text in lines:
        if text:
            typer.echo(f"{name:<8} {text}")
    if seen.blocks:
        typer.echo("\n‖ΔW‖ by block")
        most, width = max(seen.blocks.values()) or 1.0, max(map(len, seen.blocks))
        for name, norm in seen.blocks.items():
            typer.echo(f"  {name:<{width}}  {norm:9.3f}  {bar(norm / most)}")
    if modules:
        typer.echo("\nlayers" if seen.modules else "\nno layers")
        width = max((len(m.name) for m in seen.modules), default=0)
        for m in seen.modules:
            size = "" if m.norm is None else f"{m.norm:9.3f}"
            share = "" if m.share is None else f"  {m.share:7.2%} of W"
            typer.echo(f"  {m.name:<{width}}  {m.kind:<5} rank {m.rank:>3}  alpha {m.alpha:<6g} {size}{share}")
    if seen.misfits:
        typer.echo("\nnot in the model")
        for name, why in list(seen.misfits.items())[:10]:
            typer.echo(f"  {name}: {why}")
        if len(seen.misfits) > 10:
            typer.echo(f"  … {len(seen.misfits) - 10} more")
    typer.echo("\nhealth   " + ("good: no NaN, every module does something" if not seen.health else ""))
    for line in seen.health:
        typer.echo(f"  - {line}")
