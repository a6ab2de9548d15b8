"""`visionlora train-sd`: a folder of pictures -> an adapter, a sample grid and a run folder."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from visionlora.cli import options
from visionlora.cli.console import ConsoleListener, duration, speaks, tell
from visionlora.config import TrainSDConfig


def command(
    settings: options.Settings = None,
    images: Annotated[Optional[str], typer.Option(help="Folder of pictures to learn from.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="One caption for every picture.")] = None,  # noqa: UP045
    captions: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto: files of the folder; filename: a picture's name is its caption."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, emoji-64, a diffusers folder, a .safetensors checkpoint or a Hub id."),
    ] = None,
    output: options.Output = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    method: Annotated[Optional[str], typer.Option(help="lora, dora, vera, ia3 …; see the README.")] = None,  # noqa: UP045
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    targets: Annotated[
        Optional[str], typer.Option(help="Roles (attn, attn.q, mlp, conv, all), names or re:regex, by commas.")  # noqa: UP045
    ] = None,
    learning_rate: options.LearningRate = None,
    optimizer: options.Optimizer = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.Accumulation = None,
    resolution: Annotated[Optional[int], typer.Option(help="Width and height in px.")] = None,  # noqa: UP045
    precision: options.Precision = None,
    seed: options.Seed = None,
    sample_prompts: Annotated[
        Optional[list[str]], typer.Option(help="A prompt of the sample grid; repeat for more.")  # noqa: UP045
    ] = None,
    skip_broken: options.SkipBroken = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do, take and need, and end.")
    ] = False,
    resume: options.Resume = None,
    force: options.Force = None,
    config: options.Config = None,
) -> None:
    """Train a LoRA on a folder of pictures: `visionlora train-sd --images ./dog`."""
    given = {name: value for name, value in locals().items() if name != "dry_run"}
    resolved = options.resolved(TrainSDConfig, given)
    if dry_run:
        with ConsoleListener() as listener:
            from visionlora.pipelines.dry_run import dry_run as estimate

            found = estimate(resolved, listener)
        tell("\n".join(found.lines()))
        return
    if (line := options.finished(resolved)) is not None:
        tell(line)
        return
    with ConsoleListener() as listener:
        from visionlora.pipelines.train_sd import train_sd

        result = train_sd(resolved, listener)
    if not speaks():
        return
    typer.echo(f"Done in {duration(result.seconds)}.")
    typer.echo(f"  adapter  {result.adapter}")
    if result.grid is not None:
        typer.echo(f"  grid     {result.grid}")
    typer.echo(f"  run      {result.folder}")
