"""`visionlora train-sd`: a folder of pictures -> an adapter, a sample grid and a run folder."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener, duration
from visionlora.config import PRECISIONS, TrainSDConfig, build, parse_words, read_yaml


def command(
    settings: Annotated[
        Optional[list[str]], typer.Argument(help="Any setting as key=value, for instance warmup_steps=50.")  # noqa: UP045
    ] = None,
    images: Annotated[Optional[str], typer.Option(help="Folder of pictures to learn from.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="One caption for every picture.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, emoji-64, a diffusers folder, a .safetensors checkpoint or a Hub id."),
    ] = None,
    output: Annotated[Optional[str], typer.Option(help="Run folder to create.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="Optimizer steps.")] = None,  # noqa: UP045
    method: Annotated[Optional[str], typer.Option(help="lora, dora, vera, ia3 …; see the README.")] = None,  # noqa: UP045
    rank: Annotated[Optional[str], typer.Option(help="Rank of each layer's change, or auto.")] = None,  # noqa: UP045
    alpha: Annotated[Optional[float], typer.Option(help="Scaling numerator; the rank by default.")] = None,  # noqa: UP045
    targets: Annotated[
        Optional[str], typer.Option(help="Roles (attn, attn.q, mlp, conv, all), names or re:regex, by commas.")  # noqa: UP045
    ] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Learning rate of AdamW.")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(help="Pictures per forward pass.")] = None,  # noqa: UP045
    gradient_accumulation: Annotated[Optional[int], typer.Option(help="Forward passes per step.")] = None,  # noqa: UP045
    resolution: Annotated[Optional[int], typer.Option(help="Width and height in px.")] = None,  # noqa: UP045
    precision: Annotated[Optional[str], typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Of everything random.")] = None,  # noqa: UP045
    sample_prompts: Annotated[
        Optional[list[str]], typer.Option(help="A prompt of the sample grid; repeat for more.")  # noqa: UP045
    ] = None,
    skip_broken: Annotated[
        Optional[bool], typer.Option("--skip-broken", help="Leave out pictures that cannot be used.")  # noqa: UP045
    ] = None,
    resume: Annotated[Optional[str], typer.Option(help="Run folder to go on with.")] = None,  # noqa: UP045
    config: Annotated[
        Optional[list[str]], typer.Option(help="A YAML file or the name of a recipe; repeat for more.")  # noqa: UP045
    ] = None,
) -> None:
    """Train a LoRA on a folder of pictures: `visionlora train-sd --images ./dog`."""
    flags = {k: v for k, v in locals().items() if k not in ("settings", "config") and v is not None}
    files = [read_yaml(name) for name in config or []]
    if resume is not None:
        flags.setdefault("images", resume)  # the run knows its own pictures
    resolved = build(TrainSDConfig, *files, parse_words(settings or []), flags)
    with ConsoleListener() as listener:
        from visionlora.pipelines.train_sd import train_sd

        result = train_sd(resolved, listener)
    typer.echo(f"Done in {duration(result.seconds)}.")
    typer.echo(f"  adapter  {result.adapter}")
    typer.echo(f"  grid     {result.grid}")
    typer.echo(f"  run      {result.folder}")
