"""Config files looked at without a model: which command they are for, and every problem with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from visionlora.config.classify import ClassifyConfig
from visionlora.config.reading import SettingsError, build, config_text, lines_of
from visionlora.config.train_sd import TrainSDConfig
from visionlora.config.training import TrainingConfig
from visionlora.errors import ConfigError

COMMANDS: Mapping[str, type[TrainingConfig]] = {"train-sd": TrainSDConfig, "classify": ClassifyConfig}
"""What is configured by each training command."""
MoreRules = Callable[[TrainingConfig], list[str]]
"""From a configuration to problems, each of which begins with the name of its setting."""


@dataclass(frozen=True)
class Problem:
    """Something in a config file that cannot be used."""

    line: int | None
    """Counted from 1; None where it is of no line, such as something that is missing."""
    text: str

    def __str__(self) -> str:
        return self.text if self.line is None else f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Checked:
    """What was found out about a config file."""

    commands: tuple[str, ...]
    """Those it is for: one, or all when it has shared settings alone."""
    problems: tuple[Problem, ...]


def unknown(command: str, names: Iterable[str]) -> list[str]:
    """The names that are no settings of a command."""
    known = {f.name for f in fields(COMMANDS[command])}
    return [name for name in names if name.replace("-", "_") not in known]


def commands_for(names: Iterable[str]) -> tuple[str, ...]:
    """The commands that know the most of these settings.

    >>> commands_for(["rank", "sample_prompts"]), commands_for(["rank", "mixup"]), commands_for(["rank"])
    (('train-sd',), ('classify',), ('train-sd', 'classify'))
    """
    given = list(names)
    fewest = min(len(unknown(command, given)) for command in COMMANDS)
    return tuple(command for command in COMMANDS if len(unknown(command, given)) == fewest)


def check_file(name: str, more: MoreRules | None = None) -> Checked:
    """Looks at a config file, given by path or by the name of an installed recipe; nothing heavy is loaded.

    Args:
        name: of the file or recipe.
        more: rules beside those of the configuration itself.

    Raises:
        ConfigError: when there is no such file or recipe.
    """
    text = config_text(name)
    try:
        node, settings = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:  # the latter for dates that do not exist
        mark = getattr(e, "problem_mark", None)
        return Checked(
            (), (Problem(mark.line + 1 if mark else None, f"this is not valid YAML: {getattr(e, 'problem', e)}."),)
        )
    if settings is None:
        return Checked(tuple(COMMANDS), ())
    if not isinstance(settings, dict) or not isinstance(node, yaml.MappingNode):
        kind = type(settings).__name__
        return Checked((), (Problem(None, f"it must hold `key: value` lines; it holds a {kind}."),))
    lines, twice = lines_of(node)
    problems = [Problem(line, text) for line, text in twice]
    settings = {str(k).replace("-", "_"): v for k, v in settings.items()}
    commands = commands_for(settings)
    found = [problems_of(COMMANDS[command], settings, more) for command in commands]
    for message in min(found, key=len):
        problems.append(Problem(lines.get(_setting_of(message)), message))
    return Checked(commands, tuple(sorted(problems, key=lambda p: (p.line is None, p.line or 0))))


def problems_of(kind: type[TrainingConfig], settings: Mapping[str, Any], more: MoreRules | None = None) -> list[str]:
    """Everything that is wrong with settings, a line each; pictures may be missing, for a recipe has none.

    Args:
        kind: of configuration.
        settings: by name.
        more: rules beside those of the configuration itself.
    """
    left = dict(settings)
    if not left.get("folders"):
        left.setdefault("images", ".")
    problems: list[str] = []
    while True:  # wrong names and types hide what is out of range: look again without them
        try:
            made = build(kind, left)
        except SettingsError as e:
            new = [p for p in e.problems if p not in problems]
            problems += new
            bad = {_setting_of(p) for p in new} & set(left)
            if not bad:
                return problems
            left = {k: v for k, v in left.items() if k not in bad}
            if not left.get("folders"):
                left.setdefault("images", ".")
        except ConfigError as e:
            return [*problems, str(e)]
        else:
            return problems + (more(made) if more is not None else [])


def _setting_of(problem: str) -> str:
    """The setting that a line is about."""
    found = re.match(r"[\w-]+", problem)
    return found[0].replace("-", "_") if found else ""
