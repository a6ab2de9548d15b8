"""Settings read from YAML files, `key=value` words and flags.

Precedence: defaults < config files < key=value < flags. An unknown key is an error that names the nearest one, and
all problems of a configuration are reported together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from visionlora.errors import ConfigError, nearest

T = TypeVar("T")


MOST_NAMED = 12
"""Settings that a message names where none is near what was given."""


class SettingsError(ConfigError):
    """Settings that cannot be used."""

    def __init__(self, problems: list[str]) -> None:
        """Takes one line each, which begins with the name of the setting."""
        super().__init__("These settings cannot be used:\n" + "\n".join(f"- {p}" for p in problems))
        self.problems = problems


def raise_all(problems: list[str]) -> None:
    """Raises one ConfigError for all problems, if there are any."""
    if problems:
        raise SettingsError(problems)


def build(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """Constructs a configuration from layers of settings, later ones winning.

    Settings may be groups of settings (frozen dataclasses) and lists of them; a problem of one is named by its place,
    such as `folders[1].promt`.

    Raises:
        ConfigError: for unknown keys and values of the wrong type, all in one message.
    """
    hints, problems, values = get_type_hints(cls), [], {}
    for layer in layers:
        for key, value in layer.items():
            name = str(key).replace("-", "_")
            if name not in hints:
                problems.append(f"{key} is not a setting. {nearest(name, hints, MOST_NAMED)}")
                continue
            try:
                values[name] = convert(value, hints[name])
            except _InsideError as e:
                problems += [f"{key}{problem}" for problem in e.problems]
            except ValueError as e:
                problems.append(f"{key} is {value!r}; {e}")
    raise_all(problems)
    made = cls(**values)
    made.__dict__[GIVEN] = frozenset(values)
    return made


def check_kind(given: Any, kind: type[Any], call: str, example: str) -> None:
    """Raises ConfigError when what should be a configuration is something else, such as the path that it would hold.

    Args:
        given: as the caller has it.
        kind: of configuration.
        call: the function that takes it.
        example: its first setting.
    """
    if not isinstance(given, kind):
        other = f"{given.__name__} itself" if isinstance(given, type) else f"a {type(given).__name__}"
        raise ConfigError(
            f"vl.{call} takes a {kind.__name__}, and this is {other}: vl.{call}(vl.{kind.__name__}({example}, …))."
        )


GIVEN = "_given"
"""Where a configuration remembers which of its settings were given."""


def given_names(config: Any) -> frozenset[str]:
    """The settings that were given to `build`; of a configuration made by hand, those that are not the default."""
    if (names := config.__dict__.get(GIVEN)) is not None:
        return frozenset(names)
    return frozenset(
        f.name
        for f in dataclasses.fields(config)
        if f.default is dataclasses.MISSING or getattr(config, f.name) != f.default
    )


def is_utf8(text: str) -> bool:
    """Whether a text can be written; bytes of other encodings on the command line or in names of files cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def take(config: Any) -> None:
    """Turns what a configuration was constructed with into the annotated types; texts stay as they are.

    From Python, too, a path or one text for several is plausible, and a number written as a text.

    Raises:
        ConfigError: for values of the wrong type, all in one message.
    """
    problems = []
    for name, hint in get_type_hints(type(config)).items():
        given = getattr(config, name)
        texts = given if "prompt" in name and isinstance(given, (str, list, tuple)) else ()
        if not is_utf8("".join(map(str, texts))):
            problems.append(f"{name} is {given!r}, which is not UTF-8: check what the terminal or file is encoded in")
        if isinstance(given, str) and str in (hint, *get_args(hint)) and get_origin(hint) not in LISTS:
            continue
        try:
            object.__setattr__(config, name, convert(given, hint))  # it is frozen
        except _InsideError as e:
            problems += [f"{name}{problem}" for problem in e.problems]
        except ValueError as e:
            problems.append(f"{name} is {given!r}; {e}")
    raise_all(problems)


LISTS = (tuple, Sequence)
"""What a setting of several values is annotated with."""


