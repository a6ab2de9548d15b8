"""The modules that the components of adapters go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from visionlora.errors import ConfigError
from visionlora.lora.adapter import Adapter
from visionlora.lora.inject import cut_modules, fit

PARTS = ("unet", "text_encoder", "text_encoder_2")


def parts_of(target: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline by the names in adapter files; a bare module under the empty name.

    Raises:
        ConfigError: when the target is neither.
    """
    if isinstance(target, nn.Module):
        return {"": target}
    found = {n: p for n in PARTS if isinstance(p := getattr(target, n, None), nn.Module)}
    if not found:
        raise ConfigError(
            f"{type(target).__name__} is neither a module nor a pipeline with a UNet: adapters cannot go on it."
        )
    return found


def places(adapter: Adapter, parts: Mapping[str, nn.Module], target: Any, allow_partial: bool) -> dict[str, nn.Module]:
    """The module for each component of an adapter.

    Args:
        adapter: whose components are to be placed.
        parts: of the target.
        target: for messages.
        allow_partial: leave out components for which there is none, as long as there is one for some.

    Raises:
        ConfigError: when there is none for a component that may not be left out.
    """
    found = {c: parts[c] for c in adapter.components if c in parts}
    if "" in parts and adapter.components:
        component = component_for(parts[""], adapter)
        found[component] = parts[""]
    missing = [c for c in adapter.components if c not in found]
    if missing and not (allow_partial and found):
        there = ", ".join(p for p in parts if p) or type(target).__name__
        hint = " allow_partial=True leaves it out." if found else ""
        raise ConfigError(f"The adapter has a part for {missing[0]!r}; here there is {there}.{hint}")
    return found


def component_for(model: nn.Module, adapter: Adapter) -> str:
    """The component of an adapter that goes on a model by itself: the only one, or the one of which most fits."""
    if len(adapter.components) == 1:
        return adapter.components[0]
    modules = {c: adapter.component(c) for c in adapter.components}
    return max(modules, key=lambda c: 1 - len(fit(model, cut_modules(model, modules[c]), c)[2]) / len(modules[c]))


def word_for(parts: Mapping[str, nn.Module], component: str) -> str:
    """What a component is called in words of blocks: a UNet by itself is one under any name."""
    part = parts.get(component, parts.get(""))
    return "unet" if hasattr(part, "down_blocks") and hasattr(part, "mid_block") else component
