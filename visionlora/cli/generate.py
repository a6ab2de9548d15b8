"""`visionlora generate` and `show`: prompts -> pictures with their recipes, and a recipe out of a picture again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from visionlora.cli.console import ConsoleListener, tell
from visionlora.config import GenerateConfig, parse_composition, parse_lora_use, parse_region
from visionlora.errors import ConfigError

Prompt = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="What to draw; repeat for more. <lora:name:0.8> in it sets an adapter's scale."),
]
Lora = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="An adapter, path[:scale][@block=factor,…] such as dog:0.8@up=1.2,mid=0; start=0.3 (and end=0.9) acts from there "
        "on alone, first=1,last=0 fades; repeat for more."
    ),
]
LoraFolder = Annotated[Path, typer.Option(help="Where <lora:name> looks for files.")]
Model = Annotated[str, typer.Option(help="Base model; auto takes the one that the first adapter names.")]
Negative = Annotated[str, typer.Option(help="What not to draw.")]
Seed = Annotated[int, typer.Option(help="Of the noise of the first picture of each prompt.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Guidance = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Classifier-free guidance; by default what suits the base."),
]
Scheduler = Annotated[str, typer.Option(help="dpm++, ddim, euler, euler-a, heun, unipc or pndm.")]
Width = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="In px; by default the model's own area, in the shape of the picture to start from or to follow."
    ),
]
ClipSkip = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Layers from the end that the text is read; by default as the adapters were trained, else 1."),
]
Compose = Annotated[
    str, typer.Option(help="sum, balanced, orthogonal, switch[:tau=5], composite, k-lora, knots or iso-c.")
]
Region = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Where an adapter draws: name=left,top,right,bottom (0 to 1) or name=mask.png; repeat for each."),
]
InitImage = Annotated[Optional[Path], typer.Option(help="A picture to start from.")]  # noqa: UP045
Strength = Annotated[float, typer.Option(help="How far from that picture, above 0 to 1.")]
Mask = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="What of that picture is drawn anew: a picture of its size, white where."),
]
ControlNet = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--controlnet", help="A ControlNet for the base's family: a diffusers folder or a Hub id."),
]
Control = Annotated[Optional[Path], typer.Option(help="The picture that it follows.")]  # noqa: UP045
ControlScale = Annotated[float, typer.Option(help="How closely; 0 or more.")]
BatchSize = Annotated[
    int,
    typer.Option(
        help="Pictures drawn at once, each with its own prompt, seed and adapters; values may round otherwise than alone."
    ),
]
Device = Annotated[
    str, typer.Option(help="auto (cuda, Intel's xpu or a Mac's mps where there is one), cpu, cuda, xpu, mps.")
]
Precision = Annotated[str, typer.Option(help="auto (half on cuda, fp32 on mps and cpu), fp32, bf16 or fp16.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a fine-tune of the adapter's base.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Use what fits of an adapter that does not fit as a whole.")
]


def command(
    prompt: Prompt = None,
    prompts: Annotated[Optional[Path], typer.Option(help="A text file with one prompt per line.")] = None,  # noqa: UP045
    lora: Lora = None,
    lora_folder: LoraFolder = Path(),
    model: Model = "auto",
    negative_prompt: Negative = "",
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt, with seeds one after the other.")] = 1,
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
    batch_size: BatchSize = 1,
    device: Device = "auto",
    precision: Precision = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures; those there already are not drawn again.")
    ] = Path("pictures"),
    force: Force = False,
    allow_partial: AllowPartial = False,
) -> None:
    """Draw pictures: `visionlora generate --prompt "a dog face" --lora runs/dog:0.8`."""
    options = dict(locals())
    wanted = [*(prompt or []), *lines_of(prompts)]
    with ConsoleListener() as listener:
        from visionlora.pipelines.generate import generate

        config = config_of(options, prompts=wanted, num_images=num_images)
        drawn = generate(config, listener.say, lambda done, total: listener.progress("Drawing", done, total))
    for i, picture in enumerate(drawn, 1):
        tell(f"{i}. {picture.path}" + ("" if picture.new else "  (was there already)"))


def config_of(options: Mapping[str, Any], **own: Any) -> GenerateConfig:
    """The settings of a command that draws.

    Args:
        options: of the command by name, as typer gives them; those with the name of a setting are taken as they are.
        own: settings that the command makes itself.
    """
    name, choices = composed(options["compose"], options["region"])
    uses = [parse_lora_use(word) for word in options["lora"] or []]
    made = {"loras": uses, "compose": name, "compose_options": tuple(choices.items()), **own}
    names = {f.name for f in fields(GenerateConfig)}
    return GenerateConfig(**{k: v for k, v in options.items() if k in names} | made)


def composed(compose: str, region: list[str] | None) -> tuple[str, dict[str, Any]]:
    """The composition and its options; regions make it `regional`.

    Raises:
        ConfigError: when regions are given beside another composition, or an adapter has two.
    """
    name, options = parse_composition(compose)
    if not region:
        return name, dict(options)
    if name not in ("sum", "regional"):
        raise ConfigError(
            f"--region and --compose {name} do not go together: with regions each adapter draws its own part."
        )
    regions: dict[str, list[float] | str] = {}
    for word in region:
        adapter, place = parse_region(word)
        if adapter in regions:
            raise ConfigError(f"--region {word}: {adapter} has a region already; each adapter has one.")
        regions[adapter] = place
    return "regional", {**options, "regions": regions}


def lines_of(file: Path | None) -> list[str]:
    """The prompts of a file, without empty lines and those that start with #."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        from visionlora.data.wording import missing

        raise ConfigError(f"The prompts cannot be read: {missing(file, 'file', (file.suffix,))}") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"The prompts cannot be read from {file}: {reason}.") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def show(
    picture: Annotated[Path, typer.Argument(help="A picture that visionlora drew.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole recipe, for programs.")] = False,
) -> None:
    """Print the command that draws a picture again, byte for byte: `visionlora show pictures/a-dog-0-1a2b3c4d.png`.

    Adapters and pictures of it that are not here, or have changed since, are named, and models that are not here.
    """
    from visionlora.pipelines.show import show as run

    shown = run(picture)
    if as_json:
        typer.echo(json.dumps(asdict(shown.recipe), indent=2))
        return
    typer.echo(str(shown))
    for line in shown.changed:
        typer.echo(f"{line} The command draws another picture, or none.", err=True)
