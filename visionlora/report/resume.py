"""Where a run begins: in a new folder, or where one of the same pictures was cut off.

In: the settings as given, among them `resume`. Out: a `Start`: the folder, the settings, and the state to go on from.
Nothing heavy is imported before a state is read.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from visionlora.atomic import hold, let_go, sweep
from visionlora.config import RESUME_AUTO, TrainingConfig, build, read_yaml
from visionlora.config.checking import COMMANDS, commands_for, unknown
from visionlora.data.files import ASKED_FILE
from visionlora.errors import ConfigError, RunFinished, RunFolderError, VisionLoRAError
from visionlora.report.listener import Listener
from visionlora.report.runfolder import (
    SETTINGS_FILES,
    RunFolder,
    check_run_folder,
    default_run_folder,
    is_unstarted,
    open_run_folder,
    taken,
)
from visionlora.report.settings import (
    FIRST_STEP,
    NOT_COMPARED,
    REASONS,
    begun_with,
    differences,
    edited,
    moved,
    noted_in,
    plain,
    replaced,
    settings_in,
    shown,
    write_settings,
)

C = TypeVar("C", bound=TrainingConfig)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class LearnedFrom:
    """What a run learns from, in the words of its checkpoint."""

    digest: str
    """Tells it apart from any other."""
    pictures: tuple[tuple[str, str, str], ...]
    """SHA-256, side (train, val or test) and caption or classes of each picture."""
    classes: tuple[str, ...] = ()
    """Of a classifier."""
    text: str = "captions"
    """What a picture's words are."""
    base: str = ""
    """Tells the weights of the base model apart from any others."""

    @cached_property
    def lines(self) -> str:
        """The pictures as text, short: a checkpoint holds it."""
        return "\n".join(f"{sha[:16]} {side} {' '.join(text.split())}" for sha, side, text in self.pictures)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"data": self.digest, "pictures": self.lines, "classes": list(self.classes), "base": self.base}

    def change_since(self, kept: Mapping[str, Any]) -> str:
        """What is different from a checkpoint, in a few words; nothing when all is the same.

        Raises:
            ConfigError: when a run can never go on like this: with other classes, or judged by what it has learned.
        """
        other_base = "the weights of the base model" if kept.get("base", self.base) != self.base else ""
        if kept["data"] == self.digest:
            return other_base
        if kept.get("classes", list(self.classes)) != list(self.classes):
            raise ConfigError(
                f"The classes have changed since this run was cut off: they were {', '.join(kept['classes'])}, now they are "
                f"{', '.join(self.classes)}. Its head cannot learn others: restore them, or start a new run."
            )
        before, now = (_by_content(text) for text in (kept.get("pictures", ""), self.lines))
        shared = before.keys() & now.keys()
        leaked = sum(before[sha][0] == "train" != now[sha][0] for sha in shared)
        if leaked:
            raise ConfigError(
                f"{leaked} pictures that this run has learned from would now be those that judge it. Restore the pictures, or "
                "start a new run."
            )
        words = [
            f"{len(now.keys() - before.keys())} added",
            f"{len(before.keys() - now.keys())} removed",
            f"{sum(before[sha][1] != now[sha][1] for sha in shared)} with other {self.text}",
        ]
        if all(word.startswith("0 ") for word in words):
            words = ["others twice, or in another part"]
        return ("the weights of the base model; " if other_base else "") + "pictures: " + ", ".join(words)


def _by_content(lines: str) -> dict[str, tuple[str, str]]:
    """From the hash of a picture to its side and words."""
    parts = (line.split(" ", 2) for line in lines.splitlines())
    return {part[0]: (part[1], part[2] if len(part) > 2 else "") for part in parts}


def base_digest(fingerprints: Mapping[str, Mapping[str, str]]) -> str:
    """The weights of all parts of a base model, in short."""
    return " ".join(f"{part} {found['weights']}" for part, found in sorted(fingerprints.items()))


@dataclass(frozen=True)
class Start(Generic[C]):
    """Where a run begins."""

    folder: Path
    config: C
    """Without what belongs to this start alone (output, resume, force)."""
    asked: Mapping[str, Any]
    """The settings as they were given when the run began."""
    state: Mapping[str, Any] | None = None
    """Of the checkpoint to go on from; None for a run from the beginning."""
    changes: tuple[str, ...] = ()
    """Settings that are different from the run's, each `name: was -> is`."""
    force: bool = False
    anew: bool = False
    """The folder holds the beginning of a run that had not done a step."""
    from_previous: bool = False
    """The state is the one before the last, which cannot be read."""
    began: float = field(default_factory=time.monotonic)
    """When this start of the run was, on the clock that never goes back."""

    def open(self, config: C) -> RunFolder:
        """Makes the folder of a new run, or tidies that of an old one.

        Args:
            config: the settings with all defaults filled in; they are written there.

        Raises:
            RunFolderError: when it cannot be made, or another process trains there.
        """
        if self.state is None and not self.anew:
            run = open_run_folder(self.folder)
        else:
            run = RunFolder(self.folder)
            sweep(run.path, run.checkpoints, run.samples)
        _take(self.folder)
        if self.anew:
            old = [*run.samples.glob("*.png"), *run.checkpoints.glob("best.*"), run.path / "validation.jsonl"]
            if (run.path / ASKED_FILE).is_file():  # says all that config.yaml does, which must not look like edited
                old.append(run.path / "config.yaml")
            for path in old:
                path.unlink(missing_ok=True)
        if self.from_previous:
            from visionlora.training.checkpoint import STATE_FILE, promote

            promote(run.checkpoints / STATE_FILE)
        if self.state is None:
            write_settings(run, self.asked, config)
        return run


