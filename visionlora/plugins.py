"""Plug-ins: packages that add methods, inits, model families, target presets or combinations through entry points.

A package declares, in its own pyproject.toml:

    [project.entry-points."visionlora.methods"]
    mymethod = "mypackage.module:MyMethod"

and the name can be used in `AdapterConfig(method="mymethod")`. Nothing is imported before it is used; a plug-in that
cannot be imported is named in a warning and left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUPS = {
    "visionlora.methods": "adapter methods: subclasses of visionlora.lora.methods.base.Method",
    "visionlora.inits": "inits of lora_A: functions as in visionlora.lora.inits",
    "visionlora.families": "model families: visionlora.lora.families.Family objects",
    "visionlora.targets": "target presets: tuples of targets under one word",
    "visionlora.compositions": "ways to let styles act together: subclasses of visionlora.mixing.compose.Composition",
    "visionlora.combinations": "ways to make one ΔW of several: functions as in visionlora.lora.combine",
}


@dataclass(frozen=True)
class Plugin:
    """One entry of an installed package."""

    group: str
    name: str
    package: str
    value: str
    """`module:attribute`."""


@lru_cache
def entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, without importing any; sorted, the first package wins a name."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: (e.name, e.dist.name if e.dist else "")):
        found.setdefault(entry.name, entry)
    return found


def names(group: str) -> list[str]:
    """The names in a group."""
    return list(entries(group))


def installed() -> list[Plugin]:
    """Every plug-in there is, for `visionlora plugins`."""
    return [
        Plugin(group, name, entry.dist.name if entry.dist else "?", entry.value)
        for group in GROUPS
        for name, entry in entries(group).items()
    ]


@lru_cache
def load(group: str, name: str) -> Any | None:
    """The object of an entry point; None, after a warning that names it, when it cannot be imported."""
    entry = entries(group).get(name)
    if entry is None:
        return None
    try:
        return entry.load()
    except Exception as e:  # whatever a foreign package raises must not stop the user's work
        package = entry.dist.name if entry.dist else "?"
        warnings.warn(
            f"The plug-in {name!r} of package {package} ({entry.value}) is left out, as it cannot be imported: "
            f"{type(e).__name__}: {e}",
            stacklevel=2,
        )
        return None


def load_all(group: str) -> dict[str, Any]:
    """Every object of a group that can be imported."""
    return {name: value for name in names(group) if (value := load(group, name)) is not None}