class _InsideError(ValueError):
    """Problems within a value; each line begins with the place in it, such as `[1].promt`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type; nothing is cast that could lose meaning (3.7 is not a whole number).

    Raises:
        ValueError: saying what was expected.
    """
    if isinstance(value, PurePath):
        value = str(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _group(value, hint)
    origin = get_origin(hint)
    if origin in (Union, type(int | None)):
        kinds = get_args(hint)
        if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        own = [kind for kind in kinds if kind is not type(None)]
        wanted = []
        for kind in own:
            try:
                return convert(value, kind)
            except _InsideError:
                raise
            except ValueError as e:
                wanted.append(str(e).removeprefix("expected "))
        raise ValueError("expected " + " or ".join(wanted))
    if origin in LISTS:
        kind, *more = get_args(hint)
        if more and more != [...]:
            return _of_kinds(value, (kind, *more))
        items = _items(value, kind)
        return _groups(items, kind) if dataclasses.is_dataclass(kind) else tuple(convert(item, kind) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError("expected names with values")
        return {str(name): convert(item, get_args(hint)[1]) for name, item in value.items()}
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"expected {' or '.join(map(str, get_args(hint)))}")
        return value
    if hint is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError("expected true or false")
    if hint in (int, float) and not isinstance(value, bool):
        return _number(value, hint)
    if hint is Any:
        return value
    if hint is Path:
        if isinstance(value, str):
            return Path(value).expanduser()
        raise ValueError("expected a path")
    if hint is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise ValueError("expected a word")
    raise ValueError(f"expected {_NUMBERS.get(hint, hint)}")


def _items(value: Any, kind: Any) -> list[Any] | tuple[Any, ...]:
    """The members of a list; of numbers also those of `0,600`, and a number alone."""
    if kind in (int, float):
        if isinstance(value, str):
            return value.split(",")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return [value]
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("expected a list")
    return items


def _of_kinds(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list of as many members as there are kinds, each of its own."""
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise ValueError(f"expected lists of {len(kinds)}")
    return tuple(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


_NUMBERS = {int: "a whole number", float: "a number"}


def _number(value: Any, kind: type) -> int | float:
    """A number, a whole one to the last digit."""
    if kind is int and isinstance(value, int | str):
        with contextlib.suppress(ValueError):
            return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected {_NUMBERS[kind]}") from None
    if kind is int:
        if not number.is_integer():
            raise ValueError(f"expected {_NUMBERS[kind]}")
        return int(number)
    return number


def _group(value: Any, cls: type[T]) -> T:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise ValueError(f"expected names with values ({names})")
    try:
        return build(cls, value)
    except SettingsError as e:
        raise _InsideError([f".{problem}" for problem in e.problems]) from None


def _groups(items: Iterable[Any], cls: Any) -> tuple[Any, ...]:
    found, problems = [], []
    for i, item in enumerate(items):
        try:
            found.append(_group(item, cls))
        except _InsideError as e:
            problems += [f"[{i}]{problem}" for problem in e.problems]
        except ValueError as e:
            problems.append(f"[{i}] is {item!r}; {e}")
    if problems:
        raise _InsideError(problems)
    return tuple(found)


def recipe_names() -> list[str]:
    """The recipes that are installed with visionlora."""
    folder = resources.files("visionlora.configs")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def config_text(name: str) -> str:
    """What a config file says, given by path or by the name of an installed recipe.

    Raises:
        ConfigError: when there is no such file or recipe, or it cannot be read as text.
    """
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"The config file {name} cannot be read: {reason}.") from None
    if name in recipe_names():
        return (resources.files("visionlora.configs") / f"{name}.yaml").read_text(encoding="utf-8")
    raise ConfigError(f"There is no config file or recipe {name!r}. {nearest(name, recipe_names())}")


def read_yaml(name: str) -> dict[str, Any]:
    """The settings of a config file, given by path or by the name of an installed recipe.

    Raises:
        ConfigError: when there is no such file or recipe, it is not a YAML mapping, or gives a setting twice.
    """
    text = config_text(name)
    try:
        node, settings = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:  # the latter for dates that do not exist
        where = getattr(e, "problem_mark", None)
        raise ConfigError(
            f"{name} is not valid YAML{f' at line {where.line + 1}' if where else ''}: {getattr(e, 'problem', e)}."
        ) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} must hold `key: value` lines; it holds a {type(settings).__name__}.")
    if twice := lines_of(node)[1]:
        raise ConfigError("\n".join(f"{name}, line {line}: {problem}" for line, problem in twice))
    return {str(k): v for k, v in settings.items()}


def lines_of(mapping: Any) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The line of each setting, counted from 1, and a problem with its line for each that is given twice.

    Args:
        mapping: the composed YAML of a config file.
    """
    lines: dict[str, int] = {}
    twice = []
    for key, _ in mapping.value:
        word, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if word in lines:
            twice.append((line, f"{word} is given twice, first in line {lines[word]}; leave one of them out."))
        lines[word] = line
    return lines, twice


def is_there(word: str) -> bool:
    """Whether a word is the path of something; not where no path could be so."""
    try:
        return Path(word).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def parse_words(words: Iterable[str], kind: type) -> dict[str, Any]:
    """`key=value` words; values are read as YAML, so that numbers, true/false and lists work, but texts are taken as they are.

    Args:
        words: of a command line.
        kind: of configuration, which says what is text.

    Raises:
        ConfigError: for a word without `=`, and for a list that is given twice.
    """
    settings: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            there = "images" in hints and is_there(word)
            pictures = f" Pictures are named so: --images {word}" if there else ""
            raise ConfigError(
                f"{word!r} is not understood: settings are written key=value, options start with --.{pictures}"
            )
        name, given = key.replace("-", "_"), {k.replace("-", "_"): v for k, v in settings.items()}
        if name in given and get_origin(hints.get(name)) in LISTS:  # of others the last counts
            raise ConfigError(
                f"{name} is given twice, as {given[name]!r} and {value!r}: leave one of them out, or write them as one list: "
                f"{name}='[…, …]'."
            )
        settings = {k: v for k, v in settings.items() if k.replace("-", "_") != name}
        settings[key] = value
        if hints.get(name) in (str, str | None):
            continue
        with contextlib.suppress(yaml.YAMLError, ValueError):
            settings[key] = yaml.safe_load(value)
    return settings


def to_yaml(config: Any) -> str:
    """The resolved configuration; reading the text again gives an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def pairs_of(text: str, word: str) -> dict[str, float]:
    """`a=1,b=2`.

    Raises:
        ConfigError: when a value is no finite number, or a name is there twice.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not math.isfinite(number):
            raise ConfigError(f"{word}: {part!r} is no name=number, separated by commas.")
        if name.strip() in found:
            raise ConfigError(f"{word}: {name.strip()} is given twice; leave one of them out.")
        found[name.strip()] = number
    return found


def parse_region(word: str) -> tuple[str, list[float] | str]:
    """`name=left,top,right,bottom` (each 0 to 1) or `name=mask.png`.

    Raises:
        ConfigError: when it is neither.

    >>> parse_region("dog=0,0,0.5,1"), parse_region("cat=masks/cat.png")
    (('dog', [0.0, 0.0, 0.5, 1.0]), ('cat', 'masks/cat.png'))
    """
    # Names of adapters and masks may have an = of their own: the first after which a box or a file stands parts them.
    places = [k for k, letter in enumerate(word) if letter == "="]
    parts = [(word[:k].strip(), word[k + 1 :].strip()) for k in places]
    if not parts or not parts[0][0] or not parts[0][1]:
        raise ConfigError(
            f"A region is written adapter=left,top,right,bottom or adapter=mask.png; this one is {word!r}."
        )
    for name, value in parts:
        try:
            return name, [float(v) for v in value.split(",")]
        except ValueError:
            mask = Path(value).expanduser()  # shells leave a ~ behind an = alone
            if value and mask.is_file():
                return name, str(mask)
    return parts[0]


def parse_composition(word: str) -> tuple[str, dict[str, float | int]]:
    """`name[:option=number,…]`.

    Raises:
        ConfigError: when a value is no number.

    >>> parse_composition("switch:tau=2")
    ('switch', {'tau': 2})
    """
    name, colon, options = word.partition(":")
    found = pairs_of(options, word) if colon else {}
    return name, {k: int(v) if v == int(v) else v for k, v in found.items()}


def parse_lora(word: str) -> tuple[str, float]:
    """`path` or `path:scale`.

    Raises:
        ConfigError: when the scale is not a finite number.
    """
    path, colon, scale = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, 1.0
    try:
        number = float(scale)
    except ValueError:
        raise ConfigError(f"{word}: {scale!r} is not a number; write path or path:scale.") from None
    if not math.isfinite(number):
        raise ConfigError(f"{word}: a scale must be a finite number, such as 0.8; this one is {scale!r}.")
    return path, number


def parse_lora_use(word: str) -> tuple[str, float, dict[str, float]]:
    """`path[:scale][@block=factor,…]`.

    Raises:
        ConfigError: when a number is none.

    >>> parse_lora_use("dog.safetensors:0.8@up=1.2,mid=0")
    ('dog.safetensors', 0.8, {'up': 1.2, 'mid': 0.0})
    """
    head, at, tail = word.rpartition("@")
    in_name = Path(word).exists() or (":" in tail and Path(word.rpartition(":")[0]).exists())
    if not at or "=" not in tail or in_name:
        return (*parse_lora(word), {})
    return (*parse_lora(head), {k: float(v) for k, v in pairs_of(tail, word).items()})
