"""A frozen base in 8 or 4 bits: weights are unpacked when a layer runs, and again in its backward pass.

int8  blocks of 4096 numbers with 8-bit dynamic codes    arXiv 2110.02861, sections 2.1 and 2.2
nf4   blocks of 64 numbers with 4-bit NormalFloat codes  arXiv 2305.14314, section 3

The codes are bitsandbytes'. A layer is packed in place: `weight` becomes a property that gives the unpacked tensor, so that
everything that reads it (adapters, lean layers, DoRA's norms) works as before. What backward needs of it is not kept: the
model's forward pass leaves a note of the layer instead, and backward unpacks anew.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.layers import CONVOLUTIONS, adapted_class

CODES = ("int8", "nf4")
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
    """uint8; two numbers in each for nf4."""
    state: Any
    """Of bitsandbytes: scales of the blocks, and what the codes mean."""
    bits: int
    shape: torch.Size

    def unpacked(self) -> Tensor:
        """In the dtype that it was packed from."""
        import bitsandbytes.functional as bnb

        unpack = bnb.dequantize_4bit if self.bits == 4 else bnb.dequantize_blockwise
        return cast(Tensor, unpack(self.codes, self.state)).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return int(self.codes.nbytes + self.state.absmax.nbytes)


@torch.no_grad()
def packing(weight: Tensor, code: str) -> Packing:
    """A weight in few bits, on its device."""
    import bitsandbytes.functional as bnb

    if code == "nf4":
        codes, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)
        return Packing(codes, state, 4, weight.shape)
    codes, state = bnb.quantize_blockwise(weight.contiguous(), blocksize=4096)
    return Packing(codes, state, 8, weight.shape)


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
        ConfigError: when bitsandbytes is missing, or some weight trains.
    """
    if code not in CODES:
        raise ConfigError(f"{code!r} is no way to pack weights; there are {' and '.join(CODES)}.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains of kernels that are not needed here
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{code} needs the package bitsandbytes, which is not installed: pip install 'visionlora[quantised]'."
        ) from None
    total = 0
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Linear, *CONVOLUTIONS) or name in EDGES:
            continue
        weight = cast(nn.Parameter, layer.weight)
        if weight.requires_grad:
            raise ConfigError(f"The weight of {name} trains, so it cannot be packed: freeze the base first.")
        if weight.numel() < SMALLEST:
            continue
        found = packing(weight.detach().to(device, dtype), code)
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
