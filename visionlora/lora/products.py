"""The shapes that a low-rank or structured ΔW can have in a file: pure functions from its tensors to ΔW and to factors.

Letters in shapes: o out features, n inputs times kernel positions (i·k·k), i in features, r rank, *k kernel sizes.
    lora  lora_A (r, i, *k), lora_B (o, r, 1, ...)             B·A
    loha  hada_w1_a (o, r), hada_w1_b (r, n), hada_w2_a, _b    (w1_a·w1_b) ∘ (w2_a·w2_b)          arXiv 2108.06098, eq. 3
          with hada_t1, hada_t2 (r, r, *k): w_a (r, o), w_b (r, i); each side is Σ t[j, l]·w_a[j]·w_b[l]
    lokr  lokr_w1 (a, c) or w1_a (a, r)·w1_b (r, c);           w1 ⊗ w2                            arXiv 2309.14859, §3
          lokr_w2 (b, d, *k), or w2_a (b, r)·w2_b (r, d·k·k), or lokr_t2 (r, r, *k) with w2_a (r, b), w2_b (r, d)
    diff  diff (o, i, *k)                                      itself
The scaling is not part of a product. LoHa and factored LoKr files do not say the kernel: their ΔW is (o, n) until a base
weight gives it its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from visionlora.lora.functional import wide

Tensors = Mapping[str, Tensor]


def tucker(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Σ core[j, l, *k] · first[j, o] · second[l, i] -> (o, i, *k)."""
    inner = torch.einsum("jl...,li->ji...", core, second)
    return torch.einsum("jo,ji...->oi...", first, inner)


def hadamard_sides(t: Tensors) -> tuple[Tensor, Tensor]:
    """The two matrices whose elementwise product is a LoHa."""
    if "hada_t1" in t:
        one = tucker(wide(t["hada_t1"]), wide(t["hada_w1_a"]), wide(t["hada_w1_b"]))
        return one, tucker(wide(t["hada_t2"]), wide(t["hada_w2_a"]), wide(t["hada_w2_b"]))
    return wide(t["hada_w1_a"]) @ wide(t["hada_w1_b"]), wide(t["hada_w2_a"]) @ wide(t["hada_w2_b"])


def kronecker_sides(t: Tensors) -> tuple[Tensor, Tensor]:
    """w1 (a, c) and w2 (b, d, *k) or (b, d·k·k) of a LoKr."""
    one = wide(t["lokr_w1"]) if "lokr_w1" in t else wide(t["lokr_w1_a"]) @ wide(t["lokr_w1_b"])
    if "lokr_w2" in t:
        return one, wide(t["lokr_w2"])
    if "lokr_t2" in t:
        return one, tucker(wide(t["lokr_t2"]), wide(t["lokr_w2_a"]), wide(t["lokr_w2_b"]))
    return one, wide(t["lokr_w2_a"]) @ wide(t["lokr_w2_b"])


def lora_product(t: Tensors) -> Tensor:
    """B·A."""
    down, up = wide(t["lora_A"]), wide(t["lora_B"])
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def loha_product(t: Tensors) -> Tensor:
    """Elementwise product of the sides."""
    one, two = hadamard_sides(t)
    return one * two


def lokr_product(t: Tensors) -> Tensor:
    """Kronecker product; a kernel belongs to w2 alone."""
    one, two = kronecker_sides(t)
    return torch.kron(one.reshape(*one.shape, *(1,) * (two.dim() - 2)), two)


PRODUCTS: dict[str, Callable[[Tensors], Tensor]] = {
    "lora": lora_product,
    "loha": loha_product,
    "lokr": lokr_product,
    "diff": lambda t: wide(t["diff"]),
}


def product(kind: str, tensors: Tensors) -> Tensor:
    """ΔW without its scaling, in fp32 or wider.

    >>> ones = torch.ones(2, 1), torch.ones(1, 3)
    >>> product("loha", {"hada_w1_a": ones[0], "hada_w1_b": ones[1], "hada_w2_a": 2 * ones[0], "hada_w2_b": ones[1]})
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    return PRODUCTS[kind](tensors)


# ----------------------------------------------------------------------------------------------------------- factors


def factors(kind: str, tensors: Tensors, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B with exactly the same product (to rounding), as narrow as the structure allows.

    A LoHa of rank r is a LoRA of rank r² (the rows of both sides multiply pairwise), a factored LoKr one of rank
    min(a, c)·r; what is wider than the layer becomes ΔW itself beside an identity.

    Args:
        kind: lora, loha, lokr or diff.
        tensors: of the product.
        shape: of the base weight, where the tensors do not say the kernel.
    """
    pair = low_rank_pair(kind, tensors)
    if pair is None or (kind != "lora" and len(pair[0]) > min(len(pair[1]), pair[0][0].numel())):
        dense = product(kind, tensors)
        shape = dense.shape if shape is None else shape
        flat = dense.reshape(shape[0], -1)
        rows, columns = flat.shape
        unit = torch.eye(min(rows, columns), dtype=flat.dtype, device=flat.device)
        down, up = (flat, unit) if rows <= columns else (unit, flat)
    else:
        down, up = pair
        shape = (len(up), *down.shape[1:]) if shape is None else shape
    kernel = (1,) * (len(shape) - 2)
    return down.reshape(len(down), *shape[1:]), up.reshape(len(up), -1, *kernel)


