"""Tensors of a file -> modules in memory, for every format that names a layer and then what the tensor is to it.

The endings of kohya, LyCORIS, diffusers (old and new) and PEFT are one table. Where the scale lives: an `alpha` tensor
(kohya, LyCORIS), the header (diffusers, PEFT), or nowhere, and then alpha is the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.formats.names import locate_all
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.products import tucker

SUMMED_AT_ONCE = 1 << 22
"""Values; a sum in fp64 makes a copy of all that it sums up, of twice their size."""
ENDINGS = tuple(
    (re.compile(pattern), slot)
    for pattern, slot in (
        (r"[._]lora(?:_linear_layer)?\.(down|up)\.weight", r"\1"),
        (r"[._]lora(?:_linear_layer)?\.up\.bias", "up_bias"),
        (r"\.lora_(down|up|mid)(?:\.weight)?", r"\1"),
        (r"\.lora_A(?:\.(?!bias)[^.]+)?(?:\.weight)?", "down"),
        (r"\.lora_B(?:\.(?!bias)[^.]+)?(?:\.weight)?", "up"),
        (r"\.lora_B(?:\.[^.]+)?\.bias", "up_bias"),
        (r"\.lora_E(?:\.[^.]+)?", "diagonal"),
        (r"\.ranknum(?:\.[^.]+)?", "ranknum"),
        (r"(?:[._]lora(?:_linear_layer)?)?\.alpha", "alpha"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", "magnitude"),
        (r"\.magnitude", "magnitude"),
        (r"\.(dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)", r"\1"),
        (r"\.(diff_b|diff|w_norm|b_norm|oft_blocks|rescale|on_input|ia3_l)(?:\.default)?", r"\1"),
        (r"\.vera_lambda_(b|d)(?:\.[^.]+)?", r"lambda_\1"),
        (r"\.(weight)", r"\1"),
    )
)
"""(ending, what it is); the first that matches counts. A plain `.weight` means something only beside `.on_input`."""
ELSEWHERE = {
    "a1": "GLoRA",
    "a2": "GLoRA",
    "b1": "GLoRA",
    "b2": "GLoRA",
    "bm": "GLoRA",
    "oft_r": "PEFT's OFT",
    "oft_R": "PEFT's OFT",
    "boft_R": "PEFT's BOFT",
    "hra_u": "HRA",
    "lora_embedding_A": "an embedding's LoRA",
    "lora_embedding_B": "an embedding's LoRA",
}
"""Endings of methods that are not read, to say so by name."""
SHOWN = 5
"""Tensors that an error names."""
Scale = Callable[[str, str, int], float]
"""(component, path, rank) -> alpha, for modules without an alpha of their own."""


def rank_as_alpha(component: str, path: str, rank: int) -> float:
    """Where nothing says otherwise the scaling is 1."""
    return float(rank)


@lru_cache(maxsize=1 << 15)
def split_key(key: str) -> tuple[str, str] | None:
    """(layer, slot) of a tensor's name, or None.

    >>> split_key("unet.mid_block.attentions.0.proj_in.lora_A.default.weight")
    ('unet.mid_block.attentions.0.proj_in', 'down')
    """
    for pattern, slot in ENDINGS:
        # Endings are short: looking at the last parts alone keeps hostile names from costing time.
        start = max(0, len(key) - 80)
        for match in pattern.finditer(key, start):
            if match.end() == len(key) and match.start() > 0:
                return key[: match.start()], match.expand(slot) if "\\" in slot else slot
    return None


def take_modules(
    path: Path, tensors: Mapping[str, Tensor], alpha_of: Scale = rank_as_alpha
) -> tuple[dict[str, AdapterModule], list[str]]:
    """The modules of a file and the names of the tensors that belong to none.

    Args:
        path: of the file, for messages.
        tensors: by their names in the file.
        alpha_of: of modules without an alpha tensor.

    Raises:
        AdapterFileError: when tensors of a module are missing, do not fit each other, or are NaN or infinite.
    """
    slots: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unused = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            unused.append(key)
        elif split[1] in slots.setdefault(split[0], {}):
            raise AdapterFileError(f"{path} says {split[1]} of {split[0]!r} twice, in two spellings: {key!r}.")
        else:
            slots[split[0]][split[1]] = tensor
            keys.setdefault(split[0], []).append(key)
    modules: dict[str, AdapterModule] = {}
    places = locate_all(slots)
    for layer, own in slots.items():
        if set(own) <= {"weight", "alpha", "magnitude"}:  # no adapter's alone
            unused += keys[layer]
            continue
        component, name = places[layer]
        alpha = partial(alpha_of, component, name)
        for suffix, module in one_layer(path, layer, own, alpha).items():
            full = f"{component}.{name}{suffix}"
            if full in modules:
                raise AdapterFileError(f"{path} adapts {full} twice, once as {layer!r}.")
            modules[full] = module
    return modules, unused


def one_layer(
    path: Path, layer: str, own: dict[str, Tensor], alpha_of: Callable[[int], float]
) -> dict[str, AdapterModule]:
    """What a file says of one layer: {"": the weight's module, ".bias": the bias's …}."""
    for slot, tensor in own.items():
        if slot != "alpha" and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{path} has NaN or infinite values in {slot} of {layer!r}: its training diverged.")
    found: dict[str, AdapterModule] = {}
    rest = dict(own)
    shifts = {"diff_b": ".bias", "b_norm": ".bias", "w_norm": ".weight"}
    for slot, suffix in shifts.items():
        if slot in rest:
            found[suffix] = AdapterModule("shift", {"shift": rest.pop(slot)}, 1.0)
    if "diff" in rest and rest["diff"].dim() < 2:  # of a normalisation
        found[".weight"] = AdapterModule("shift", {"shift": rest.pop("diff")}, 1.0)
    if set(rest) <= {"alpha"}:
        return found
    alpha, up_bias = rest.pop("alpha", None), rest.pop("up_bias", None)
    module = one_module(path, layer, rest, alpha, alpha_of)
    if up_bias is not None:
        found[".bias"] = AdapterModule("shift", {"shift": up_bias.float() * module.scaling}, 1.0)
    if why := module.problem():
        raise AdapterFileError(f"{path} has an adapter for {layer!r} that cannot be used: {why}. Copy it again.")
    return {"": module, **found}


def one_module(
    path: Path, layer: str, own: dict[str, Tensor], alpha: Tensor | None, alpha_of: Callable[[int], float]
) -> AdapterModule:
    """The module of a layer's weight."""
    if "oft_blocks" in own:
        constraint = 0.0 if alpha is None else number(path, layer, alpha)
        return AdapterModule("oft", own, 1.0, {"constraint": constraint})
    if "on_input" in own and "weight" in own:
        relative = {"on_input": bool(own.pop("on_input").item()), "relative": True, "bias": False}
        return AdapterModule("ia3", {"vector": own.pop("weight").flatten(), **own}, 1.0, relative)
    if "ia3_l" in own:
        vector = own.pop("ia3_l")
        options: dict[str, Any] = {"on_input": vector.dim() > 1 and vector.shape[0] == 1 and vector.shape[1] > 1}
        if vector.dim() > 2:
            options["spatial"] = vector.dim() - 2
        return AdapterModule("ia3", {"vector": vector.flatten(), **own}, 1.0, options)
    magnitude = {n: own.pop(n) for n in ("magnitude", "dora_scale") if n in own}
    kind = next((k for k, n in (("loha", "hada_w1_b"), ("diff", "diff")) if n in own), None)
    if kind is None:
        kind = "lokr" if any(n.startswith("lokr") for n in own) else "lora"
    tensors = plain_lora(path, layer, own) if kind == "lora" else own
    made = AdapterModule(kind, tensors, 1.0)
    if why := made.problem():
        raise AdapterFileError(f"{path} has an adapter for {layer!r} that cannot be used: {why}. Copy it again.")
    rank = made.rank
    value = 1.0 if not rank else alpha_of(rank) if alpha is None else number(path, layer, alpha)
    value = value or float(rank)  # trainers mean "as the rank" by 0
    if not magnitude:
        return AdapterModule(kind, tensors, value)
    (name, scale), *twice = magnitude.items()
    if twice:
        raise AdapterFileError(f"{path} has two magnitudes for {layer!r}.")
    # dora_scale (1, i, ...) is by columns, (o, 1, ...) by rows; PEFT's vector is by rows in every shape.
    by_columns = name == "dora_scale" and scale.dim() > 1 and scale.shape[0] == 1 and scale.numel() > 1
    flat, shape = made.flat_shape(), made.shape()
    wanted = flat and (flat[0] if not by_columns else shape[1] if shape else scale.numel())
    if scale.numel() != wanted:
        raise AdapterFileError(f"{path} has a magnitude of shape {tuple(scale.shape)} for {layer!r}, of shape {shape}.")
    about: dict[str, Any] = ({} if kind == "lora" else {"product": kind}) | ({"axis": "in"} if by_columns else {})
    return AdapterModule("dora", {**tensors, "magnitude": scale.flatten()}, value, about)


