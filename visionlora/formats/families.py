"""Which family of base models an adapter is for, told by its shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visionlora.lora.adapter import Adapter


@dataclass(frozen=True)
class BaseFamily:
    """One family of Stable Diffusion."""

    name: str
    title: str
    context: int
    """Width of the text embeddings that cross-attention reads."""
    kohya_version: str
    architecture: str
    """As modelspec names it."""


FAMILIES = (
    BaseFamily("sd1", "Stable Diffusion 1.x", 768, "sd_v1", "stable-diffusion-v1"),
    BaseFamily("sd2", "Stable Diffusion 2.x", 1024, "sd_v2", "stable-diffusion-v2-512"),
    BaseFamily("sdxl", "Stable Diffusion XL", 2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
)
CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v")
SECOND_ENCODER = 1280
"""Width of SDXL's second text encoder."""
TEXT_ENDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def by_context(width: int | None) -> BaseFamily | None:
    """The family whose cross-attention is this wide."""
    return next((f for f in FAMILIES if f.context == width), None)


FlatShapes = Mapping[str, Callable[[], "tuple[int, int] | None"]]
"""Names of an adapter's layers and the size of ΔW, (o, n), asked for only where a name tells something."""


def flat_shapes(adapter: Adapter) -> FlatShapes:
    """Of an adapter in memory."""
    return {name: m.flat_shape for name, m in adapter.modules.items()}


def context_width(shapes: FlatShapes) -> int | None:
    """Width of the text embeddings that the adapter's cross-attention layers read; None when it has none."""
    return width_of(shapes, "unet.", CROSS_ATTENTION)


def width_of(shapes: FlatShapes, start: str, ends: tuple[str, ...]) -> int | None:
    """Inputs of the first layer with such a name."""
    for name, shape in shapes.items():
        if name.startswith(start) and name.endswith(ends) and (flat := shape()) is not None:
            return flat[1]
    return None


def family_of(shapes: FlatShapes) -> BaseFamily | None:
    """The family that an adapter was made for; None when its layers do not tell, or it is another model's."""
    if width_of(shapes, "text_encoder_2.", TEXT_ENDS) == SECOND_ENCODER:
        return by_context(2048)
    width = context_width(shapes)
    return by_context(width if width is not None else width_of(shapes, "text_encoder.", TEXT_ENDS))


def family_of_unet(config: Mapping[str, Any]) -> tuple[BaseFamily | None, int | None]:
    """The family of a UNet and the width of its cross-attention, from its configuration."""
    width = config.get("cross_attention_dim")
    return (by_context(width), width) if isinstance(width, int) else (None, None)
