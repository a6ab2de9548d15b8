"""Ways to let several styles act together without one destroying the other: one file each, and their registry.

A plug-in adds one through the entry point group `visionlora.compositions`: a subclass of `Composition`.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

from visionlora import plugins
from visionlora.errors import ConfigError, nearest
from visionlora.mixing.compose.balanced import Balanced
from visionlora.mixing.compose.base import Composition
from visionlora.mixing.compose.composite import Composite
from visionlora.mixing.compose.k_lora import KLoRA
from visionlora.mixing.compose.merged import IsoC, Knots
from visionlora.mixing.compose.orthogonal import Orthogonal
from visionlora.mixing.compose.regional import Regional
from visionlora.mixing.compose.switch import Switch

COMPOSITIONS: dict[str, type[Composition]] = {
    "sum": Composition,
    "balanced": Balanced,
    "orthogonal": Orthogonal,
    "switch": Switch,
    "composite": Composite,
    "k-lora": KLoRA,
    "knots": Knots,
    "iso-c": IsoC,
    "regional": Regional,
}
PLUGIN_GROUP = "visionlora.compositions"

__all__ = ["COMPOSITIONS", "Composition", "composition"]


def composition(name: str | Composition, **options: Any) -> Composition:
    """The composition of this name, with its options; of one that is made a copy, as it keeps what it knows of its adapters.

    Raises:
        ConfigError: when there is none, or an option is unknown or out of range.
    """
    if isinstance(name, Composition):
        return copy(name)
    if not isinstance(name, str):
        raise ConfigError(
            f"compose is {name!r}; give the name of a composition ({', '.join(COMPOSITIONS)}) or a Composition that is made."
        )
    cls = COMPOSITIONS.get(name)
    if cls is None and name in plugins.names(PLUGIN_GROUP):
        cls = plugins.load(PLUGIN_GROUP, name)
    if cls is None:
        raise ConfigError(
            f"There is no composition {name!r}. {nearest(name, [*COMPOSITIONS, *plugins.names(PLUGIN_GROUP)])}"
        )
    known = inspect.signature(cls).parameters
    unknown = [o for o in options if o not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        hint = nearest(unknown[0], known) if known else "It has none."
        raise ConfigError(f"Composition {name!r} has no option {unknown[0]!r}. {hint}")
    try:
        return cls(**options)
    except TypeError as e:
        raise ConfigError(f"Composition {name!r} cannot take these options: {e}") from None