def begin(config: C, kind: str, tell: Listener) -> Start[C]:
    """Finds out where a run begins; in all processes of a run the same.

    Args:
        config: as given.
        kind: of run, in the names of new folders.
        tell: hears in one line which run goes on, where that was left open.

    Raises:
        RunFinished: when the run has nothing left to do.
        RunFolderError: when there is no such run, or its folder cannot be used.
        ConfigError: when the run had other settings.
    """
    folder, how, line = _agreed(lambda: _choose(config, kind))
    if line:
        tell.say(line)
    if how == "anew" and any((folder / name).is_file() for name in SETTINGS_FILES):
        config = begun_with(folder, config, tell)
        _agreed(lambda: None)  # nobody changes what another has still to read
    if how != "on":
        own = dataclasses.replace(config, output=None, resume=None, force=False)
        return Start(folder, own, plain(config), anew=how == "anew")
    found = _going_on(folder, config, tell)
    _agreed(lambda: None)  # nobody changes what another has still to read
    return found


def finished_run(config: TrainingConfig) -> str | None:
    """For `resume` auto: one line when the run at `output` is finished, None otherwise."""
    if config.resume != RESUME_AUTO or not config.output or not (Path(config.output) / "run.json").is_file():
        return None
    folder = Path(config.output)
    line = f"The run in {folder} is finished; nothing is left to do."
    try:
        before = settings_in(folder, type(config))
        noted = noted_in(folder)
        differing = set(differences(config, before, noted[0] if noted else {})) - {"epochs", *FIRST_STEP}
    except VisionLoRAError:
        return line
    if differing:
        line += f" It had another {', '.join(sorted(differing))}; a new run needs an --output of its own."
    return line


