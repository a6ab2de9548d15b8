"""Where a model keeps the places of its picture: which layer holds a map, and how its output lies over the picture.

In: a model and the size of its input. Out: names of layers, and features (n, c, gh, gw).
Letters in shapes: n pictures, h height, w width, t tokens, c channels, gh and gw rows and columns of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ModelError, nearest

ATTENTION_NAMES = ("attn", "attention", "self_attention", "self_attn")
"""What timm, transformers and torchvision call the attention of a block."""
POOLING_NAMES = ("attn_pool",)
"""What timm calls attention in the head, whose inner tensors are no maps either."""
NAME_ONE = "Name another layer: layer='...'."


@torch.no_grad()
def default_layer(model: nn.Module, x: Tensor) -> str:
    """The module whose output Grad-CAM reads, found by running the first picture.

    Raises:
        ModelError: when there is none.
    """
    named = {n: m for n, m in model.named_modules() if n}
    attention = [n for n in named if n.rpartition(".")[2] in (*ATTENTION_NAMES, *POOLING_NAMES)]
    attention = [n for n in attention if not any(n.startswith(f"{other}.") for other in attention)]
    h, w = x.shape[-2:]
    made: dict[int, tuple[str, Tensor]] = {}  # by identity; the tensor is held so that no other gets its id
    entering: list[tuple[str | None, int]] = []
    maps: list[str] = []
    tokens: list[str] = []

    def leaving(name: str, output: Any) -> None:
        if (out := first_tensor(output)) is None:
            return
        made[id(out)] = (name, out)
        if out.dim() == 4 and (where := places(out.shape, h, w)) and max(out.shape[d] for d in where) > 1:
            maps.append(name)
        if out.dim() == 3 and out.shape[1] > 1 and patch_grid(model, out.shape[1], h, w):
            tokens.append(name)
            maps.clear()

    def attending(given: Sequence[Any]) -> None:
        out = next(v for v in given if isinstance(v, Tensor))
        maps.clear()  # what comes before tokens is the patches of a ViT; a stage ends after its blocks
        if out.dim() == 3 and out.shape[1] > 1:  # one token alone is the query of a pooling attention
            entering.append((made[id(out)][0] if id(out) in made else None, len(out)))

    handles: list[Any] = []
    for name, module in named.items():
        if name in attention and name.rpartition(".")[2] not in POOLING_NAMES:
            handles.append(
                module.register_forward_pre_hook(lambda _, a, k: attending([*a, *k.values()]), with_kwargs=True)
            )
        elif not any(name.startswith(f"{other}.") for other in attention):
            handles.append(module.register_forward_hook(lambda _, __, out, name=name: leaving(name, out)))
    try:
        model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    # Stages are modules with parts; a lone layer, such as a closing normalisation, comes second.
    stages = [n for n in maps if next(named[n].children(), None) is not None]
    if stages or maps:
        return (stages or maps)[-1]
    whole = entering and all(rows == 1 for _, rows in entering)  # windows would come as many rows of one picture
    if whole and (last := entering[-1][0]) is not None:
        return last
    if tokens:
        return tokens[-1]
    raise ModelError(f"{type(model).__name__} has no layer with a map of the picture. {NAME_ONE}")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by name.

    Raises:
        ModelError: when there is none.
    """
    named: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if n}
    if name not in named:
        raise ModelError(f"{type(model).__name__} has no layer {name!r}. {nearest(name, named)}")
    return named[name]


def first_tensor(output: Any) -> Tensor | None:
    """What a module gives, without what else it gives."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def as_map(model: nn.Module, name: str, values: Tensor, h: int, w: int) -> Tensor:
    """Features or gradients of a layer as (n, c, gh, gw), without class and register tokens.

    Raises:
        ModelError: when they are no map.
    """
    if values.dim() == 4 and (where := places(values.shape, h, w)):
        return values if where == (2, 3) else values.permute(0, 3, 1, 2)
    if values.dim() == 3 and (grid := patch_grid(model, values.shape[1], h, w)):
        prefix, *sides = grid
        found: Tensor = values[:, prefix:].mT.unflatten(2, sides)
        return found
    raise ModelError(
        f"The output of {name!r}, of shape {tuple(values.shape)}, cannot be laid over a picture of {w}x{h} px. {NAME_ONE}"
    )


def places(shape: Sequence[int], h: int, w: int) -> tuple[int, int] | None:
    """The two dimensions of a 4-D feature map that are height and width; None when it is no map of such a picture.

    >>> places((1, 512, 7, 7), 224, 224), places((1, 7, 7, 512), 224, 224), places((1, 12, 197, 64), 224, 224)
    ((2, 3), (1, 2), None)
    """
    for rows, columns in ((2, 3), (1, 2)):
        if alike(shape[rows], shape[columns], h, w):
            return rows, columns
    return None


def alike(rows: int, columns: int, h: int, w: int) -> bool:
    """Whether a grid has the shape of a picture, up to one row or column that rounding makes."""
    return abs(columns - rows * w / h) < max(1, w / h)


def patch_grid(model: nn.Module, tokens: int, h: int, w: int) -> tuple[int, int, int] | None:
    """Tokens before the patches, and rows and columns of the patches; None when they are no grid of such a picture."""
    known = getattr(model, "num_prefix_tokens", None)  # timm
    guesses = [known] if isinstance(known, int) else []
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride and conv.stride[0] > 1:
            guesses.append(tokens - (h // conv.stride[0]) * (w // conv.stride[1]))
            break
    for prefix in (*guesses, 0):
        if 0 <= prefix < tokens:
            count = tokens - prefix
            rows = max(1, round(math.sqrt(count * h / w)))
            if count % rows == 0 and alike(rows, count // rows, h, w):
                return prefix, rows, count // rows
    return None


def input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the pictures that a model takes, as far as it says so; 224 otherwise."""
    said = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
        getattr(model, "image_size", None),
        cast("dict[str, Any]", getattr(model, "default_cfg", None) or {}).get("input_size"),
    )
    for size in said:
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) >= 2:
            return int(size[-2]), int(size[-1])
    return 224, 224
