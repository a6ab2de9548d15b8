"""What the adapters of one layer do together: concatenated, summed, or picture by picture.

Letters in shapes: b batch, i in, o out, r rank, *s spatial sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.functional import stack_factors, wide
from visionlora.lora.kernels import Branch, Rows
from visionlora.lora.methods.base import Factors, Method

MOST_TIMES = 3
"""How often the pictures of a batch may follow each other: twice under classifier-free guidance, three times with a picture
to edit. More rows than that are no pictures, but windows or tokens."""


@dataclass(frozen=True)
class Stack:
    """What all active adapters of a layer do together, ready for the dtype of its output."""

    lora_A: Tensor | None
    """(Σr, i) or (Σr, i/g, *k)."""
    lora_B: Tensor | None
    """(o, Σr) or (o, Σr, 1, ...), scalings folded in."""
    gain: Tensor | None
    """(o,): out += gain · (out - bias)."""
    gain_with_bias: Tensor | None
    """(o,): out += gain · out."""
    input_gain: Tensor | None
    """(i,): the base sees x · (1 + input_gain)."""

    @property
    def gained(self) -> bool:
        """Whether the output is multiplied."""
        return self.gain is not None or self.gain_with_bias is not None


@dataclass(frozen=True)
class Batch:
    """What the adapters do to each of b pictures, padded to the largest rank among them."""

    lora_A: Tensor | None
    """(b, R, i) or (b, R, i/g, *k)."""
    lora_B: Tensor | None
    """(b, o, R), scalings folded in."""
    gain: Tensor | None
    """(b, o): out += gain · (out - bias)."""
    gain_with_bias: Tensor | None
    """(b, o): out += gain · out."""
    input_gain: Tensor | None
    """(b, i): the base sees x · (1 + input_gain)."""
    pictures: int

    @property
    def gained(self) -> bool:
        """Whether the output is multiplied."""
        return self.gain is not None or self.gain_with_bias is not None

    def rows(self, x: Tensor, layer: nn.Module) -> int:
        """How often the pictures follow each other in x: twice under classifier-free guidance.

        Raises:
            ConfigError: when x does not hold whole batches.
        """
        times, rest = divmod(x.shape[0], self.pictures)
        if rest or not times or (times > MOST_TIMES and self.pictures > 1):
            kind = cast(Any, layer).base_class.__name__
            raise ConfigError(
                f"Adapters have scales for {self.pictures} pictures each, and a {kind} got {x.shape[0]} rows: give one scale "
                "per picture of the batch. Models that cut pictures into windows cannot have scales per picture."
            )
        return times


def build_stack(weight: Tensor, dtype: torch.dtype, active: Iterable[Method]) -> Stack:
    """Concatenates factors and sums gains, in fp32."""
    factors: list[tuple[Tensor, Tensor, float]] = []
    plain: list[Tensor] = []
    with_bias: list[Tensor] = []
    inputs: list[Tensor] = []
    out = weight.shape[0]
    with torch.no_grad():
        for m in active:
            for lora_A, lora_B, scaling in (*m.factors(), *part_factors(m)):
                factors.append((lora_A, placed(lora_B, m.site.rows, out), float(scaling)))
            if (gain := m.gain()) is not None:
                target = with_bias if gain.with_bias else plain
                target.append(placed(gain.value, m.site.rows, out))
            if (scale := whole_input_gain(m)) is not None:
                inputs.append(scale)
        down, up = stack_factors(factors) if factors else (None, None)

        def summed(parts: list[Tensor]) -> Tensor | None:
            return torch.stack(parts).sum(0).to(dtype) if parts else None

        return Stack(
            None if down is None else down.to(dtype),
            None if up is None else up.to(dtype),
            summed(plain),
            summed(with_bias),
            summed(inputs),
        )


def build_batch(weight: Tensor, dtype: torch.dtype, active: Sequence[Method], pictures: int) -> Batch:
    """Factors and gains of every picture, in fp32 before they are rounded to `dtype`."""
    out, one = weight.shape[0], torch.ones(pictures)
    shares = [one if m.sample_scale is None else m.sample_scale.float().cpu().expand(pictures) for m in active]
    sums: dict[str, Tensor] = {}
    downs: list[list[Tensor]] = [[] for _ in range(pictures)]
    ups: list[list[Tensor]] = [[] for _ in range(pictures)]

    def add(name: str, value: Tensor, share: Tensor) -> None:
        part = share.to(value.device)[:, None] * wide(value)
        sums[name] = sums[name] + part if name in sums else part

    with torch.no_grad():
        for m, share in zip(active, shares, strict=True):
            for lora_A, lora_B, scaling in (*m.factors(), *part_factors(m)):
                up = placed(lora_B, m.site.rows, out).flatten(1)
                for k in share.nonzero().flatten().tolist():
                    downs[k].append(wide(lora_A))
                    ups[k].append(wide(up) * (float(scaling) * float(share[k])))
            if (gain := m.gain()) is not None:
                add("gain_with_bias" if gain.with_bias else "gain", placed(gain.value, m.site.rows, out), share)
            if (scale := whole_input_gain(m)) is not None:
                add("input_gain", scale, share)
        lora_A_all = lora_B_all = None
        if rank := max(sum(len(a) for a in own) for own in downs):
            shape = next(a for own in downs for a in own).shape[1:]
            lora_A_all = weight.new_zeros(pictures, rank, *shape, dtype=dtype)
            lora_B_all = weight.new_zeros(pictures, out, rank, dtype=dtype)
            for k, own in enumerate(downs):
                if own:
                    r = sum(len(a) for a in own)
                    lora_A_all[k, :r], lora_B_all[k, :, :r] = torch.cat(own), torch.cat(ups[k], dim=1)
        terms = {name: value.to(dtype) for name, value in sums.items()}
    return Batch(
        lora_A_all, lora_B_all, terms.get("gain"), terms.get("gain_with_bias"), terms.get("input_gain"), pictures
    )


class shared_terms:
    """What the terms of a method have in common is computed once while they are asked for."""

    def __init__(self, active: list[Method]) -> None:
        self.active = active

    def __enter__(self) -> None:
        for m in self.active:
            m.begin()

    def __exit__(self, *_: object) -> None:
        for m in self.active:
            m.end()


def placed(value: Tensor, rows: Rows, out: int) -> Tensor:
    """`value` of some rows of a fused layer among zeros for all of them."""
    if rows is None:
        return value
    pads = [0, 0] * (value.dim() - 1) + [rows.start, out - rows.stop]
    return F.pad(value, pads)


def total_gain(active: Iterable[Method], out: int, with_bias: bool) -> Tensor | None:
    """The sum of the gains of one kind, differentiable."""
    parts = []
    for m in active:
        gain = m.gain()
        if gain is not None and gain.with_bias == with_bias:
            parts.append(placed(gain.value, m.site.rows, out))
    return torch.stack(parts).sum(0) if len(parts) > 1 else (parts[0] if parts else None)


def total_input_gain(active: Iterable[Method]) -> Tensor | None:
    """The sum of the input gains, differentiable."""
    parts = []
    for m in active:
        gain = whole_input_gain(m)
        if gain is not None:
            parts.append(gain)
    return torch.stack(parts).sum(0) if len(parts) > 1 else (parts[0] if parts else None)


def whole_input_gain(method: Method) -> Tensor | None:
    """The input gain of a method on a whole layer; that of one on a part is not for the other parts' input."""
    return method.input_gain() if method.site.rows is None else None


