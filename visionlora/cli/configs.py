"""`visionlora configs`, `copy-config`, `settings` and `check`: recipes, what can be set, config files before they are used."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
import textwrap
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Optional

import typer

from visionlora import plugins
from visionlora.config import TrainingConfig, TrainSDConfig, config_text, read_yaml, recipe_names
from visionlora.config.checking import COMMANDS, check_file, commands_for
from visionlora.config.choices import EMBEDDED_SD
from visionlora.config.folders import ALPHA
from visionlora.errors import ConfigError, nearest
from visionlora.lora.config import known, words
from visionlora.lora.families import GROUPS, ROLES, fused_names, role_names

NEAR = 0.84
"""How like the name of a role a target must be to be taken for a slip: atn.q is, attn.to_q is not."""

OF_WEIGHTS = ("weights", "start_from")
"""Settings that name files of weights."""


def list_configs() -> None:
    """List the installed recipes: name, the command that each is for, and its first line."""
    names = recipe_names()
    for name in names:
        command = commands_for(read_yaml(name))[0]
        line = config_text(name).splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<{max(map(len, names))}}  {command:<{max(map(len, COMMANDS))}}  {line}")


def copy_config(
    name: Annotated[str, typer.Argument(help="A recipe, see `visionlora configs`.")],
    destination: Annotated[Path, typer.Argument(help="File to write; by default NAME.yaml here.")] = Path(),
) -> None:
    """Copy a recipe here to edit it: `visionlora copy-config emoji64_dog`."""
    if name not in recipe_names():
        raise ConfigError(f"There is no recipe {name!r}. {nearest(name, recipe_names())}")
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target} exists already; name another file: visionlora copy-config {name} FILE.")
    target.write_text(config_text(name), encoding="utf-8")
    command, file = commands_for(read_yaml(name))[0], shlex.quote(str(target))
    typer.echo(f"Wrote {target}. Use it: visionlora {command} --images FOLDER --config {file}")


def settings(
    command: Annotated[str, typer.Argument(help=f"{' or '.join(COMMANDS)}.")],
    about: Annotated[Optional[str], typer.Argument(help="Only those about this, such as caption or rate.")] = None,  # noqa: UP045
) -> None:
    """List what a command can be told, with defaults: `visionlora settings train-sd caption`."""
    if command not in COMMANDS:
        raise ConfigError(f"{command!r} has no settings. {nearest(command, COMMANDS)}")
    kind = COMMANDS[command]
    meant = meanings(kind)
    word = (about or "").casefold().replace("-", "_")
    listed = [f for f in fields(kind) if word in f.name or word in meant[f.name].casefold()]
    if not listed:
        raise ConfigError(f"No setting of {command} is about {about!r}; all of them: visionlora settings {command}")
    for f in listed:
        default = f.default if isinstance(f.default, str) else json.dumps(f.default)
        typer.echo(f"{f.name}={default}")
        typer.echo(textwrap.indent(textwrap.fill(meant[f.name], 92, break_on_hyphens=False), "    "))


def meanings(kind: type[TrainingConfig]) -> dict[str, str]:
    """What each setting means: the text below it in its class, or in the one that this is made of."""
    found = {}
    for cls in reversed(kind.__mro__):
        if not is_dataclass(cls):
            continue
        (tree,) = ast.parse(inspect.getsource(cls)).body
        for field, text in pairwise(getattr(tree, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def check(
    files: Annotated[list[str], typer.Argument(help="Config files, or names of recipes.")],
) -> None:
    """Look for mistakes in config files, without a model: `visionlora check mine.yaml`."""
    wrong = False
    for name in files:
        try:
            found = check_file(name, lambda c: [*unknown_words(c), *unlikely_targets(c), *missing_places(c)])
        except ConfigError as e:
            typer.echo(str(e))
            wrong = True
            continue
        what = " or ".join(found.commands)
        if not found.problems:
            typer.echo(f"{name}: OK for {what}.")
            continue
        wrong = True
        count = len(found.problems)
        typer.echo(f"{name}{f' (for {what})' if what else ''}: {count} problem{'s' if count > 1 else ''}")
        for problem in found.problems:
            typer.echo(f"  {problem}")
    if wrong:
        raise typer.Exit(2)


def unknown_words(config: TrainingConfig) -> list[str]:
    """Methods and inits that do not exist; each line begins with the name of the setting."""
    return [
        f"{what} is {word!r}. {nearest(word, known(what))}"
        for what, word in (("method", config.method), ("init", config.init))
        if word not in known(what)
    ]


def unlikely_targets(config: TrainingConfig) -> list[str]:
    """Targets that are nearly the name of a role; only a model knows whether it has layers of these names."""
    known_targets = [*ROLES, *GROUPS, *plugins.names("visionlora.targets")]
    layers = [part for name in (*role_names(), *fused_names()) for part in (name, name.rpartition(".")[2])]
    near = [
        (word, close[0])
        for word in words(config.targets)
        if not word.startswith("re:")
        and word not in layers
        and word.rstrip("0123456789") not in known_targets  # attn1, conv3: names of layers, or of what holds them
        and (close := get_close_matches(word, known_targets, n=1, cutoff=NEAR))
    ]
    return [f"targets is {config.targets!r}; there is no role {word!r}. Did you mean {role!r}?" for word, role in near]


def missing_places(config: TrainingConfig) -> list[str]:
    """Folders, files and models that are not there, and words that are nearly one that is known, each with its setting."""
    found = []
    folders = getattr(config, "folders", ())
    places = {
        **({} if folders else {"images": config.images}),
        **{f"folders[{i}].path": folder.path for i, folder in enumerate(folders)},
        **{name: getattr(config, name, None) for name in ("validation", "table", *OF_WEIGHTS)},
    }
    masks = {"masks": getattr(config, "masks", None), **{f"folders[{i}].masks": f.masks for i, f in enumerate(folders)}}
    for name, mask in masks.items():
        if mask and mask != ALPHA and not is_there(mask) and get_close_matches(mask, [ALPHA]):
            found.append(f"{name} is {mask!r}; it is neither {ALPHA} nor a folder. Did you mean {ALPHA!r}?")
        elif mask and "/" in mask:  # else it may be a column
            places[name] = mask
    model = config.model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        places["model"] = model
    elif (
        isinstance(config, TrainSDConfig)  # timm has many models by name
        and "/" not in model  # else it is of the Hub
        and not (model in ("auto", EMBEDDED_SD) or is_there(model))
    ):
        found.append(f"model is {model!r}; there is no such folder. {nearest(model, [EMBEDDED_SD])}")
    for name, place in places.items():
        if place and not is_there(place) and (name, place) != ("weights", "random"):
            from visionlora.data.wording import missing

            suffix = Path(place).suffix.lower()
            kind = ("file", (suffix, ".safetensors") if name in OF_WEIGHTS else (suffix,)) if suffix else ("folder",)
            found.append(f"{name} is {place!r}; {missing(Path(place).expanduser(), *kind)}")
    return found


def is_there(place: str) -> bool:
    """Whether a path leads anywhere."""
    return Path(place).expanduser().exists()
