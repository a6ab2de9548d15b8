"""The forward and backward passes of frozen layers with low-rank branches, keeping as little as possible for backward.

- A frozen layer's own input is not needed for its backward pass; torch keeps that of a convolution all the same.
- Branches on one input keep it once, whatever the dtype they train in; a branch whose A is frozen keeps x·Aᵀ alone.
- The gradient of the input is accumulated in place: no second buffer per branch.
- Dropout keeps a seed, not a mask.

Letters in shapes: n positions (all leading dimensions), b batch, i in, o out, r rank, g groups, *s spatial sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.errors import ConfigError

Rows = slice | None
CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Branch(NamedTuple):
    """One low-rank branch: out[..., rows] += scaling · B·A·dropout(x)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    rows: Rows = None
    """Output features it adds to; all when None (a part of a fused layer otherwise)."""
    dropout: float = 0.0
    """Share of inputs dropped, 0 outside training."""


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp …) is going on."""
    return bool(torch._C._are_functorch_transforms_active())


def ordinary() -> bool:
    """Whether ordinary operations must do: compilers and the transforms of torch.func see into them alone."""
    return torch.compiler.is_compiling() or transformed()


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that cannot be differentiated again; torch's own decorator gives wrong second derivatives in places."""

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ConfigError(
                "Second derivatives (create_graph=True) do not go through layers with adapters that train: take penalties on "
                "gradients from a model without them, or from finite differences."
            )
        return backward(ctx, *grads)

    return guarded


def new_seed() -> int:
    """A seed drawn from torch's global CPU generator: `torch.manual_seed` still decides everything."""
    return int(torch.randint(2**62, ()))


def drop(x: Tensor, share: float, seed: int) -> Tensor:
    """Dropout as a function of a seed: the backward pass draws the same mask again instead of keeping it."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - share, generator=generator)
    return x * keep.div_(1 - share)


def undo(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """What to keep instead of `x`: the input of the cheap function that made it, where that is kept anyway."""
    source, remake, version = getattr(x, "made_from", (None, None, None))
    return (x, None) if source is None or version != x._version else (source, remake)


class LowRankLinear(torch.autograd.Function):
    """F.linear(x, weight, bias) + gain · (the same without bias) + Σ branches, for a frozen weight. x (..., i) -> (..., o)."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        plan: tuple[tuple[float, Rows, float], ...],
        *factors: Tensor,
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        flat = out.view(-1, out.shape[-1])
        plain: Tensor | None = None
        if gain is not None:
            plain = flat.clone() if bias is None else flat - bias.to(out.dtype)
            flat.addcmul_(plain, gain.to(out.dtype))
        inputs = x.reshape(-1, x.shape[-1]).to(out.dtype)
        hidden, seeds = [], []
        for k, (scaling, rows, dropout) in enumerate(plan):
            down, up = factors[2 * k].to(out.dtype), factors[2 * k + 1].to(out.dtype)
            seeds.append(new_seed() if dropout else 0)
            h = (drop(inputs, dropout, seeds[-1]) if dropout else inputs) @ down.t()
            (flat if rows is None else flat[:, rows]).addmm_(h, up.t(), alpha=scaling)
            hidden.append(h)
        needs_x = any(ctx.needs_input_grad[5::2])
        kept, ctx.remake = undo(x) if needs_x else (None, None)
        ctx.plan, ctx.seeds, ctx.dtype, ctx.x_dtype = plan, seeds, out.dtype, x.dtype
        ctx.save_for_backward(kept, weight, gain, plain if ctx.needs_input_grad[3] else None, *factors, *hidden)
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        kept, weight, gain, plain, *saved = ctx.saved_tensors
        count = len(ctx.plan)
        factors, hidden = saved[: 2 * count], saved[2 * count :]
        flat = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        shape = grad.shape[:-1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            into_base = flat if gain is None else flat * (1 + gain.to(ctx.dtype))
            grad_x = into_base @ weight.to(ctx.dtype)
        grad_gain = None if plain is None else (flat * plain).sum(0).to(gain.dtype)
        inputs: Tensor | None = None
        if kept is not None:
            x = kept if ctx.remake is None else ctx.remake(kept)
            inputs = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        grads: list[Tensor | None] = []
        for k, (scaling, rows, dropout) in enumerate(ctx.plan):
            down, up = factors[2 * k], factors[2 * k + 1]
            part = flat if rows is None else flat[:, rows]
            needs_down, needs_up = ctx.needs_input_grad[5 + 2 * k : 7 + 2 * k]
            grad_down = None
            if needs_down or grad_x is not None:
                grad_h = part @ up.to(ctx.dtype)
                if grad_x is not None and not dropout:
                    grad_x.addmm_(grad_h, down.to(ctx.dtype), alpha=scaling)
                elif grad_x is not None:
                    grad_x.add_(drop(grad_h @ down.to(ctx.dtype), dropout, ctx.seeds[k]), alpha=scaling)
                if needs_down and inputs is not None:
                    seen = drop(inputs, dropout, ctx.seeds[k]) if dropout else inputs
                    grad_down = (grad_h.t() @ seen).mul_(scaling).to(down.dtype)
            grad_up = (part.t() @ hidden[k]).mul_(scaling).to(up.dtype) if needs_up else None
            grads += [grad_down, grad_up]
        if grad_x is not None:
            grad_x = grad_x.view(*shape, weight.shape[1]).to(ctx.x_dtype)
        return (grad_x, None, None, grad_gain, None, *grads)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch], gain: Tensor | None = None
) -> Tensor:
    """F.linear with low-rank branches; the weight and bias are frozen.

    Args:
        x: (..., i).
        weight: (o, i).
        bias: (o,).
        branches: added to the output.
        gain: (o,); gain · (output - bias) is added too.
    """
    plan = tuple((b.scaling, b.rows, b.dropout) for b in branches)
    factors = [t for b in branches for t in (b.lora_A, b.lora_B)]
    out: Tensor = LowRankLinear.apply(x, weight, bias, gain, plan, *factors)
    return out


