"""Frozen layers that keep less for backward, with the same outputs and gradients.

torch keeps the input of every convolution, also of a frozen one, whose backward pass needs the weight alone. And it keeps
the output of a normalisation or an activation when the next layer's adapter needs it, beside the input that it was made
from: here the next layer keeps that input too (it is the same tensor) and makes the output again in its own backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.lora.adapted import AdaptedLayer
from visionlora.lora.classes import adapted_class, forward_of_its_own
from visionlora.lora.kernels import first_derivative, low_rank_conv, ordinary, undo
from visionlora.lora.layers import CONVOLUTIONS, HeavyByMatmul, conv_geometry


class Lean(nn.Module):
    """Mixed into the class of a frozen layer."""

    users: int
    """How many adapters on the model want it lean."""


class LeanConv(Lean):
    """A frozen convolution that keeps nothing of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """input (b, i, *s) -> (b, o, *s')."""
        base, x = cast(Any, self), input
        if (
            x.dim() < len(base.stride) + 2  # one picture, without a batch
            or ordinary()
            or not torch.is_grad_enabled()
            or not x.requires_grad
            or isinstance(base.padding, str)
            or (base.bias is not None and base.bias.requires_grad)
            or (weight := base.weight).requires_grad  # read once: it may be unpacked for it
        ):
            return cast(Tensor, super().forward(x))
        padded, geometry = conv_geometry(base, x)
        return low_rank_conv(padded, weight, base.bias, geometry, [], isinstance(self, HeavyByMatmul))


class RemadeSiLU(torch.autograd.Function):
    """SiLU that keeps what its input was made from, where that is kept anyway, instead of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: D102
        kept, ctx.remake = undo(x)
        ctx.save_for_backward(kept)
        return F.silu(x)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: D102
        (kept,) = ctx.saved_tensors
        x = kept if ctx.remake is None else ctx.remake(kept)
        found: Tensor = torch.ops.aten.silu_backward(grad, x)
        return found


class LeanSiLU(Lean):
    """SiLU after a normalisation: the normalisation's output is not kept."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.SiLU`."""
        if ordinary() or not (torch.is_grad_enabled() and input.requires_grad):
            return F.silu(input)
        out: Tensor = RemadeSiLU.apply(input)
        return out


class GatedGELU(torch.autograd.Function):
    """a · gelu(gate) of two halves side by side, (..., 2 d) -> (..., d), keeping the halves and not gelu(gate)."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(halves)
        return gated_gelu(halves)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: D102
        (halves,) = ctx.saved_tensors
        a, gate = halves.chunk(2, -1)
        found = torch.empty_like(halves)
        into_a, into_gate = found.chunk(2, -1)
        torch.mul(grad, F.gelu(gate), out=into_a)
        into_gate.copy_(torch.ops.aten.gelu_backward(grad * a, gate))
        return found


def gated_gelu(halves: Tensor) -> Tensor:
    """The gate is the second half, as in diffusers."""
    a, gate = halves.chunk(2, -1)
    return a * F.gelu(gate)


class LeanGEGLU(Lean):
    """The gated GELU (arXiv 2002.05202) of diffusers' transformer blocks: most of what a UNet keeps at large sizes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., i) -> (..., d)."""
        if ordinary() or not torch.is_grad_enabled() or args or kwargs:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        halves: Tensor = cast(Any, self).proj(x)
        if not halves.requires_grad:
            return gated_gelu(halves)
        out: Tensor = GatedGELU.apply(halves)
        out.made_from = (halves, gated_gelu, out._version)  # type: ignore[attr-defined]
        return out


class LeanPointwise(Lean):
    """A normalisation or activation whose output can be made again from its input."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's own output, with a note of what it was made from."""
        out = cast(Tensor, super().forward(input))
        if torch.is_grad_enabled() and input.requires_grad and not ordinary():
            # The version tells whether somebody has changed the output in place since.
            out.made_from = (input, self.again(input.device.type), out._version)  # type: ignore[attr-defined]
        return out

    def again(self, device: str) -> Callable[[Tensor], Tensor]:
        """The function from input to output, under the autocast of this moment: backward runs outside of it."""
        forward = cast(Any, super()).forward
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def remake(x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
                return cast(Tensor, forward(x))

        return remake


def mixin_for(module: nn.Module) -> type[Lean] | None:
    """How a frozen layer can be lean; None when it cannot."""
    if isinstance(module, (AdaptedLayer, Lean)) or any(p.requires_grad for p in module.parameters(recurse=False)):
        return None
    if isinstance(module, CONVOLUTIONS) and not forward_of_its_own(module):
        return LeanConv
    if isinstance(module, nn.SiLU) and not module.inplace:
        return LeanSiLU
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.GELU)):
        return LeanPointwise
    if (type(module).__module__, type(module).__name__) == ("diffusers.models.activations", "GEGLU"):
        return LeanGEGLU
    return None


def make_lean(model: nn.Module) -> list[nn.Module]:
    """Makes every frozen layer of `model` lean that can be; returns them, for `make_plain`."""
    changed = []
    for module in model.modules():
        if isinstance(module, Lean):
            module.users += 1
        elif (mixin := mixin_for(module)) is not None:
            module.__class__ = adapted_class(type(module), mixin)
            module.users = 1  # type: ignore[assignment]
        else:
            continue
        changed.append(module)
    return changed


def unlean(module: nn.Module) -> None:
    """Gives one layer its own class back for good: an adapter is about to be put on it."""
    del module.users
    module.__class__ = module.base_class  # type: ignore[assignment]


def make_plain(modules: list[nn.Module]) -> None:
    """Undoes `make_lean` for one adapter."""
    for module in modules:
        if isinstance(module, Lean):
            module.users -= 1
            if not module.users:
                unlean(module)
