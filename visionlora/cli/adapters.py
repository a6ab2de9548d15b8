"""`visionlora convert`, `merge`, `resize`, `extract` and `bake`: adapter files in, adapter files or models out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.cli.options import Overwrite
from visionlora.cli.words import FORMATS, describe, parse_size
from visionlora.config import parse_lora_use
from visionlora.config.choices import dtype_name

if TYPE_CHECKING:
    from visionlora.lora.adapter import Adapter

Output = Annotated[Path, typer.Option("--output", "-o", help="What to write: a file, or a folder for peft.")]
To = Annotated[str, typer.Option("--to", help=f"Format: {FORMATS}.")]
Rank = Annotated[Optional[int], typer.Option(help="Rank of every module.")]  # noqa: UP045
Energy = Annotated[Optional[float], typer.Option(help="Share of ‖ΔW‖² to keep, module by module, such as 0.95.")]  # noqa: UP045


def counting(listener: ConsoleListener, what: str) -> Callable[[int, int], None]:
    """A progress function for a stage."""
    return lambda done, total: listener.progress(what, done, total)


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter of any trainer: a file or a folder.")],
    output: Annotated[Path, typer.Argument(help="What to write: a file, or a folder for peft.")],
    to: To = "visionlora",
    component: Annotated[str, typer.Option(help="Write this part alone, such as unet.")] = "",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out tensors that nothing takes.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another format: `visionlora convert dog.safetensors dog-kohya.safetensors --to kohya`."""
    from visionlora.pipelines.convert import convert as run

    adapter = run(source, output, to, component, allow_partial, overwrite)
    typer.echo(f"{len(adapter.modules)} modules, from {adapter.format} to {to}: {output}")
    tell_words(adapter, output, to)
    for key in adapter.unused:
        typer.echo(f"  left out: {key}")


def tell_words(adapter: Adapter, output: Path, to: str) -> None:
    """Names the files of learned words beside the output."""
    from visionlora.pipelines.convert import files_written

    for file in files_written(adapter, output, to)[1:]:
        typer.echo(f"  a learned word, for the folder of embeddings: {file}")


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapters, each path[:scale][@block=factor,…].")],
    output: Output,
    method: Annotated[str, typer.Option(help="sum (exact), ties, dare, knots or iso-c.")] = "sum",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[float, typer.Option(help="Share of values that ties, dare and knots keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of dare's choice.")] = 0,
    to: To = "visionlora",
    overwrite: Overwrite = False,
) -> None:
    """Make one adapter of several: `visionlora merge dog.safetensors:0.8 ink.safetensors:0.5 -o both.safetensors`."""
    with ConsoleListener() as listener:
        from visionlora.lora.combine import Options
        from visionlora.pipelines.merge import merge as run

        pairs = [parse_lora_use(word) for word in adapters]
        options, size = Options(density, seed), parse_size(rank, energy)
        result = run(pairs, output, method, size, options, to, overwrite, counting(listener, "Merging"))
    typer.echo(f"{describe(result, method)}: {output}")
    tell_words(result.adapter, output, to)
    for note in result.notes:
        typer.echo(note)


def resize(
    source: Annotated[Path, typer.Argument(help="An adapter of any trainer.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    to: To = "visionlora",
    overwrite: Overwrite = False,
) -> None:
    """Make an adapter smaller: `visionlora resize dog.safetensors --energy 0.95 -o small.safetensors`."""
    with ConsoleListener() as listener:
        from visionlora.pipelines.resize import resize as run

        result = run(source, output, parse_size(rank, energy), to, overwrite, counting(listener, "Resizing"))
    typer.echo(f"{describe(result)}: {output}")
    tell_words(result.adapter, output, to)


def extract(
    base: Annotated[
        str, typer.Argument(help="A diffusers folder, Hub id or checkpoint; or a file of tensors (a ViT).")
    ],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model, of the same architecture.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    shifts: Annotated[bool, typer.Option("--shifts", help="Keep the differences of norms and biases too.")] = False,
    to: To = "visionlora",
    overwrite: Overwrite = False,
) -> None:
    """Get an adapter from two models: `visionlora extract base tuned --rank 16 -o lora.safetensors`."""
    with ConsoleListener() as listener:
        from visionlora.pipelines.extract import extract as run

        size = parse_size(rank, energy)
        result = run(base, tuned, output, size, shifts, to, overwrite, counting(listener, "Comparing"))
    typer.echo(f"{describe(result)}: {output}")


def bake(
    model: Annotated[str, typer.Argument(help="The base model; auto takes the one that the first adapter names.")],
    adapters: Annotated[list[str], typer.Argument(help="Adapters, each path[:scale][@block=factor,…].")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the new model; or NAME.safetensors for one file (SD 1.x).")
    ],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, or as torch calls them.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Accept a fine-tune of the adapters' base.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a full model with adapters in its weights: `visionlora bake auto dog.safetensors -o dog-model`."""
    dtype_name(dtype)  # before torch is loaded
    from visionlora.data.wording import count_of
    from visionlora.pipelines.bake import bake as run

    run(model, [parse_lora_use(word) for word in adapters], output, dtype, force, overwrite, typer.echo)
    typer.echo(f"A model with {count_of(len(adapters), 'adapter')} in it: {output}")
