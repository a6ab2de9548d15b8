"""`visionlora grid`: one picture for each combination of settings, as contact sheet and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.cli.generate import (
    AllowPartial,
    BatchSize,
    ClipSkip,
    Compose,
    Control,
    ControlNet,
    ControlScale,
    Device,
    Force,
    Guidance,
    InitImage,
    Lora,
    LoraFolder,
    Mask,
    Model,
    Negative,
    Precision,
    Prompt,
    Region,
    Scheduler,
    Seed,
    Steps,
    Strength,
    Width,
    config_of,
)

AXIS = "name=value,value… such as seed=1..4, lora:dog.scale=0,0.5,1, prompt=a dog|a cat, compose=sum,switch"
NAMES = (
    "Names: prompt, negative_prompt, seed, steps, guidance_scale, scheduler, width, height, clip_skip, compose, model, "
    "precision, init_image, strength, mask, control, control_scale; step (of a training run); lora:NAME.scale, .file, .step, "
    "or a block such as .up"
)


def command(
    x: Annotated[str, typer.Option("--x", help=f"Across: {AXIS}. {NAMES}.")],
    y: Annotated[Optional[str], typer.Option("--y", help="Down.")] = None,  # noqa: UP045
    axis: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--axis", "--z", help="One sheet for each of its values; repeat for more."),
    ] = None,
    prompt: Prompt = None,
    lora: Lora = None,
    lora_folder: LoraFolder = Path(),
    model: Model = "auto",
    negative_prompt: Negative = "",
    seed: Seed = 0,
    steps: Steps = 25,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = "dpm++",
    width: Width = None,
    height: Width = None,
    clip_skip: ClipSkip = None,
    compose: Compose = "sum",
    region: Region = None,
    init_image: InitImage = None,
    strength: Strength = 0.6,
    mask: Mask = None,
    controlnet: ControlNet = None,
    control: Control = None,
    control_scale: ControlScale = 1.0,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    precision: Precision = "auto",
    output: Annotated[Path, typer.Option(help="Folder; pictures there already are taken as they are.")] = Path("grid"),
    force: Force = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Compare settings: `visionlora grid --lora dog:1 --x lora:dog.scale=0,0.5,1 --y "prompt=a dog|a cat"`."""
    options = dict(locals())
    with ConsoleListener() as listener:
        from visionlora.diffusion.axes import parse_axis
        from visionlora.pipelines.grid import grid

        axes = [parse_axis(word) for word in (x, *([y] if y else []), *(axis or []))]
        config = config_of(options, prompts=prompt or [])
        down = axes[1] if y else None
        others = axes[2 if y else 1 :]
        result = grid(config, axes[0], down, others, listener.say, lambda d, t: listener.progress("Drawing", d, t))
    if not result.sheets:  # another process of this launch has them
        return
    kept = sum(not cell.new for cell in result.cells)
    typer.echo(f"{len(result.cells)} pictures" + (f", {kept} of them there already" if kept else ""))
    for path in result.sheets:
        typer.echo(f"  sheet  {path}")
    typer.echo(f"  page   {result.page}")