HEAVY, FEW = 2**22, 128
"""Numbers in a weight, and positions of an output over a whole batch, from which on and up to which `by_matmul` pays."""
HEAVIER, HEAVIER_HALF, MORE = 2**23, 2**24, 256
"""The same for heavier weights, in fp32 and in half precision: the rearranging grows with them, the columns do not."""


def by_matmul(weight: Tensor, positions: int, geometry: Geometry) -> bool:
    """Whether a convolution is faster as a product of matrices.

    On CPUs torch's libraries rearrange a weight at every call. Where it is heavy and the pictures have few positions, as on
    the lowest levels of a UNet, that takes most of the time; a product of matrices reads the weight as it lies.
    """
    heavy = weight.dim() == 4 and weight.numel() >= HEAVY and weight.shape[2:] != (1, 1)
    heavier = weight.numel() >= (HEAVIER if weight.dtype == torch.float32 else HEAVIER_HALF)
    few = positions <= (MORE if heavier else FEW)
    return heavy and few and weight.device.type == "cpu" and geometry.groups == 1


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, heavy_by_matmul: bool = False
) -> Tensor:
    """x (b, i, *s) -> (b, o, *s').

    Args:
        x: padded already where the padding is not zeros.
        weight: (o, i/g, *k).
        bias: (o,).
        geometry: how the kernel moves.
        heavy_by_matmul: rounds otherwise than torch's convolution where that is faster, see `by_matmul`.
    """
    if heavy_by_matmul:
        kernel, sizes = weight.shape[2:], zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
        out = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in sizes]
        if by_matmul(weight, len(x) * math.prod(out), geometry):
            columns = F.unfold(x, kernel, geometry.dilation, geometry.padding, geometry.stride)  # (b, i·k, n)
            flat = weight.flatten(1)
            rows = (
                flat @ columns[0]
                if len(x) == 1
                else (columns.mT.reshape(-1, flat.shape[1]) @ flat.t()).view(len(x), -1, len(flat)).mT
            )
            made = rows.reshape(len(x), len(flat), *out)
            return made if bias is None else made + bias.to(made.dtype).view(-1, 1, 1)
    return CONVOLVE[x.dim()](x, weight, bias, *geometry)


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of a convolution's input, from the weight and the shape of the input alone."""
    if by_matmul(weight, len(grad) * math.prod(grad.shape[2:]), geometry):
        flat, rows = weight.flatten(1), grad.flatten(2)  # (b, o, n)
        if len(grad) == 1 and grad.dtype == torch.float32:
            columns = (flat.t() @ rows[0])[None]
        else:  # this way round in bf16
            columns = (rows.mT.reshape(-1, len(flat)) @ flat).view(len(grad), -1, flat.shape[1]).mT
        return F.fold(columns, shape[2:], weight.shape[2:], geometry.dilation, geometry.padding, geometry.stride)
    placeholder = grad.new_empty(()).expand(shape)
    stride, padding, dilation, groups = geometry
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, placeholder, weight, None, stride, padding, dilation, False, [0] * len(stride), groups,
        [True, False, False],
    )[0]  # fmt: skip
    return found


