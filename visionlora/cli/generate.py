"""`visionlora generate`: prompts -> pictures, with any number of adapters, each with its own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.cli.words import parse_lora


def command(
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for more pictures.")],
    lora: Annotated[
        Optional[list[str]], typer.Option(help="An adapter file or run folder, path[:scale]; repeat for more.")  # noqa: UP045
    ] = None,
    model: Annotated[str, typer.Option(help="Base model; auto takes the one that the first adapter names.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    seed: Annotated[int, typer.Option(help="Of the noise; each picture starts from it.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    guidance_scale: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Classifier-free guidance; by default what suits the base."),
    ] = None,
    size: Annotated[Optional[int], typer.Option(help="Width and height in px.")] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Accept a fine-tune of the adapter's base.")] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Use what fits of an adapter that does not fit as a whole.")
    ] = False,
) -> None:
    """Draw pictures: `visionlora generate --prompt "a dog face" --lora runs/dog:0.8`."""
    wanted = [parse_lora(word) for word in lora or []]
    with ConsoleListener() as listener:
        from visionlora.diffusion.sampling import SamplingConfig, draw
        from visionlora.loaders import apply, load_adapter
        from visionlora.models.base import open_base

        adapters = [(load_adapter(path, allow_partial), scale) for path, scale in wanted]
        if model == "auto" and adapters:
            model = str(adapters[0][0].info.get("base", {}).get("id", "auto"))
        base = open_base(model)
        listener.say(base.why)
        base.check_resolution(size or base.resolution)
        for i, (adapter, scale) in enumerate(adapters):
            for handle in apply(base, adapter, f"lora{i}", scale, force, allow_partial):
                listener.say(f"Adapter {wanted[i][0]} at {scale:g}: {handle.report}.")
        guidance = base.suggested["guidance_scale"] if guidance_scale is None else guidance_scale
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            listener.progress("Drawing", done, len(prompt))

        pictures = draw(base, prompt, size or base.resolution, SamplingConfig(steps, guidance, seed), count)
    output.mkdir(parents=True, exist_ok=True)
    for i, (words, picture) in enumerate(zip(prompt, pictures, strict=True)):
        stem = "".join(c if c.isalnum() else "-" for c in words)[:40].strip("-") or "picture"
        path, number = output / f"{stem}.png", 1
        while path.exists():
            number += 1
            path = output / f"{stem}-{number}.png"
        picture.save(path)
        typer.echo(f"{i + 1}. {path}")
