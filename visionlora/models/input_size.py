"""A vision backbone for pictures of another size than its own.

Convolutions take any size. What a transformer learned of positions is resampled as its library does it: timm's
`set_input_size`, of the model or of its patch embeddings, torchvision's `interpolate_embeddings`. A model that can none of
these is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ModelError, first_line


def set_input_size(id: str, model: nn.Module, size: int, own: int) -> None:
    """Makes a model, in place, read squares of `size` px.

    Args:
        id: as a user would name the model.
        model: in evaluation mode, with an identity in the place of its head.
        size: px.
        own: the side that it was made for, px.

    Raises:
        ModelError: when it takes pictures of its own size alone, or not of this one.
    """
    patch = patch_of(model)
    if patch is not None and size % patch:
        lower = size // patch * patch
        near = " or ".join(str(s) for s in (lower, lower + patch) if s)
        raise ModelError(
            f"{id} cuts pictures into patches of {patch} px, so image_size {size} would lose some: try {near}."
        )
    try:
        if callable(resize := getattr(model, "set_input_size", None)):  # timm's
            resize(img_size=(size, size), **windows_of(model))
        elif hasattr(model, "encoder") and hasattr(model, "seq_length"):  # torchvision's ViT
            resample_torchvision(cast(Any, model), size)
        else:
            for embed in patch_embeds(model):
                if any(
                    side * size % (own * patch) for side, patch in zip(embed.img_size, embed.patch_size, strict=True)
                ):
                    raise ValueError("some of its patches would lose pixels")
                embed.set_input_size(img_size=tuple(side * size // own for side in embed.img_size))
        if max(sides_read(model, size), default=size) == own:
            raise ValueError(f"it makes pictures of every size {own} px inside")
    except Exception as e:  # each library says in a kind of its own that it cannot
        text = first_line(e)
        raise ModelError(
            f"{id} does not take pictures of {size} px ({text[:200]}). Its own size is {own} px: leave image_size out, try "
            "another, such as a multiple of 32, or choose a model that takes any: most of timm's."
        ) from None


@torch.no_grad()
def sides_read(model: nn.Module, size: int) -> set[int]:
    """The sides of pictures, px, that the modules within a model are given for one of `size`: CrossViT resizes it first."""
    sides: set[int] = set()

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].dim() == 4 and given[0].shape[1] == 3:
            sides.update(given[0].shape[2:])

    watches = [module.register_forward_pre_hook(look) for name, module in model.named_modules() if name]
    try:
        model(torch.zeros(1, 3, size, size))
    finally:
        for watch in watches:
            watch.remove()
    return sides


def patch_embeds(model: nn.Module) -> list[Any]:
    """timm's patch embeddings of known size, such as the four of CoaT, each of which reads what the one before it gave."""
    return [m for m in model.modules() if hasattr(m, "set_input_size") and getattr(m, "img_size", None)]


def patch_of(model: nn.Module) -> int | None:
    """The side of the patches that a ViT cuts pictures into, px; None for other models."""
    embed: Any = getattr(model, "patch_embed", None)
    found = getattr(embed, "patch_size", getattr(model, "patch_size", None))
    side = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(side, int) or side < 1:
        return None
    step = getattr(getattr(embed, "proj", None), "stride", (side, side))
    return side if tuple(step) == (side, side) else None  # patches that overlap lose nothing


def windows_of(model: nn.Module) -> dict[str, Any]:
    """Of timm's first Swin, whose position biases are those of its windows: these stay, as where timm makes it anew."""
    if type(model).__module__ != "timm.models.swin_transformer":
        return {}
    sizes = tuple(stage.blocks[0].window_size for stage in cast(Any, model).layers)
    each = hasattr(
        model, "_ref_window_sizes"
    )  # timm before 1.0.31 takes one for all, which small stages cut down themselves
    return {"window_size": sizes if each else sizes[0]}


def resample_torchvision(model: Any, size: int) -> None:
    """The positions of torchvision's VisionTransformer for squares of `size` px."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    before: Tensor = model.encoder.pos_embedding
    state: Any = {"encoder.pos_embedding": before.detach()}
    found = interpolate_embeddings(size, model.patch_size, state)["encoder.pos_embedding"]
    model.encoder.pos_embedding = nn.Parameter(found.clone(), requires_grad=before.requires_grad)
    model.image_size, model.seq_length = size, int(found.shape[1])
