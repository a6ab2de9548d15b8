"""The settings of a run: as they were asked for and as they were filled in; written, read again and compared."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from visionlora import __version__
from visionlora.config import TrainingConfig, build, given_names, read_yaml, to_yaml
from visionlora.config.checking import COMMANDS, commands_for, unknown
from visionlora.config.reading import GIVEN
from visionlora.data.files import ASKED_FILE
from visionlora.errors import ConfigError, RunFolderError
from visionlora.report.listener import Listener
from visionlora.report.runfolder import RunFolder

C = TypeVar("C", bound=TrainingConfig)

NOT_COMPARED = ("output", "resume", "force", "images", "folders")
"""Settings that a resumed run does not compare; the pictures themselves are compared."""
SHAPING = ("model", "weights", "method", "rank", "rank_budget", "alpha", "targets", "init", "basis_index",
           "start_from", "train_text_encoder", "token", "token_vectors", "optimizer", "betas", "ema_decay")  # fmt: skip
"""Settings that shape the adapter or the state of its optimizer: no run can go on with others."""
APART = ("seed", "validation", "val_share", "test_share", "group_column", "split_column")
"""Settings by which pictures are kept apart: with others, the run would be judged by what it has learned from."""
FIRST_STEP = ("find_rate", "head_init", "token_initializer")
"""Settings that count before the first step alone."""
REASONS = {
    **dict.fromkeys(SHAPING, "it shapes the adapter or its optimizer"),
    **dict.fromkeys(APART, "it decides which pictures are kept apart"),
    **dict.fromkeys(FIRST_STEP, "it counts before the first step alone"),
}
"""Why a setting can never change."""


def write_settings(run: RunFolder, asked: Mapping[str, Any], config: TrainingConfig) -> None:
    """Writes what was asked for, from which a run that has no checkpoint yet starts anew, then the config.yaml.

    Args:
        run: where.
        asked: the settings as they were given.
        config: those with all defaults filled in.
    """
    words = "# What this run was asked for, and what was made of it. To run it again, take config.yaml.\n"
    record = {"asked": dict(asked), "filled_in": plain(config)}
    run.write_text(ASKED_FILE, words + yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
    run.write_text("config.yaml", to_yaml(config))


def settings_in(folder: Path, kind: type[C]) -> C:
    """The settings in a run folder.

    Raises:
        RunFolderError: when it is a run of another command or version.
    """
    settings = read_yaml(str(folder / "config.yaml"))
    (command,) = (word for word, known in COMMANDS.items() if issubclass(kind, known))
    if command not in (others := commands_for(settings)):
        raise RunFolderError(
            f"{folder} is a run of `visionlora {others[0]}`, not of `visionlora {command}`. Go on with it by: "
            f"visionlora {others[0]} --resume {shlex.quote(str(folder))}"
        )
    if names := unknown(command, settings):
        raise RunFolderError(
            f"The run in {folder} has settings that visionlora {__version__} does not know: {', '.join(names)}. If "
            "config.yaml was edited, put them right (`visionlora check` names the nearest); if another version made "
            "the run, go on with that one (pip install -U visionlora), or start a new run."
        )
    return build(kind, settings)


def noted_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What was asked for and what was filled in, as `write_settings` notes it; None in the folder of an older version.

    Raises:
        RunFolderError: when the file holds something else.
    """
    file = folder / ASKED_FILE
    if not file.is_file():
        return None
    noted = read_yaml(str(file))
    asked, filled = noted.get("asked"), noted.get("filled_in")
    if not isinstance(asked, dict) or not isinstance(filled, dict):
        raise RunFolderError(
            f"{file} does not say what the run was asked for: `asked` and `filled_in` must hold settings. Put it right, or "
            "remove it, and the settings in config.yaml count."
        )
    return asked, filled


def begun_with(folder: Path, config: C, tell: Listener) -> C:
    """The settings of a run that was cut off before its first checkpoint, with those that are given in their place.

    What was filled in is left out: other settings, pictures and machines have other defaults. The config.yaml of an older
    version does not tell it apart; there all counts as asked for.

    Raises:
        ConfigError: when the given ones do not go with the others; of an older version, also for one that shapes the adapter.
    """
    noted, kind = noted_in(folder), type(config)
    written = settings_in(folder, kind) if (folder / "config.yaml").is_file() else None
    if noted is None:
        assert written is not None
        before = written
    else:
        asked, filled = (build(kind, settings) for settings in noted)
        before = asked if written is None else replaced(asked, edited(written, filled))
    changed = differences(config, before, {})
    lines = [f"{name}: {shown(getattr(before, name))} -> {shown(now)}" for name, now in changed.items()]
    if noted is None and any(name in SHAPING for name in changed):
        raise ConfigError(
            f"The run in {folder} was begun with other settings ({'; '.join(lines)}). It has learned nothing yet: leave them "
            "out to start it as it was begun, or start a new run in another folder."
        )
    try:
        settings = replaced(before, {**changed, **moved(config)})
    except ConfigError as e:
        raise ConfigError(
            f"{e}\nWhat is not given counts as the run in {folder} was begun with it: give it too, or start a new run in "
            "another folder."
        ) from None
    if lines:
        tell.say(f"It starts with changes: {'; '.join(lines)}.")
    return settings


def replaced(config: C, changed: Mapping[str, Any]) -> C:
    """The settings with others in their place; of steps and epochs the one that is given counts."""
    instead = {"epochs": "steps", "steps": "epochs"}
    off = {instead[name]: None for name in instead if changed.get(name) is not None}
    return dataclasses.replace(config, **{**off, **changed})


def edited(written: C, before: C) -> dict[str, Any]:
    """The settings in a config.yaml that are not as the run had written them, and what they are now."""
    pairs = {f.name: (getattr(before, f.name), getattr(written, f.name)) for f in dataclasses.fields(written)}
    return {name: now for name, (was, now) in pairs.items() if now != was}


def differences(config: C, before: C, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given and are neither the run's nor what it was asked for, and what they are now."""
    words, given = plain(config), given_names(config)
    return {
        f.name: now
        for f in dataclasses.fields(config)
        if f.name in given
        and f.name not in NOT_COMPARED
        and (now := getattr(config, f.name)) != getattr(before, f.name)
        and (f.name not in asked or words[f.name] != asked[f.name])
    }


def moved(config: TrainingConfig) -> dict[str, Any]:
    """Where the pictures are now, when that was said on the command line; whether they are the same is seen later."""
    said = config.__dict__.get(GIVEN, frozenset())
    several = {"folders": getattr(config, "folders", ())} if hasattr(config, "folders") else {}
    return {"images": config.images, **several} if said & {"images", "folders"} else {}


def plain(config: TrainingConfig) -> dict[str, Any]:
    """The settings as a YAML file would hold them."""
    plain: dict[str, Any] = yaml.safe_load(to_yaml(config))
    return plain


def shown(value: Any) -> str:
    """A setting as a message names it."""
    if value is None or value == ():
        return "none"
    return ", ".join(map(shown, value)) if isinstance(value, tuple | list) else str(value)