def low_rank_pair(kind: str, t: Tensors) -> tuple[Tensor, Tensor] | None:
    """Factors (r, n) and (o, r) where the structure gives any."""
    if kind == "lora":
        return wide(t["lora_A"]), wide(t["lora_B"]).flatten(1)
    if kind == "loha" and "hada_t1" not in t:
        a1, b1, a2, b2 = (wide(t["hada_" + n]) for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
        down = (b1[:, None] * b2[None]).reshape(-1, b1.shape[1])
        return down, (a1[:, :, None] * a2[:, None]).reshape(len(a1), -1)
    if kind == "lokr" and "lokr_w2_a" in t and "lokr_t2" not in t:
        up2, down2 = wide(t["lokr_w2_a"]), wide(t["lokr_w2_b"])
        if "lokr_w1_a" in t:
            return torch.kron(wide(t["lokr_w1_b"]), down2), torch.kron(wide(t["lokr_w1_a"]), up2)
        one = wide(t["lokr_w1"])
        unit = torch.eye(min(one.shape), dtype=one.dtype, device=one.device)
        left, right = (one, unit) if one.shape[1] <= one.shape[0] else (unit, one)
        return torch.kron(right, down2), torch.kron(left, up2)
    return None


# ---------------------------------------------------------------------------------------------------------- structure


def rank_of(kind: str, tensors: Tensors) -> int:
    """The rank that alpha is divided by; 0 where there is none, and so no scaling: a full LoKr, a full difference."""
    names = {"lora": ("lora_A",), "loha": ("hada_w1_b",), "lokr": ("lokr_w1_b", "lokr_w2_b")}.get(kind, ())
    return next((len(tensors[n]) for n in names if n in tensors), 0)


def problem(kind: str, tensors: Tensors) -> str | None:
    """Why these tensors are no product of this kind, or None."""
    needed = {
        "lora": (("lora_A", "lora_B"),),
        "loha": (
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        ),
        "lokr": tuple(
            one + two
            for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
            for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
        ),
        "diff": (("diff",),),
    }[kind]
    if all(set(names) != set(tensors) for names in needed):
        missing = min((sorted(set(names) - set(tensors)) for names in needed), key=len)
        extra = min((sorted(set(tensors) - set(names)) for names in needed), key=len)
        return f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(extra)} too many"
    if any(not tensors[n].numel() for n in tensors) or not FITS[kind](tensors):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items()))
        return f"its factors cannot be multiplied: {shapes}"
    return None


def lora_fits(t: Tensors) -> bool:
    """Whether B·A is defined."""
    down, up = t["lora_A"], t["lora_B"]
    return down.dim() >= 2 and up.dim() == down.dim() and up.shape[1] == len(down) and up[0, 0].numel() == 1


def loha_fits(t: Tensors) -> bool:
    """Whether both sides are defined and equal in shape."""
    a1, b1, a2, b2 = (t["hada_" + n] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if any(x.dim() != 2 for x in (a1, b1, a2, b2)):
        return False
    if "hada_t1" in t:
        cores = t["hada_t1"], t["hada_t2"]
        if any(
            c.dim() < 3 or c.shape[:2] != (len(a), len(b)) for c, a, b in zip(cores, (a1, a2), (b1, b2), strict=True)
        ):
            return False
        return a1.shape[1] == a2.shape[1] and b1.shape[1] == b2.shape[1] and cores[0].shape[2:] == cores[1].shape[2:]
    return a1.shape[1] == len(b1) and a2.shape[1] == len(b2) and len(a1) == len(a2) and b1.shape[1] == b2.shape[1]


def lokr_fits(t: Tensors) -> bool:
    """Whether both sides are defined."""
    for side in ("lokr_w1", "lokr_w2"):
        a, b = t.get(side + "_a"), t.get(side + "_b")
        if a is None or b is None:
            if t[side].dim() < 2 or (side == "lokr_w1" and t[side].dim() != 2):
                return False
        elif a.dim() != 2 or b.dim() != 2:
            return False
        elif side == "lokr_w2" and "lokr_t2" in t:
            if t["lokr_t2"].dim() < 3 or t["lokr_t2"].shape[:2] != (len(a), len(b)):
                return False
        elif a.shape[1] != len(b):
            return False
    return True


FITS: dict[str, Callable[[Tensors], bool]] = {
    "lora": lora_fits,
    "loha": loha_fits,
    "lokr": lokr_fits,
    "diff": lambda t: t["diff"].dim() >= 2,
}
