"""Ways to make one ΔW of several at a layer, one file each, and their registry.

A combination takes the factors of every adapter at one layer, scales included, and returns the factors of the result. A
plug-in adds one through the entry point group `visionlora.combinations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from torch import Tensor

from visionlora import plugins
from visionlora.errors import ConfigError, nearest
from visionlora.lora.combine.dare import dare
from visionlora.lora.combine.iso_c import iso_c
from visionlora.lora.combine.knots import knots
from visionlora.lora.combine.sum import add
from visionlora.lora.combine.ties import ties
from visionlora.lora.combine.types import Factors, Options

Combination = Callable[[Sequence[Factors], Options], tuple[Tensor, Tensor]]
COMBINATIONS: dict[str, Combination] = {"sum": add, "ties": ties, "dare": dare, "knots": knots, "iso-c": iso_c}
READ: dict[str, tuple[str, ...]] = {
    "sum": (), "ties": ("density",), "dare": ("density", "seed"), "knots": ("density",), "iso-c": ()
}  # fmt: skip
"""The options that each of them reads."""
PLUGIN_GROUP = "visionlora.combinations"

__all__ = ["COMBINATIONS", "Combination", "Factors", "Options", "check_options", "combination"]


def combination(name: str) -> Combination:
    """The combination of this name.

    Raises:
        ConfigError: when there is none.
    """
    if name in COMBINATIONS:
        return COMBINATIONS[name]
    found = plugins.load(PLUGIN_GROUP, name) if name in plugins.names(PLUGIN_GROUP) else None
    if found is None:
        words = [*COMBINATIONS, *plugins.names(PLUGIN_GROUP)]
        raise ConfigError(f"There is no combination {name!r}. {nearest(name, words)}")
    made: Combination = found
    return made


def check_options(name: str, options: Options) -> None:
    """Raises ConfigError when an option is set that the combination does not read; those of plug-ins may read all."""
    for option in fields(options):
        value = getattr(options, option.name)
        if value != option.default and option.name not in READ.get(name, (option.name,)):
            readers = ", ".join(word for word, read in READ.items() if option.name in read)
            raise ConfigError(
                f"{option.name} is {value!r}, which changes nothing in {name!r}: it is for {readers}. Leave it out, or choose "
                "another method."
            )