def part_factors(method: Method) -> list[Factors]:
    """The input gain of a method on a part of a fused linear layer: W·diag(gain), of that part alone."""
    if method.site.rows is None or (gain := method.input_gain()) is None:
        return []
    return [(torch.diag(gain), method.site.weight.to(gain.dtype), 1.0)]


def has_gain(active: Iterable[Method]) -> bool:
    """Whether some adapter multiplies the output."""
    return any(m.gain() is not None for m in active)


def base_outputs(
    run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor | None, scale: Tensor | None, gained: bool
) -> tuple[Tensor, Tensor]:
    """The base's output for x · (1 + scale), and its output that gains multiply: for x as it is, since ΔW add up.

    Args:
        run: the base, with a bias or without.
        x: input.
        bias: of the base.
        scale: sum of the input gains, shaped to go with x.
        gained: whether there are gains; the second output is worth nothing otherwise.
    """
    if scale is not None and gained:
        before = run(x, bias)
        return before + run(x * scale.to(x.dtype), None), before
    out = run(x if scale is None else x * (1 + scale).to(x.dtype), bias)
    return out, out


def branches_of(active: Iterable[Method]) -> list[Branch]:
    """Every low-rank branch, for the kernels."""
    found = []
    for m in active:
        dropout = m.dropout if m.training else 0.0
        found += [Branch(a, b, float(scaling), m.site.rows, dropout) for a, b, scaling in m.factors()]
        found += [Branch(a, b, float(scaling), m.site.rows) for a, b, scaling in part_factors(m)]
    return found


def stacked_update(additive: Iterable[Method], out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (Σr, n) and (o, Σr) of everything that additive methods add to a weight."""
    down, up = stack_factors(
        [(a.to(dtype), placed(b.to(dtype), m.site.rows, out), float(s)) for m in additive for a, b, s in m.factors()]
    )
    return down.flatten(1), up.flatten(1)


def part_of(value: Tensor, rows: Rows) -> Tensor:
    """The rows of a fused layer's weight or bias that belong to one part."""
    return value if rows is None else value[rows]
