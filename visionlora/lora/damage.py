"""Finds NaN and infinite values in the weights of a base, once something that it computes is not finite.

The whole model is read for it, so nobody looks while all goes well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from visionlora.errors import ModelError
from visionlora.lora.adapted import AdaptedLayer

FIRST = 3
"""Names of a part that the message lists."""


def damaged(what: str, parts: Mapping[str, nn.Module | None], trained: Iterable[Tensor] = ()) -> ModelError | None:
    """What is said of a base whose own weights hold NaN or infinite values; None when all are finite.

    Args:
        what: begins the message: whose weights they are.
        parts: of the base, by the names that the message gives them.
        trained: parameters that training may have ruined itself; looked at as far as their first values are kept.
    """
    found = {part: broken_tensors(module, trained) for part, module in parts.items() if module is not None}
    said = "; ".join(
        f"{len(names)} tensor{'s' * (len(names) > 1)} of {part} (first {', '.join(map(repr, names[:FIRST]))})"
        for part, names in found.items()
        if names
    )
    if not said:
        return None
    return ModelError(
        f"{what} hold NaN or infinite values: {said}. No setting helps: copy or download the model again, or take another."
    )


@torch.no_grad()
def broken_tensors(model: nn.Module, trained: Iterable[Tensor] = ()) -> list[str]:
    """The names of the base's parameters and buffers with such values, in the order of the model; see `damaged`."""
    ours = {id(p) for p in trained}
    return [name for name, tensor in base_values(model) if id(tensor) not in ours and not is_finite(tensor)]


def base_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a base as they were before adapters, as far as that is known, and its buffers, by name."""
    layers = (m for m in model.modules() if isinstance(m, AdaptedLayer))
    inside = {id(m) for layer in layers for m in layer.adapters.modules()}
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        changed, merged = vars(module).get("_changed", {}), getattr(module, "originals", {})
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            own = changed[name].original if name in changed else merged.get(name, tensor)
            yield f"{path}.{name}".removeprefix("."), own


def is_finite(tensor: Tensor) -> bool:
    """Whether there are neither NaN nor infinite values.

    Both survive a sum, which reads each value once and writes nothing; a sum may be infinite by itself.
    """
    if not tensor.is_floating_point() or tensor.is_meta or tensor.element_size() < 2:  # codes of packed weights
        return True
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