def holding(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what trains in run folders: in the end it lets go of them, whatever happened."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        finally:
            let_go()

    return wrapped


def changed(changes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was changed by force on the way, as a fact of a model card; nothing when nothing was."""
    words = "; ".join(f"at step {change['step']}, {'; '.join(change['what'])}" for change in changes)
    return {"Changed on the way": words.replace(" -> ", " → ")} if words else {}


# ------------------------------------------------------------------------------------------------------ which run

How = Literal["new", "anew", "on"]


def _agreed(choose: Callable[[], T]) -> T:
    """What the main process chooses; an error there is raised in all."""
    from visionlora.training.loop import process_state

    state = process_state()
    if state.num_processes == 1:
        return choose()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = choose()
        except VisionLoRAError as e:
            found[1] = e
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    chosen: T = found[0]
    return chosen


def _choose(config: TrainingConfig, kind: str) -> tuple[Path, How, str]:
    """The folder, what happens there, and a line that says so where it was left open."""
    fresh = Path(config.output) if config.output else default_run_folder(kind, config.title)
    if config.resume is None:
        check_run_folder(fresh)
        return fresh, "new", ""
    if config.resume != RESUME_AUTO:
        folder = Path(config.resume)
        if config.output and Path(config.output).resolve() != folder.resolve():
            raise ConfigError(
                f"--resume {folder} goes on in that folder, and the output {config.output} (of the command line or a config "
                f"file) is another. Give --output {shlex.quote(str(folder))}, or none at all; or copy the run to "
                f"{config.output} and resume the copy."
            )
        if not (folder / "config.yaml").is_file():
            raise RunFolderError(f"{folder} is no run that can be resumed: it has no config.yaml. {_instead(folder)}")
        _check_unfinished(folder, config)
        _take(folder)
        return folder, "on", ""
    if config.output and (_is_run(fresh) or is_unstarted(fresh)):
        _check_unfinished(fresh, config)
        _take(fresh)
        if (fresh / "config.yaml").is_file():
            settings_in(fresh, type(config))
        if is_unstarted(fresh):
            line = f"The run in {fresh} was cut off before its first checkpoint; it starts anew, nothing is lost."
            return fresh, "anew", line
        return fresh, "on", f"Resuming the run in {fresh}."
    place = fresh if config.output else Path("runs")
    for folder in _unfinished(place, config):
        if hold(folder):  # else another process trains there
            if is_unstarted(folder):
                line = f"The last run of {_named(config)}, {folder}, was cut off before its first checkpoint; it starts anew."
                return folder, "anew", line
            return folder, "on", f"Resuming {folder}, the last unfinished run of {_named(config)}."
    if config.output and fresh.is_dir() and any(_is_run(entry) for entry in fresh.iterdir()):
        fresh = default_run_folder(kind, config.title, fresh)
    check_run_folder(fresh)
    if config.output and fresh == place:
        return fresh, "new", f"There is no run in {fresh} yet; starting one."
    return fresh, "new", f"There is no unfinished run of {_named(config)} in {place}; starting a new one in {fresh}."


def _instead(folder: Path) -> str:
    """What to do where a folder has no config.yaml."""
    from visionlora.training.checkpoint import STATE_FILE, learning_on

    if is_unstarted(folder):
        return f"The run was ended before it began. Start it anew: --resume auto --output {shlex.quote(str(folder))}."
    start = learning_on(folder / "checkpoints")
    if not start and not (folder / "checkpoints" / STATE_FILE).is_file():
        return "Name a run folder."
    return f"Put that file back, with the settings of the run{f', or {start}' if start else ''}."


def _named(config: TrainingConfig) -> str:
    """The pictures as a person names them."""
    return " and ".join(_sources(config))


def _sources(config: TrainingConfig) -> list[str]:
    """Where the pictures come from: folders, and a table."""
    several = [folder.path for folder in getattr(config, "folders", ())]
    table = getattr(config, "table", None)
    return [*(several or [config.images]), *([table] if table else [])]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*SETTINGS_FILES, "run.json", "checkpoints/state.pt"))


def _check_unfinished(folder: Path, config: TrainingConfig) -> None:
    if (folder / "run.json").is_file():
        raise RunFinished(
            f"The run in {folder} is finished; there is nothing to resume. Start a new one, which may learn on from its "
            f"adapter: {shlex.quote(f'start_from={folder}')}."
        )


def _take(folder: Path) -> None:
    if not hold(folder):
        raise taken(folder)


def _unfinished(place: Path, config: TrainingConfig) -> list[Path]:
    """The unfinished runs of the same command and pictures in a folder, the newest first."""
    (command,) = (word for word, kind in COMMANDS.items() if isinstance(config, kind))
    wanted = [Path(source).expanduser().resolve() for source in _sources(config)]
    found = []
    for folder in place.iterdir() if place.is_dir() else ():
        file = folder / "config.yaml"
        if not file.is_file() or (folder / "run.json").is_file():
            continue
        try:
            settings = read_yaml(str(file))
            if commands_for(settings) != (command,) or unknown(command, settings):
                continue
            own = [Path(source).expanduser().resolve() for source in _sources(build(type(config), settings))]
        except VisionLoRAError:
            continue
        if own == wanted:
            state = folder / "checkpoints" / "state.pt"
            found.append(((state if state.is_file() else file).stat().st_mtime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


# ------------------------------------------------------------------------------------------------------ going on


def _going_on(folder: Path, config: C, tell: Listener) -> Start[C]:
    """Goes on with the run in a folder.

    Raises:
        RunFolderError: when there is nothing to go on from, or it cannot be read.
        ConfigError: when other settings are given, or are written in its config.yaml, than it had.
    """
    from visionlora.training.checkpoint import STATE_FILE, read_state

    written = settings_in(folder, type(config))
    warned: list[str] = []
    state = read_state(folder / "checkpoints" / STATE_FILE, warned.append)
    for line in warned:
        tell.say(line)
    if missing := [part for part in ("fit", "history", "data") if part not in state]:
        raise RunFolderError(
            f"{folder / 'checkpoints' / STATE_FILE} is no checkpoint of a run (it has no {', '.join(missing)}). Put the "
            "run's own back, or start a new run."
        )
    before = build(type(config), state["settings"]) if "settings" in state else written
    asked = state.get("asked", {})
    changed = differences(config, before, asked)
    told = {**plain(written), **{name: value for name, value in plain(config).items() if name in changed}}
    for name, now in edited(written, before).items():  # what was edited in the file counts as given
        if name not in NOT_COMPARED:
            changed.setdefault(name, now)
    changes = [f"{name}: {shown(getattr(before, name))} -> {shown(now)}" for name, now in changed.items()]
    never = [name for name in changed if name in REASONS]
    if changed and (never or not config.force):
        lines = [
            f"- {line}" + (f" (can never change: {REASONS[name]})" if name in REASONS else "")
            for name, line in zip(changed, changes, strict=True)
        ]
        ways = ["leave them out (in config.yaml: put them back) to go on as before", "start a new run"]
        if not never:
            ways.insert(1, "go on with the new ones by --force")
        raise ConfigError(
            f"The run in {folder} had other settings:\n" + "\n".join(lines) + f"\nEither {', or '.join(ways)}."
        )
    asked = {**asked, **{name: told[name] for name in changed}}
    own = replaced(before, {**changed, **moved(config), "output": None, "resume": None, "force": False})
    return Start(folder, own, asked, state, tuple(changes), config.force, from_previous=bool(warned))
