"""A device that is none: its tensors lie in the memory of the CPU, but say that they lie elsewhere.

What works on a CPU may fail on a GPU, as tensors of both must not meet. Here they must not either, so that a machine without a
GPU finds it too. What it does not know: generators of its own (dropout of adapters), and the kernels of a real device.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "elsewhere"
DEVICE = torch.device("cpu")
"""The device, once it is registered."""
ATEN = torch.ops.aten
CAST = ("addmm", "baddbmm", "bmm", "conv2d", "linear", "matmul", "mm", "scaled_dot_product_attention")
"""What autocast computes in half precision."""
_LIBRARIES: list[torch.library.Library] = []


class Elsewhere(Tensor):
    """Holds a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Elsewhere:
        if held.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor elsewhere to float64, as on the GPUs of Apple")
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        pass

    def tolist(self) -> list[Any]:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert elsewhere:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Elsewhere, (self.held.detach(), self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, dict(kwargs or {}))


def held_by(value: Any) -> Any:
    """What a tensor that lies elsewhere holds."""
    return value.held if isinstance(value, Elsewhere) else value


def lies_elsewhere(device: Any) -> bool:
    """Whether a device that was asked for is this one."""
    return device is not None and torch.device(device).type == NAME


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of which some lie elsewhere."""
    if func is ATEN._to_copy.default:
        to = kwargs.pop("device", None)
        for without in ("non_blocking", "pin_memory"):
            kwargs.pop(without, None)
        copied = func(held_by(args[0]), **kwargs)
        stays = isinstance(args[0], Elsewhere) if to is None else lies_elsewhere(to)
        return Elsewhere(copied) if stays else copied
    if func is ATEN.copy_.default:
        held_by(args[0]).copy_(held_by(args[1]))
        return args[0]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}
    check_one_device(func, tensors)
    to = kwargs.get("device")
    if to is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*tree_map(held_by, args), **tree_map(held_by, kwargs))
    if to is not None and not lies_elsewhere(to):
        return out

    def back(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Elsewhere):
            return tensor
        return ours[id(tensor)] if id(tensor) in ours else Elsewhere(tensor)

    out = tree_map_only(Tensor, back, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out


def check_one_device(func: Any, tensors: list[Tensor]) -> None:
    """As a GPU does it: single numbers of the CPU may meet its tensors, and so may indices; nothing else."""
    if not any(isinstance(t, Elsewhere) for t in tensors):
        return
    others = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    if func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_):
        others = [t for t in others if t.dtype not in (torch.long, torch.bool)]
    if others:
        raise RuntimeError(f"{func} meets tensors elsewhere and on the CPU: {[tuple(t.shape) for t in others]}")


def register() -> bool:
    """Makes torch know the device, once; whether this torch can."""
    global DEVICE
    if _LIBRARIES:
        return True
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return False
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    DEVICE = torch.device(NAME, 0)
    module = getattr(torch, NAME, None)
    if module is None:
        module = types.ModuleType(NAME)
        torch._register_device_module(NAME, module)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    aten = torch.library.Library("aten", "IMPL")
    for name, made in {"empty.memory_format": empty, "empty_strided": empty_strided, "eye": eye, "eye.m": eye}.items():
        aten.impl(name, made, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    for name in CAST:
        aten.impl(name, in_half_precision(getattr(ATEN, name).default), "AutocastPrivateUse1")
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _LIBRARIES.extend((aten, rest))
    return True


def empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    """Of torch's name."""
    more = {} if memory_format is None else {"memory_format": memory_format}
    return Elsewhere(torch.empty(size, dtype=dtype, device="cpu", **more))


def empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    """Of torch's name."""
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def eye(
    n: int, m: int | None = None, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    """Of torch's name."""
    return Elsewhere(torch.eye(n, n if m is None else m, dtype=dtype, device="cpu"))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Of torch's name."""
    held_by(target).copy_(held_by(source))
    return target


def in_half_precision(func: Any) -> Callable[..., Any]:
    """An operation as autocast calls it."""
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(tensor: Tensor) -> Tensor:
        wide = tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if wide else tensor.to(torch.get_autocast_dtype(NAME))

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return func(*args, **kwargs)

    return called
