"""cloneofsimo/lora's files: ``unet:<i>:up``, ``unet:<i>:down``, ``text_encoder:<i>:up|down`` and one tensor per token.

The number is the position of a linear layer in a walk over the attention and GEGLU modules of Stable Diffusion 1.x as
diffusers built it then; nothing in the file names the layer. The walk is repeated here as a table, and the shapes of the
file must agree with it in every place. The training scale is in ``up`` already, so the scaling is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.formats.parts import check_finite
from visionlora.lora.adapter import AdapterModule

KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
CONTEXT = 768
ATTENTIONS = tuple(
    [(f"down_blocks.{b}.attentions.{a}", w) for b, w in enumerate((320, 640, 1280)) for a in range(2)]
    + [(f"up_blocks.{b}.attentions.{a}", w) for b, w in ((1, 1280), (2, 640), (3, 320)) for a in range(3)]
    + [("mid_block.attentions.0", 1280)]
)
"""Transformers of the SD 1.x UNet in the order of its modules (the middle was registered last), and their widths."""
ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
"""Of the parts of a transformer block, in diffusers up to 0.11 and since."""
TEXT_LAYERS, TEXT_PARTS = 12, ("k_proj", "v_proj", "q_proj", "out_proj")


def matches(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a file."""
    return any(KEY.fullmatch(k) for k in tensors)


def unet_layers(order: tuple[str, ...], feed_forward: bool) -> Iterator[tuple[str, int, int]]:
    """(path, out, in) of each linear layer, in the order of the walk."""
    for transformer, width in ATTENTIONS:
        start = transformer + ".transformer_blocks.0."
        for part in order:
            if part == "ff":
                if feed_forward:
                    yield start + "ff.net.0.proj", 8 * width, width
                continue
            context = width if part == "attn1" else CONTEXT
            for name, i in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)):
                yield f"{start}{part}.{name}", width, i


def text_layers() -> Iterator[tuple[str, int, int]]:
    """The same for CLIP's text encoder."""
    for layer in range(TEXT_LAYERS):
        for part in TEXT_PARTS:
            yield f"text_model.encoder.layers.{layer}.self_attn.{part}", CONTEXT, CONTEXT


def take(path: Path, tensors: dict[str, Tensor]) -> dict[str, AdapterModule]:
    """The modules of a file; their tensors are taken out of `tensors`.

    Raises:
        AdapterFileError: when the shapes are not those of Stable Diffusion 1.x in any known order, or a value is NaN or
            infinite.
    """
    pairs: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key in [k for k in tensors if KEY.fullmatch(k)]:
        component, index, side = key.split(":")
        pairs.setdefault(component, {}).setdefault(int(index), {})[side] = tensors.pop(key)
    modules = {}
    for component, own in pairs.items():
        walks = [list(text_layers())]
        if component == "unet":
            walks = [list(unet_layers(order, ff)) for ff in (True, False) for order in ORDERS]
        fitting = [walk for walk in walks if fits(walk, own)]
        if not fitting:
            raise AdapterFileError(
                f"{path} numbers its layers in the order of cloneofsimo/lora, and its {component} has not the shapes of "
                "Stable Diffusion 1.x in that order: which layers they belong to cannot be known. Convert it with the tool "
                "that wrote it."
            )
        for k, (name, _, _) in enumerate(fitting[0]):
            down, up = own[k]["down"], own[k]["up"]
            modules[f"{component}.{name}"] = AdapterModule.lora(down, up, float(len(down)))
    check_finite(path, modules)
    return modules


def fits(walk: list[tuple[str, int, int]], own: Mapping[int, Mapping[str, Tensor]]) -> bool:
    """Whether every pair has the shape of the layer in its place."""
    if sorted(own) != list(range(len(walk))) or any(set(pair) != {"up", "down"} for pair in own.values()):
        return False
    return all(
        own[k]["down"].dim() == own[k]["up"].dim() == 2
        and (len(own[k]["up"]), own[k]["down"].shape[1]) == (o, i)
        and own[k]["up"].shape[1] == len(own[k]["down"])
        for k, (_, o, i) in enumerate(walk)
    )