def plain_lora(path: Path, layer: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """lora_A and lora_B; a Tucker core and AdaLoRA's diagonal are multiplied in, which is the same ΔW."""
    if not {"down", "up"} <= own.keys():
        there = ", ".join(sorted(own))
        raise AdapterFileError(f"{path} holds half an adapter for {layer!r}: {there} alone. Copy or download it again.")
    down, up, core = own.pop("down"), own.pop("up"), own.pop("mid", None)
    diagonal, count = own.pop("diagonal", None), own.pop("ranknum", None)
    if own:
        raise AdapterFileError(f"{path} has {', '.join(sorted(own))} for {layer!r}, which does not go with a LoRA.")
    if core is not None:
        down = mixed(path, layer, core, down)
    if diagonal is not None:
        # AdaLoRA in PEFT: B·(E ⊙ A)·alpha / (ranknum + 1e-5), ranknum being the rows of A unless the file says otherwise.
        present = float(count.item()) if count is not None else float(len(down))
        down = down * diagonal.view(-1, *(1,) * (down.dim() - 1)) * (len(down) / (present + 1e-5))
    if up.dim() == 2 and down.dim() > 2:
        up = up.reshape(*up.shape, *(1,) * (down.dim() - 2))
    return {"lora_A": down, "lora_B": up}


def mixed(path: Path, layer: str, core: Tensor, down: Tensor) -> Tensor:
    """LoCon's Tucker form: core (r, r, *k) and down (r, i, 1, ...) -> lora_A (r, i, *k)."""
    if core.dim() < 3 or core.shape[1] != len(down) or math.prod(down.shape[2:]) != 1:
        shapes = f"{tuple(core.shape)} and {tuple(down.shape)}"
        raise AdapterFileError(f"{path} has factors of shapes {shapes} in {layer!r}, which cannot be multiplied.")
    wide = torch.promote_types(core.dtype, torch.float32)
    unit = torch.eye(core.shape[0], dtype=wide)
    return tucker(core.to(wide), unit, down.flatten(1).to(wide))


def number(path: Path, layer: str, alpha: Tensor) -> float:
    """An alpha tensor's value.

    Raises:
        AdapterFileError: when it is not one finite number.
    """
    if alpha.numel() != 1 or not math.isfinite(value := float(alpha.flatten()[0])):
        shown = "no single number" if alpha.numel() != 1 else f"{float(alpha.flatten()[0])}"
        raise AdapterFileError(
            f"{path} has an alpha of {shown} for {layer!r}: its scale is lost. Export it again from its trainer, in fp32."
        )
    return value


def why_unused(keys: list[str]) -> str:
    """A sentence about tensors that nothing takes, naming the method when it is known."""
    for key in keys:
        for part in reversed(key.split(".")):
            if part in ELSEWHERE:
                return f"They are {ELSEWHERE[part]}'s, which visionlora does not read."
    return "They fit no known method."


def check_used(path: Path, unused: list[str], anything: bool, allow_partial: bool) -> None:
    """Raises AdapterFileError when tensors are left over, or everything is."""
    if not unused or (anything and allow_partial):
        return
    shown = ", ".join(repr(key[:120]) for key in sorted(unused)[:SHOWN]) + (" …" if len(unused) > SHOWN else "")
    if not anything:
        raise AdapterFileError(
            f"{path} holds no adapter that visionlora knows: {len(unused)} tensors, such as {shown}. {why_unused(unused)}"
        )
    raise AdapterFileError(
        f"{path} has {len(unused)} tensors that nothing here takes: {shown}. {why_unused(unused)} Nothing was loaded; "
        "--allow-partial (allow_partial=True) loads the rest and lists them."
    )


def check_finite(path: Path, modules: Mapping[str, AdapterModule]) -> None:
    """Raises AdapterFileError when some value is NaN or infinite."""
    if (bad := first_not_finite(modules)) is not None:
        raise not_finite(path, bad)


def first_not_finite(modules: Mapping[str, AdapterModule]) -> str | None:
    """The first module with a value that is NaN or infinite; both survive a sum, and one long sum of short ones is fast."""
    tensors = [t for m in modules.values() for t in m.tensors.values()]
    parts = [[t.reshape(-1) for t in tensors if t.dtype == dtype] for dtype in {t.dtype for t in tensors}]
    if sum(t.numel() for t in tensors) <= SUMMED_AT_ONCE:
        parts = [[torch.cat(part)] for part in parts]
    if all(bool(torch.isfinite(t.sum(dtype=torch.float64))) for part in parts for t in part):
        return None
    return next((n for n, m in modules.items() if not all(torch.isfinite(t).all() for t in m.tensors.values())), None)


def not_finite(path: Path, name: str) -> AdapterFileError:
    """What a file of a training that diverged gets."""
    return AdapterFileError(f"{path} has NaN or infinite values in {name!r}: its training diverged.")
