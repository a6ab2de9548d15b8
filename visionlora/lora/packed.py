"""A frozen base in 8 or 4 bits: weights are unpacked when a layer runs, and again in its backward pass.

Both have a scale in fp32, the largest |number|, for each 64 numbers:
    int8  127ths of the scale
    nf4   4-bit NormalFloat, arXiv 2305.14314, section 3 and appendix E

A layer is packed in place: `weight` becomes a property that gives the unpacked tensor, so that everything that reads it
(adapters, lean layers, DoRA's norms) works as before. What backward needs of it is not kept: the model's forward pass leaves
a note of the layer instead, and backward unpacks anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.classes import adapted_class
from visionlora.lora.layers import CONVOLUTIONS
from visionlora.lora.mapped import Mappings

CODES = ("int8", "nf4")
BLOCK = 64
NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes of nf4 stand for, in shares of the scale."""
SMALLEST = 4096
"""Numbers in a weight below which packing saves nothing worth having."""
EDGES = ("conv_in", "conv_out")
"""First and last layers of a UNet, which are small and where rounding shows most."""

_OWNERS: dict[int, tuple[weakref.ref[Packed], weakref.ref[Tensor]]] = {}
"""Address of an unpacked weight that is alive -> its layer."""
_KEEP_DENSE = [False]


class Packed(nn.Module):
    """Mixed into the class of a layer whose weight is packed."""

    code: Packing

    @property
    def weight(self) -> Tensor:
        """Unpacked anew, (o, i) or (o, i/g, *k)."""
        dense = self.code.unpacked()
        address = dense.untyped_storage().data_ptr()
        gone: Callable[[Any], object] = lambda _: _OWNERS.pop(address, None)  # noqa: E731
        _OWNERS[address] = (weakref.ref(self), weakref.ref(dense, gone))
        return dense

    @property
    def numbers(self) -> int:
        """How many the weight holds."""
        return self.code.shape.numel()


@dataclass(frozen=True)
class Packing:
    """A weight in few bits."""

    codes: Tensor
    """int8, one number in each; or uint8, two in each, the first in the upper half."""
    scales: Tensor
    """Largest |number| of each block, fp32."""
    bits: int
    shape: torch.Size
    dtype: torch.dtype
    """Of the unpacked weight."""

    def unpacked(self) -> Tensor:
        """In its dtype."""
        if self.bits == 8:
            steps = self.codes.view(-1, BLOCK).float() * (self.scales / 127)[:, None]
        else:
            pairs = F.embedding(self.codes.int(), pairs_of_codes(self.codes.device))
            steps = pairs.view(-1, BLOCK) * self.scales[:, None]
        return steps.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)


@cache
def pairs_of_codes(device: torch.device) -> Tensor:
    """What each byte stands for, (256, 2)."""
    values = torch.tensor(NORMAL_FLOAT, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


@torch.no_grad()
def packing(weight: Tensor, code: str) -> Packing:
    """A weight in few bits, on its device."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    shares = (blocks / scales.clamp_min(1e-30)[:, None]).flatten()
    if code == "int8":
        return Packing((shares * 127).round().to(torch.int8), scales, 8, weight.shape, weight.dtype)
    values = torch.tensor(NORMAL_FLOAT, device=weight.device)
    nearest = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return Packing(nearest[::2] * 16 + nearest[1::2], scales, 4, weight.shape, weight.dtype)


@dataclass(frozen=True)
class Note:
    """Stands for an unpacked weight, or a view of it, among what backward needs."""

    layer: Packed
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def weight(self) -> Tensor:
        """Unpacked again."""
        return self.layer.weight.as_strided(self.shape, self.stride, self.offset)


def owner_of(tensor: Tensor) -> Packed | None:
    """The layer whose unpacked weight a tensor is, or is a view of."""
    found = _OWNERS.get(tensor.untyped_storage().data_ptr())
    return None if found is None else found[0]()


def kept(tensor: Tensor) -> Tensor | Note:
    """What is kept of a tensor for backward."""
    layer = owner_of(tensor)
    return tensor if layer is None else Note(layer, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def found_again(kept: Tensor | Note) -> Tensor:
    """The tensor for which something was kept."""
    return kept.weight() if isinstance(kept, Note) else kept


@contextmanager
def keeping_dense() -> Iterator[None]:
    """Meanwhile forward passes keep unpacked weights: hooks of others on what is kept are heard then."""
    _KEEP_DENSE[0] = True
    try:
        yield
    finally:
        _KEEP_DENSE[0] = False


def packed_layers(model: nn.Module) -> list[Packed]:
    """The layers of a model whose weights are packed."""
    return [m for m in model.modules() if isinstance(m, Packed)]


def pack(model: nn.Module, code: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> int:
    """Packs the weights of all linear layers and convolutions of a frozen model but the first and last, one by one.

    Adapters are put on afterwards. They can be trained, saved and ejected as on any base, but not merged. What is not
    packed stays where and as it is: `model.to(device, dtype)` moves that.

    Args:
        model: frozen.
        code: int8 or nf4.
        device: of the packed weights, which cannot be moved later; where they are when not given.
        dtype: of the unpacked weights; that of the weights when not given.

    Returns:
        Bytes that the packed weights take.

    Raises:
        ConfigError: for another code, or when some weight trains.
    """
    if code not in CODES:
        raise ConfigError(f"{code!r} is no way to pack weights; there are {' and '.join(CODES)}.")
    total, mappings = 0, Mappings()
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Linear, *CONVOLUTIONS) or name in EDGES:
            continue
        weight = cast(nn.Parameter, layer.weight)
        if weight.requires_grad:
            raise ConfigError(f"The weight of {name} trains, so it cannot be packed: freeze the base first.")
        if weight.numel() < SMALLEST:
            continue
        copy = mappings.copied(weight.detach(), dtype or weight.dtype)
        found = packing(copy if device is None else copy.to(device), code)
        del layer._parameters["weight"]
        layer.__class__ = adapted_class(type(layer), Packed)
        cast(Packed, layer).code = found
        total += found.nbytes
    watch(model)
    return total


def watch(model: nn.Module) -> None:
    """Lets forward passes of a model keep notes instead of unpacked weights."""
    open_hooks: list[Any] = []

    def begin(*_: object) -> None:
        hooks = None if _KEEP_DENSE[0] else torch.autograd.graph.saved_tensors_hooks(kept, found_again)
        open_hooks.append(hooks)
        if hooks is not None:
            hooks.__enter__()

    def end(*_: object) -> None:
        if (hooks := open_hooks.pop()) is not None:
            hooks.__exit__(None, None, None)

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end, always_call=True)
