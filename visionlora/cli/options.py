"""Options that the training verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional, TypeVar

import typer

from visionlora.config import PRECISIONS, TrainingConfig, build, parse_words, read_yaml

C = TypeVar("C", bound=TrainingConfig)

Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Any setting as key=value, for instance warmup_steps=50."),
]
Output = Annotated[Optional[str], typer.Option(help="Run folder to create.")]  # noqa: UP045
Steps = Annotated[Optional[int], typer.Option(help="Optimizer steps.")]  # noqa: UP045
Rank = Annotated[Optional[str], typer.Option(help="Rank of each layer's change, or auto.")]  # noqa: UP045
Alpha = Annotated[Optional[float], typer.Option(help="Scaling numerator; the rank by default.")]  # noqa: UP045
LearningRate = Annotated[Optional[float], typer.Option(help="Learning rate of AdamW.")]  # noqa: UP045
BatchSize = Annotated[Optional[int], typer.Option(help="Pictures per forward pass.")]  # noqa: UP045
Accumulation = Annotated[Optional[int], typer.Option(help="Forward passes per step.")]  # noqa: UP045
Precision = Annotated[Optional[str], typer.Option(help=f"One of {', '.join(PRECISIONS)}.")]  # noqa: UP045
Seed = Annotated[Optional[int], typer.Option(help="Of everything random.")]  # noqa: UP045
SkipBroken = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--skip-broken", help="Leave out pictures that cannot be used."),
]
Resume = Annotated[Optional[str], typer.Option(help="Run folder to go on with.")]  # noqa: UP045
Config = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="A YAML file or the name of a recipe; repeat for more."),
]


def resolved(kind: type[C], given: Mapping[str, Any]) -> C:
    """The configuration from a command's arguments: config files, then key=value words, then flags.

    Args:
        kind: of configuration.
        given: the arguments by name; `settings` and `config` are the words and the files, the others flags.

    Raises:
        ConfigError: for what cannot be used.
    """
    flags = {k: v for k, v in given.items() if k not in ("settings", "config") and v is not None}
    if "resume" in flags:
        flags.setdefault("images", flags["resume"])  # the run knows its own pictures
    files = [read_yaml(name) for name in given.get("config") or []]
    return build(kind, *files, parse_words(given.get("settings") or []), flags)
