"""Layers that carry adapters.

A layer is adapted in place: its class is replaced by a subclass that also runs the adapters, so the module, its
weight and their names stay the same objects, and giving the class back restores the model exactly.

A layer runs in one of five ways, with one result:
    merged      ΔW is in the weight: the base's own forward
    batched     each picture of a batch with its own adapters and scales: one batched pair of matmuls
    training    fused kernels that keep little for backward (`visionlora.lora.kernels`)
    stacked     without gradients: the factors of all active adapters concatenated, one pair of matmuls for any number
    plain       under torch.compile and torch.func: ordinary operations, which both see into; compiled, the scales are in
                tensors, so that a new scale re-traces nothing

Letters in shapes: b batch, n tokens, i in, o out, r rank, *s spatial sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.adapted import AdaptedLayer
from visionlora.lora.classes import adapted_class, unmask
from visionlora.lora.functional import wide
from visionlora.lora.kernels import (
    CONVOLVE,
    HEAVY,
    Geometry,
    Rows,
    convolution,
    low_rank_conv,
    low_rank_linear,
    ordinary,
)
from visionlora.lora.methods.base import Method, switched
from visionlora.lora.together import (
    Batch,
    base_outputs,
    branches_of,
    has_gain,
    part_factors,
    part_of,
    placed,
    shared_terms,
    stacked_update,
    total_gain,
    total_input_gain,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdaptedLinear(AdaptedLayer):
    """A linear layer with adapters.

    Where the module above reads its weight (`visionlora.lora.attention.WeightUser`) it has a flag `calling`, true while
    it is called as a layer all the same, so that its own use of the weight is not taken for the other's.
    """

    by_picture = True

    def forward(self, input: Tensor) -> Tensor:
        """input (..., i) -> (..., o)."""
        x, bias = input, cast(nn.Linear, self).bias
        if "calling" not in self.__dict__:
            return self.run(x, bias)
        self.__dict__["calling"] = True
        try:
            return self.run(x, bias)
        finally:
            self.__dict__["calling"] = False

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with a bias given by the caller; some models keep the bias beside the layer."""
        weight: Tensor = cast(nn.Linear, self).weight
        if not (active := self.active()):
            return self.guarded(F.linear(x, weight, bias))
        active, untouched = self.beside(active)
        if untouched:
            own = bias is cast(nn.Linear, self).bias
            weight, bias = untouched.get("weight", weight), untouched.get("bias", bias) if own else bias
        if self.masked(active):
            return self.plain(x, weight, bias, active)
        if any(m.sample_scale is not None for m in active):
            return self.stacked(x, weight, bias, active)
        if ordinary():
            return self.plain(x, weight, bias, active)
        if self.wants_graph(x, active):
            with shared_terms(active):
                if self.base_trains() or (bias is not None and bias.requires_grad):
                    return self.plain(x, weight, bias, active)  # the kernels take the base for frozen
                return self.trained(x, weight, bias, active)
        return self.stacked(x, weight, bias, active)

    def trained(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """With gradients."""
        if (scale := total_input_gain(active)) is not None:
            out, before = base_outputs(
                lambda seen, b: low_rank_linear(seen, weight, b, []), x, bias, scale, has_gain(active)
            )
            return out + self.added(x, before, bias, active)
        gain, over = (total_gain(active, weight.shape[0], with_bias) for with_bias in (False, True))
        if over is not None:
            out = low_rank_linear(x, weight, bias, [])
            return out + self.added(x, out, bias, active)
        return low_rank_linear(x, weight, bias, branches_of(active), gain)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """Ordinary operations alone."""
        scale = total_input_gain(active)
        gained = scale is not None and has_gain(active)
        out, before = base_outputs(lambda seen, b: F.linear(seen, weight, b), x, bias, scale, gained)
        return out + self.added(x, before, bias, active)

    def added(self, x: Tensor, out: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """What the adapters add to the base's output, `out` where the input is not scaled."""
        total = torch.zeros((), dtype=out.dtype, device=out.device)
        if (gain := total_gain(active, out.shape[-1], False)) is not None:
            total = total + gain.to(out.dtype) * (out if bias is None else out - bias.to(out.dtype))
        if (gain := total_gain(active, out.shape[-1], True)) is not None:
            total = total + gain.to(out.dtype) * out
        for m in active:
            for lora_A, lora_B, scaling in m.factors():
                seen = F.dropout(x.to(out.dtype), m.dropout, m.training)
                h = F.linear(seen, lora_A.to(out.dtype))
                if m.row_mask is not None:
                    h = h * m.row_mask.to(h.dtype).view(len(x), *(1,) * (h.dim() - 2), -1)
                part = F.linear(h, lora_B.to(out.dtype)) * scaling
                total = total + along_rows(part, m.site.rows, out.shape[-1])
            for lora_A, lora_B, _ in part_factors(m):
                part = F.linear(F.linear(x.to(out.dtype), lora_A.to(out.dtype)), lora_B.to(out.dtype))
                total = total + along_rows(part, m.site.rows, out.shape[-1])
        return total

    def batched(self, x: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
        """Without gradients, each picture with its own adapters: x (t·b, ..., i), pictures following each other."""
        times, b = batch.rows(x, self), batch.pictures

        def each(value: Tensor) -> Tensor:
            """(b, c) -> one row for each row of x."""
            return value.repeat(times, 1).view(times * b, *(1,) * (x.dim() - 2), value.shape[1])

        with torch.no_grad():
            scale = None if batch.input_gain is None else each(batch.input_gain)
            out, base = base_outputs(lambda seen, b: F.linear(seen, weight, b), x, bias, scale, batch.gained)
            if batch.gain is not None:
                out = out + each(batch.gain) * (base if bias is None else base - bias.to(base.dtype))
            if batch.gain_with_bias is not None:
                out = out + each(batch.gain_with_bias) * base
            if batch.lora_A is not None and batch.lora_B is not None:
                rows = x.to(batch.lora_A.dtype).reshape(times, b, -1, x.shape[-1])
                for row, added_to in zip(rows, out.view(times, b, -1, out.shape[-1]), strict=True):
                    added_to.baddbmm_(torch.bmm(row, batch.lora_A.mT), batch.lora_B.mT)
            return out

    def stacked(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """Without gradients."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        if (batch := self.batch(dtype, active)) is not None:
            return self.batched(x, weight, bias, batch)
        stack = self.stack(dtype, active)
        with torch.no_grad():
            out, base = base_outputs(lambda seen, b: F.linear(seen, weight, b), x, bias, stack.input_gain, stack.gained)
            if stack.gain is not None:
                out = out + stack.gain * (base if bias is None else base - bias.to(base.dtype))
            if stack.gain_with_bias is not None:
                out = out + stack.gain_with_bias * base
            if stack.lora_A is not None and stack.lora_B is not None:
                h = F.linear(x, stack.lora_A)
                out.view(-1, out.shape[-1]).addmm_(h.view(-1, h.shape[-1]), stack.lora_B.t())
            return out


class AdaptedConv(AdaptedLayer):
    """A convolution with adapters; the down path moves over the input exactly as the base does."""

    by_picture = True

    def forward(self, input: Tensor) -> Tensor:
        """input (b, i, *s) or (i, *s) -> (b, o, *s') or (o, *s')."""
        base, x = cast(Any, self), input
        if not (active := self.active()):
            return self.guarded(cast(Tensor, super().forward(x)))
        if x.dim() == len(base.stride) + 1:
            return self.forward(x[None])[0]
        active, untouched = self.beside(active)
        weight, bias = untouched.get("weight", base.weight), untouched.get("bias", base.bias)
        if self.masked(active):
            return self.plain(x, weight, bias, active)
        if any(m.sample_scale is not None for m in active):
            return self.stacked(x, weight, bias, active)
        if ordinary() or isinstance(base.padding, str):
            return self.plain(x, weight, bias, active)
        if self.wants_graph(x, active):
            with shared_terms(active):
                # The kernels take the base for frozen.
                run = self.plain if self.base_trains() else self.trained
                return run(x, weight, bias, active)
        return self.stacked(x, weight, bias, active)

    def trained(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """With gradients."""
        if any(m.gain() is not None or m.input_gain() is not None for m in active):
            return self.plain(x, weight, bias, active)
        padded, geometry = conv_geometry(self, x)
        heavy = isinstance(self, HeavyByMatmul)
        return low_rank_conv(padded, weight, bias, geometry, branches_of(active), heavy)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """Ordinary operations alone."""
        base, spatial = cast(Any, self), (1,) * (x.dim() - 2)
        if (scale := total_input_gain(active)) is not None:
            scale = scale.view(-1, *spatial)
        gained = scale is not None and has_gain(active)
        total, out = base_outputs(lambda seen, b: base._conv_forward(seen, weight, b), x, bias, scale, gained)
        for with_bias in (False, True):
            if (gain := total_gain(active, out.shape[1], with_bias)) is not None:
                shown = out if with_bias or bias is None else out - bias.view(-1, *spatial).to(out.dtype)
                total = total + gain.to(out.dtype).view(-1, *spatial) * shown
        for m in active:
            for lora_A, lora_B, scaling in m.factors():
                dropped = F.dropout(x.to(out.dtype), m.dropout, m.training)
                part = conv_branch(base, dropped, lora_A.to(out.dtype), lora_B.to(out.dtype), m.row_mask)
                total = total + part * scaling
        return total

    def batched(self, x: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch) -> Tensor:
        """Without gradients, each picture with its own adapters: x (t·b, i, *s); one grouped convolution for all."""
        base, (times, b) = cast(Any, self), (batch.rows(x, self), batch.pictures)
        spatial = (1,) * (x.dim() - 2)

        def each(value: Tensor) -> Tensor:
            return value.repeat(times, 1).view(times * b, -1, *spatial)

        with torch.no_grad():
            scale = None if batch.input_gain is None else each(batch.input_gain)
            out, before = base_outputs(
                lambda seen, b: base._conv_forward(seen, weight, b), x, bias, scale, batch.gained
            )
            if batch.gain is not None:
                shown = before if bias is None else before - bias.view(-1, *spatial).to(before.dtype)
                out = out + each(batch.gain) * shown
            if batch.gain_with_bias is not None:
                out = out + each(batch.gain_with_bias) * before
            if batch.lora_A is not None and batch.lora_B is not None:
                padded, geometry = conv_geometry(base, x.to(batch.lora_A.dtype))
                rows = padded.reshape(times, b * padded.shape[1], *padded.shape[2:])
                # Groups of the base share A, so each picture's A is repeated for them; channels go picture, group, rank.
                g = geometry.groups
                down = batch.lora_A.repeat_interleave(g, dim=0) if g > 1 else batch.lora_A
                kernel = down.reshape(-1, *down.shape[2:])
                h = CONVOLVE[x.dim()](
                    rows, kernel, None, geometry.stride, geometry.padding, geometry.dilation, groups=b * g
                )
                up = batch.lora_B.reshape(-1, batch.lora_B.shape[2], *spatial)
                part = CONVOLVE[x.dim()](h, up, groups=b * g)
                out = out + part.reshape(out.shape)
            return out

    def stacked(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method]) -> Tensor:
        """Without gradients."""
        base, spatial = cast(Any, self), (1,) * (x.dim() - 2)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if (batch := self.batch(dtype, active)) is not None:
            return self.batched(x, weight, bias, batch)
        stack = self.stack(dtype, active)
        with torch.no_grad():
            scale = None if stack.input_gain is None else stack.input_gain.view(-1, *spatial)
            total, out = base_outputs(lambda seen, b: base._conv_forward(seen, weight, b), x, bias, scale, stack.gained)
            if stack.gain is not None:
                shown = out if bias is None else out - bias.view(-1, *spatial).to(out.dtype)
                total = total + stack.gain.view(-1, *spatial) * shown
            if stack.gain_with_bias is not None:
                total = total + stack.gain_with_bias.view(-1, *spatial) * out
            if stack.lora_A is not None and stack.lora_B is not None:
                # Not in place: under some memory formats the base's output is a view of its input's layout.
                total = total + conv_branch(base, x.to(dtype), stack.lora_A, stack.lora_B)
            return total


def along_rows(part: Tensor, rows: Rows, out: int) -> Tensor:
    """The output of a part of a fused layer, (..., p), among zeros for all of it, (..., o)."""
    return part if rows is None else F.pad(part, (rows.start, out - rows.stop))


class HeavyByMatmul(nn.Module):
    """Mixed into the class of a convolution that may round otherwise than torch's where that is faster."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded, geometry = conv_geometry(self, x)
        return convolution(padded, weight, bias, geometry, heavy_by_matmul=True)


def heavy_by_matmul(model: nn.Module) -> int:
    """Lets the heavy convolutions of a model run as products of matrices where that is faster: see `by_matmul`.

    To be called before adapters are put on. The outputs are the same but for rounding.

    Returns:
        How many there are.
    """
    plain = [m for m in model.modules() if type(m) is nn.Conv2d and not isinstance(m.padding, str)]
    found = [m for m in plain if m.groups == 1 and m.weight.numel() >= HEAVY]
    for layer in found:
        layer.__class__ = adapted_class(type(layer), HeavyByMatmul)  # type: ignore[assignment]
    return len(found)


def conv_geometry(base: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """The input, padded where the padding is not zeros, and how the kernel moves over it."""
    padding = base.padding
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = (0,) * len(base.stride)
    return x, Geometry(base.stride, padding, base.dilation, base.groups)


def conv_branch(base: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """B·A over the base's own stride, padding, dilation and groups; groups share A (each repeats it for its inputs)."""
    down = base._conv_forward(x, lora_A.repeat(base.groups, *(1,) * (lora_A.dim() - 1)), None)
    if row_mask is not None:
        down = down * row_mask.to(down.dtype).repeat(1, base.groups).view(len(x), -1, *(1,) * (x.dim() - 2))
    return CONVOLVE[x.dim()](down, lora_B, groups=base.groups)


def swap_class(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Gives `module` the adapted class, once."""
    if not isinstance(module, AdaptedLayer):
        unmask(module)
        module.__class__ = adapted_class(type(module), mixin)
        module.adapters, module.originals, module._kept = nn.ModuleDict(), {}, {}  # type: ignore[assignment]
        module._written = None  # type: ignore[assignment]


def mixin_of(module: nn.Module) -> type[nn.Module]:
    """How a layer of this kind runs its adapters."""
    return AdaptedConv if isinstance(module, CONVOLUTIONS) else AdaptedLinear


def adapt(module: nn.Module, method: Method, mixin: type[nn.Module] | None = None) -> None:
    """Adds one adapter's part to a layer.

    Raises:
        ConfigError: when the layer already has an adapter of that name.
    """
    swap_class(module, mixin or mixin_of(module))
    layer = cast(AdaptedLayer, module)
    if method.key in layer.adapters:
        raise ConfigError(
            f"An adapter named {method.adapter_name!r} is there already: eject it first or choose another name."
        )
    layer.adapters[method.key] = method.train(module.training)
    switched()


def move_to_end(module: nn.Module, key: str) -> None:
    """Makes an adapter's part the last on its layer."""
    adapters = cast(AdaptedLayer, module).adapters
    adapters[key] = adapters.pop(key)
    switched()


def release(module: nn.Module, key: str) -> None:
    """Takes one adapter's part off a layer, if it is there; without any the layer becomes the plain base layer again."""
    if not isinstance(module, AdaptedLayer):
        return
    layer = module
    if key in layer.adapters:
        del layer.adapters[key]
    switched()
    layer._kept.clear()
    output = getattr(layer, "out_proj", None)  # of torch's attention, which must stay adapted while this child is
    if not layer.adapters and not isinstance(output, AdaptedLayer):
        restore_class(layer)


def restore_class(layer: AdaptedLayer) -> None:
    """Makes a layer without adapters the plain base layer again."""
    unmask(layer)
    for name in ("adapters", "originals", "_kept", "_written"):
        delattr(layer, name)
    for name in ("calling", "_active"):
        layer.__dict__.pop(name, None)
    layer.__class__ = cast(Any, layer).base_class


@torch.no_grad()
def with_adapters(layer: AdaptedLayer, adapters: Iterable[Method]) -> dict[str, Tensor]:
    """The parameters of a layer with these adapters in them, from the untouched originals, in fp32.

    All low-rank adapters go in as one product of their stacked factors. Parameters that no adapter changes are left out.
    """
    new: dict[str, Tensor] = {}
    merged = [m for m in adapters if m.scale != 0]

    def before(name: str) -> Tensor:
        found: Tensor = layer.originals.get(name, getattr(layer, name))
        return found

    for name in dict.fromkeys(m.site.weight_name for m in merged):
        own, weight = [m for m in merged if m.site.weight_name == name], before(name)
        total, low_rank = wide(weight), [m for m in own if m.additive]
        if low_rank:
            down, up = stacked_update(low_rank, len(weight), total.dtype)
            total = torch.addmm(total.flatten(1), up, down).view_as(weight)
        for m in own:
            if m.additive:
                continue
            rows = m.site.rows
            total = total + placed(m.delta_weight(part_of(weight, rows)), rows, len(weight))
            bias = getattr(layer, m.site.bias_name, None)
            if bias is not None and (shift := m.delta_bias(part_of(before(m.site.bias_name), rows))) is not None:
                start = new.get(m.site.bias_name, wide(before(m.site.bias_name)))
                new[m.site.bias_name] = start + placed(shift[0], rows, len(weight))
        new[name] = total
    return {n: t.to(before(n).dtype) for n, t in new.items()}