class LowRankConv(torch.autograd.Function):
    """A frozen convolution + Σ branches. x (b, i, *s) -> (b, o, *s'); without branches it keeps nothing of x."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        plan: tuple[tuple[float, float], ...],
        heavy_by_matmul: bool,
        *factors: Tensor,
    ) -> Tensor:
        convolve, groups = CONVOLVE[x.dim()], geometry.groups
        out = convolution(x, weight, bias, geometry, heavy_by_matmul)
        hidden, seeds = [], []
        for k, (scaling, dropout) in enumerate(plan):
            down, up = factors[2 * k].to(out.dtype), factors[2 * k + 1].to(out.dtype)
            seeds.append(new_seed() if dropout else 0)
            seen = drop(x, dropout, seeds[-1]) if dropout else x
            # Groups share A: repeating it gives every group its own r channels, which is the grouped ΔW exactly.
            h = convolve(seen.to(out.dtype), down.repeat(groups, *(1,) * (down.dim() - 1)), None, *geometry)
            out.add_(convolve(h, up, groups=groups), alpha=scaling)
            hidden.append(h)
        kept, ctx.remake = undo(x) if any(ctx.needs_input_grad[6::2]) else (None, None)
        ctx.plan, ctx.seeds, ctx.geometry, ctx.shape = plan, seeds, geometry, x.shape
        ctx.dtype, ctx.x_dtype = out.dtype, x.dtype
        ctx.save_for_backward(kept, weight, *factors, *hidden)
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        kept, weight, *saved = ctx.saved_tensors
        count, geometry = len(ctx.plan), ctx.geometry
        factors, hidden = saved[: 2 * count], saved[2 * count :]
        stride, padding, dilation, groups = geometry
        grad = grad.to(ctx.dtype)
        wants_x = ctx.needs_input_grad[0]
        grad_x = input_gradient(grad, ctx.shape, weight.to(ctx.dtype), geometry) if wants_x else None
        x = kept if kept is None or ctx.remake is None else ctx.remake(kept)
        point = Geometry((1,) * len(stride), (0,) * len(stride), (1,) * len(stride), groups)
        grads: list[Tensor | None] = []
        for k, (scaling, dropout) in enumerate(ctx.plan):
            down, up = factors[2 * k], factors[2 * k + 1]
            needs_down, needs_up = ctx.needs_input_grad[6 + 2 * k : 8 + 2 * k]
            h = hidden[k]
            grad_h, grad_up, _ = torch.ops.aten.convolution_backward(
                grad, h, up.to(ctx.dtype), None, point.stride, point.padding, point.dilation, False,
                [0] * len(stride), groups, [bool(needs_down or wants_x), bool(needs_up), False],
            )  # fmt: skip
            grad_down = None
            if needs_down or wants_x:
                repeated = down.to(ctx.dtype).repeat(groups, *(1,) * (down.dim() - 1))
                if needs_down and x is not None:
                    seen = (drop(x, dropout, ctx.seeds[k]) if dropout else x).to(ctx.dtype)
                else:
                    seen = grad.new_empty(()).expand(ctx.shape)
                into_x, into_down, _ = torch.ops.aten.convolution_backward(
                    grad_h, seen, repeated, None, stride, padding, dilation, False, [0] * len(stride), groups,
                    [wants_x, bool(needs_down), False],
                )  # fmt: skip
                if grad_x is not None:
                    grad_x.add_(drop(into_x, dropout, ctx.seeds[k]) if dropout else into_x, alpha=scaling)
                if needs_down:
                    grad_down = into_down.view(groups, *down.shape).sum(0).mul_(scaling).to(down.dtype)
            grads += [grad_down, grad_up.mul_(scaling).to(up.dtype) if needs_up else None]
        return (None if grad_x is None else grad_x.to(ctx.x_dtype), None, None, None, None, None, *grads)


def low_rank_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, branches: list[Branch],
    heavy_by_matmul: bool = False,
) -> Tensor:  # fmt: skip
    """A convolution with low-rank branches; see `convolution`."""
    plan = tuple((b.scaling, b.dropout) for b in branches)
    factors = [t for b in branches for t in (b.lora_A, b.lora_B)]
    out: Tensor = LowRankConv.apply(x, weight, bias, geometry, plan, heavy_by_matmul, *factors)
    return out
