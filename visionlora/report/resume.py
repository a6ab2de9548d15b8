"""Going on with a run that was cut off: its own settings, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from visionlora.config import TrainingConfig, build, read_yaml
from visionlora.errors import ConfigError, RunFolderError

C = TypeVar("C", bound=TrainingConfig)
NOT_KEPT = ("output", "resume", "images")
"""Settings that a resumed run does not compare."""


def resumed_config(folder: Path, config: C) -> C:
    """The settings of the run in a folder.

    Args:
        folder: of the run.
        config: what was asked for now; only defaults and the run's own values are allowed.

    Raises:
        RunFolderError: when there is no such run, or it is finished.
        ConfigError: when other settings were given.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunFolderError(f"{folder} is no run that can be resumed: it has no config.yaml. Name a run folder.")
    if (folder / "run.json").is_file():
        raise RunFolderError(f"The run in {folder} is finished; there is nothing to resume. Start a new one.")
    before, default = build(type(config), read_yaml(str(file))), type(config)(images=".")
    for f in dataclasses.fields(config):
        now, kept = getattr(config, f.name), getattr(before, f.name)
        if f.name not in NOT_KEPT and now not in (getattr(default, f.name), kept):
            raise ConfigError(
                f"A resumed run keeps its settings, but {f.name} is {now!r} here and was {kept!r}. Leave it out, or "
                "start a new run."
            )
    return dataclasses.replace(before, resume=str(folder))
