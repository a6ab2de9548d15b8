"""Adapters as values: several into one, one into a smaller one, the difference of two models into one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError, ConfigError
from visionlora.lora.adapter import PRODUCT_KINDS, Adapter, AdapterModule, in_one_spelling
from visionlora.lora.combine import Factors, Options, check_options, combination
from visionlora.lora.functional import decompose, rank_for_energy, truncate
from visionlora.lora.merge import check_scale
from visionlora.lora.targets import PACKED

Progress = Callable[[int, int], None]
SMALL = 512
"""Sides up to which a dense SVD is faster than a randomised one."""
OVERSAMPLING = 16
"""Directions beyond those wanted that a randomised SVD looks at, and its power iterations (arXiv 0909.4061, §4)."""
POWER_ITERATIONS = 4
CONVOLUTIONS = re.compile(r"^unet\..*(?:\bconv[12]|\bconv_in|\bconv_out|samplers\.\d+\.conv)$|^unet\.conv_(?:in|out)$")
"""The 3x3 convolutions of Stable Diffusion's UNets."""
TABLES = ("token_embedding", "position_embedding", "embeddings")
"""Ends of the names of embedding tables, on which no adapter acts."""
PACKED_WEIGHT = "in_proj_weight"
"""Of nn.MultiheadAttention: q, k and v above each other, whose adapters are named after them; or three, as below."""
APART_WEIGHTS = {f"{part}_proj_weight": part for part in "qkv"}


@dataclass(frozen=True)
class Size:
    """How small an adapter is to become; neither leaves it as it is.

    Raises:
        ConfigError: when both are given or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    """Share of ‖ΔW‖² that each module keeps, above 0 and at most 1; the rank follows, module by module."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise ConfigError("Give a rank or an energy, not both: an energy chooses the rank of each module itself.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"The rank is {self.rank}; it must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"The energy is {self.energy}; it must be above 0 and at most 1, such as 0.95.")

    def of(self, s: Tensor, total: float | None = None) -> int:
        """The rank for these singular values."""
        if self.energy is not None:
            return rank_for_energy(s, self.energy, total)
        return min(len(s), self.rank or len(s))


@dataclass(frozen=True)
class Result:
    """An adapter and what it lost."""

    adapter: Adapter
    errors: Mapping[str, float]
    """‖ΔW - ΔW'‖ / ‖ΔW‖ by module, 0 to 1."""
    notes: tuple[str, ...] = ()
    """What else a user should know."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module."""
        return {n: m.rank for n, m in self.adapter.modules.items()}


def additive(name: str, module: AdapterModule, what: str) -> AdapterModule:
    """A module whose ΔW is the same on every base.

    Raises:
        AdapterFileError: when it is not.
    """
    if module.kind in PRODUCT_KINDS and not module.options:
        return module
    if module.kind == "tlora":
        raise AdapterFileError(
            f"{name} is T-LoRA: its rank follows the timestep, so it cannot be {what}. `visionlora generate --lora` "
            "applies it as it is, beside others."
        )
    if module.kind == "full":
        raise AdapterFileError(
            f"{name} was trained in full: it means something on its own base alone, so it cannot be {what}. Make a "
            "model of it (`visionlora bake` for Stable Diffusion, `visionlora export` for a classifier), or an adapter "
            "without it."
        )
    kind = {"dora": "DoRA", "ia3": "(IA)³", "oft": "OFT", "vera": "VeRA"}.get(module.kind, module.kind)
    raise AdapterFileError(
        f"{name} is {kind}: its ΔW depends on the base model, so it cannot be {what} by itself. Bake it into its base "
        "(`visionlora bake`) and extract a LoRA from the result (`visionlora extract`)."
    )


def words_of(adapters: Sequence[Adapter]) -> dict[str, dict[str, Tensor]]:
    """The learned words of all, by token and text encoder.

    Raises:
        ConfigError: when two have one with different vectors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        for token, parts in adapter.embeddings.items():
            there = found.setdefault(token, dict(parts))
            if there.keys() != parts.keys() or not all(torch.equal(there[c], parts[c]) for c in parts):
                raise ConfigError(
                    f"Two of the adapters have vectors of their own for {token}: a merged one can keep but one of each."
                )
    return found


def adapter_of(given: Any) -> Adapter:
    """An adapter, or that of a result.

    Raises:
        ConfigError: when it is neither.
    """
    found = given.adapter if isinstance(given, Result) else given
    if not isinstance(found, Adapter):
        raise ConfigError(
            f"A {type(given).__name__} is no adapter: give an Adapter, such as load_adapter(path) or handle.adapter(), or what "
            "merge_adapters and its like return."
        )
    return found


def merge_adapters(
    adapters: Sequence[Any], method: str = "sum", size: Size | None = None,
    options: Options | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Several adapters, each with its scale, as one LoRA.

    With method `sum` and no size the result is exact: the ranks of a module add up and ΔW is the weighted sum.

    Args:
        adapters: pairs of adapter and scale, or adapters alone for a scale of 1, at least one. A result counts as
            its adapter. Of those at scale 0 only words and what the header says are taken.
        method: `sum`, `ties`, `dare`, `knots`, `iso-c` or a plug-in's; see `visionlora.lora.combine`.
        size: makes the result smaller by the best low-rank approximation, from the factors alone.
        options: of methods that drop values.
        progress: called with (modules done, modules).

    Raises:
        ConfigError: when there is no such method, it does not read an option, there is no adapter, or a scale is not finite.
        AdapterFileError: when a module's ΔW depends on the base model, or shapes differ between adapters.
    """
    pairs = pairs_of(adapters)
    combine, options, size = combination(method), options or Options(), size or Size()
    check_options(method, options)
    embeddings = words_of([a for a, _ in pairs])
    # What is at scale 0 has no say: not in how many a mean is of, nor, by its rounding, in Iso-C's singular values.
    acting = [pair for pair in pairs if pair[1]] or pairs
    names = list(dict.fromkeys(n for a, _ in acting for n in a.modules))
    modules: dict[str, AdapterModule] = {}
    errors: dict[str, float] = {}
    for done, name in enumerate(names, 1):
        present = [(a.modules[name], scale) for a, scale in acting if name in a.modules]
        if all(m.kind == "shift" for m, _ in present):
            total = torch.stack([m.tensors["shift"].float() * scale for m, scale in present]).sum(0)
            modules[name] = AdapterModule("shift", {"shift": total}, 1.0)
        else:
            own = matching(name, present)
            lora_A, lora_B = combine(own, options)
            ranks = sum(len(a) for a, _, _ in own)
            # Dropping values makes ΔW dense: the rank that an exact sum would have is kept unless another is asked for.
            within = Size(rank=ranks) if size == Size() and len(lora_A) > ranks else size
            modules[name], errors[name] = sized(lora_A, lora_B, within)
        if progress is not None:
            progress(done, len(names))
    info = merged_info(pairs, method)
    if odd := {name: why for a, _ in acting for name, why in a.odd_layers.items()}:
        info["odd_layers"] = odd
    merged = Adapter(modules, info, embeddings)
    return Result(merged, errors, tuple(notes_on(pairs, merged)))


def pairs_of(adapters: Sequence[Any]) -> list[tuple[Adapter, float]]:
    """Adapters and their scales, with modules that they share under one name.

    Raises:
        ConfigError: when there is none, one is no adapter, or a scale is not finite.
    """
    if not adapters:
        raise ConfigError("There is nothing to merge: give at least one adapter.")
    pairs = [pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, 1.0) for pair in adapters]
    for k, (_, scale) in enumerate(pairs, 1):
        if isinstance(scale, (str, Path, Adapter, Result)):
            raise ConfigError("Give a list of pairs of adapter and scale: [(first, 0.8), (second, 0.5)].")
        check_scale(f"number {k}", scale)
    spelled = in_one_spelling([adapter_of(a) for a, _ in pairs])
    return [(a, scale) for a, (_, scale) in zip(spelled, pairs, strict=True)]


def notes_on(pairs: Sequence[tuple[Adapter, float]], merged: Adapter) -> Iterator[str]:
    """What a person should know of a merged adapter, which it does not say itself."""
    if len(skips := sorted({a.clip_skip for a, _ in pairs})) > 1:
        yield (
            f"The adapters were trained with clip_skip {' and '.join(map(str, skips))}, and the merged one can say but one: it "
            f"says none. Draw with --clip-skip {skips[-1]} or without, whichever looks better."
        )
    if elsewhere := [word for word in merged.info.get("words", ()) if word not in merged.embeddings]:
        yield (
            f"The vectors of {', '.join(elsewhere)} are in none of the adapters: they stay in files of their own, which are "
            "needed to draw with those words."
        )
    if not any(scale for _, scale in pairs):
        yield "Every scale is 0, so the merged adapter changes nothing."


def matching(name: str, present: Sequence[tuple[AdapterModule, float]]) -> list[Factors]:
    """The factors of one module of several adapters, in one shape.

    Raises:
        AdapterFileError: when their weights differ in shape.
    """
    found: list[Factors] = []
    shape = weight_shape(name, [module for module, _ in present])
    for module, scale in present:
        own = additive(name, module, "merged")
        down, up = own.lora_factors()
        if shape is None:
            shape = (len(up), *down.shape[1:])
        if (len(up), math.prod(down.shape[1:])) != (shape[0], math.prod(shape[1:])):
            raise AdapterFileError(
                f"The adapters change {name} of different sizes, {(len(up), *down.shape[1:])} and {shape}: they were made "
                "for different base models."
            )
        spatial = (1,) * (len(shape) - 2)
        found.append((down.reshape(len(down), *shape[1:]), up.reshape(*up.shape[:2], *spatial), own.scaling * scale))
    return found


def weight_shape(name: str, modules: Sequence[AdapterModule]) -> tuple[int, ...] | None:
    """The shape of a base weight, as far as modules for it tell, or its name in Stable Diffusion's UNets.

    The files of LoHa, factored LoKr and PEFT's AdaLoRA have the inputs and the kernel of a convolution in one.
    """
    told = sorted((s for m in modules if (s := m.shape()) is not None), key=len, reverse=True)
    if told and len(told[0]) > 2:
        return told[0]
    flat = next((f for m in modules if (f := m.flat_shape()) is not None), None)
    if flat is not None and name.startswith("unet.") and name.endswith(".conv_shortcut"):
        return *flat, 1, 1
    if flat is not None and not flat[1] % 9 and CONVOLUTIONS.search(name):
        return flat[0], flat[1] // 9, 3, 3
    return told[0] if told else None


def merged_info(adapters: Sequence[tuple[Adapter, float]], method: str) -> dict[str, Any]:
    """The header of a merged adapter: what all agree in, and where it came from.

    Where one was trained at noise levels that end at nothing but noise, pictures are drawn so, as with all side by side.
    """
    bases = [a.info.get("base") for a, _ in adapters]
    triggers = [str(t) for a, _ in adapters if (t := a.info.get("trigger"))]
    info: dict[str, Any] = {"method": "lora", "merged": {"method": method, "scales": [s for _, s in adapters]}}
    if bases[0] and all(b == bases[0] for b in bases):
        info["base"] = bases[0]
    if triggers:
        info["trigger"] = ", ".join(dict.fromkeys(triggers))
    if words := sorted({word for a, _ in adapters for word in a.info.get("words", ())}):
        info["words"] = words
    training: dict[str, Any] = {}
    skips = {a.clip_skip for a, _ in adapters}
    if len(skips) == 1 and skips != {1}:
        training["clip_skip"] = skips.pop()
    if any(a.zero_terminal_snr for a, _ in adapters):
        training["zero_terminal_snr"] = True
    return {**info, "training": training} if training else info


def sized(lora_A: Tensor, lora_B: Tensor, size: Size) -> tuple[AdapterModule, float]:
    """A module of the wanted size and its relative error."""
    if size == Size():
        return AdapterModule.lora(lora_A.contiguous(), lora_B.contiguous(), float(len(lora_A))), 0.0
    u, s, v = decompose(lora_A, lora_B)
    rank = size.of(s)
    down, up = truncate(u, s, v, rank, (len(lora_B), *lora_A.shape[1:]))
    return AdapterModule.lora(down.contiguous(), up.contiguous(), float(rank)), lost(s, rank)


def lost(s: Tensor, rank: int, total: float | None = None) -> float:
    """The share of ‖ΔW‖ beyond the first singular values."""
    squares = s.double().square()
    whole = float(squares.sum()) if total is None else total
    return math.sqrt(max(0.0, 1 - float(squares[:rank].sum()) / whole)) if whole > 0 else 0.0


def resize_adapter(adapter: Adapter | Result, size: Size, progress: Progress | None = None) -> Result:
    """A smaller LoRA with the nearest ΔW, module by module; LoHa, LoKr and differences become LoRA on the way.

    Args:
        adapter: of any kind whose ΔW does not depend on the base.
        size: the rank, or the share of ‖ΔW‖² to keep.
        progress: called with (modules done, modules).

    Raises:
        ConfigError: when no size is given.
        AdapterFileError: when a module's ΔW depends on the base model.
    """
    if size == Size():
        raise ConfigError("Say how small: a rank, or an energy such as 0.95.")
    adapter = adapter_of(adapter)
    modules: dict[str, AdapterModule] = {}
    errors: dict[str, float] = {}
    for done, (name, m) in enumerate(adapter.modules.items(), 1):
        if m.kind == "shift":
            modules[name] = m
        else:
            own = additive(name, m, "resized")
            down, up = own.lora_factors(weight_shape(name, [own]))
            modules[name], errors[name] = sized(down, up * own.scaling, size)
        if progress is not None:
            progress(done, len(adapter.modules))
    return Result(replace(adapter, modules=modules), errors)


def extract_adapter(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], size: Size, component: str = "model",
    shifts: bool = False, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """The difference of two models of one architecture as a LoRA; of torch's packed attention one for each of q, k and v.

    Args:
        base: parameters by name.
        tuned: the same names and shapes, other values.
        size: the rank, or the share of ‖ΔW‖² to keep.
        component: the part of a pipeline that they are.
        shifts: also keep the differences of vectors (norms, biases), as they are.
        progress: called with (parameters done, parameters).

    Returns:
        The adapter; parameters that did not change are not in it. Its errors have an entry of 1 for every parameter that
        changed and was left out: vectors, tables of embeddings, and what no layer has as its weight.

    Raises:
        ConfigError: when no size is given.
        AdapterFileError: when the models differ in names or shapes, or a difference is not finite.
    """
    if size == Size():
        raise ConfigError("Say how small: a rank, or an energy such as 0.95.")
    check_alike(base, tuned)
    modules: dict[str, AdapterModule] = {}
    errors: dict[str, float] = {}
    odd: dict[str, str] = {}
    for done, (name, before) in enumerate(base.items(), 1):
        delta = tuned[name].float() - before.float()
        if not bool(torch.isfinite(delta).all()):
            raise AdapterFileError(f"{name} differs by NaN or infinite values: one of the models is broken.")
        layer, _, last = name.rpartition(".")
        if bool((delta != 0).any()):
            if matrices := matrices_of(layer, last, delta):
                for site, own in matrices.items():
                    modules[f"{component}.{site}"], errors[f"{component}.{site}"] = approximated(own, size)
                if last != "weight":
                    odd |= dict.fromkeys(matrices, PACKED)
            elif shifts and not layer.endswith(TABLES):
                modules[f"{component}.{name}"] = AdapterModule("shift", {"shift": delta}, 1.0)
            else:
                errors[f"{component}.{name}"] = 1.0
        if progress is not None:
            progress(done, len(base))
    return Result(Adapter(modules, {"method": "lora", **({"odd_layers": odd} if odd else {})}), errors)


def matrices_of(layer: str, parameter: str, delta: Tensor) -> dict[str, Tensor]:
    """The matrices of a parameter that an adapter can change, by their names in one; those that differ."""
    if parameter == "weight" and delta.dim() >= 2 and not layer.endswith(TABLES):
        return {layer: delta}
    if parameter == PACKED_WEIGHT and delta.dim() == 2 and not len(delta) % 3:
        parts = dict(zip("qkv", delta.chunk(3), strict=True))
        return {f"{layer}.{part}": own for part, own in parts.items() if bool((own != 0).any())}
    if parameter in APART_WEIGHTS and delta.dim() == 2:
        return {f"{layer}.{APART_WEIGHTS[parameter]}": delta}
    return {}


def check_alike(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    """Raises AdapterFileError when two models are not of one architecture."""
    if missing := sorted(set(base) ^ set(tuned)):
        where = "first" if missing[0] in base else "second"
        raise AdapterFileError(
            f"The models are of different architectures: {len(missing)} parameters are in one alone, such as {missing[0]!r} "
            f"in the {where}."
        )
    for name, tensor in base.items():
        if tensor.shape != tuned[name].shape:
            raise AdapterFileError(
                f"The models are of different architectures: {name!r} is {tuple(tensor.shape)} in the first and "
                f"{tuple(tuned[name].shape)} in the second."
            )


def randomised_svd(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular directions, nearly: a random start and a few power iterations; always the same result.

    Source: arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ q).Q).Q
    u, s, v = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ u, s, v


def approximated(delta: Tensor, size: Size) -> tuple[AdapterModule, float]:
    """The best LoRA of a dense ΔW; large ones by a randomised SVD (arXiv 0909.4061), wider until it holds the energy."""
    flat = delta.flatten(1)
    smaller, total = min(flat.shape), float(flat.double().square().sum())
    wanted = size.rank or 32
    while True:
        width = min(smaller, wanted + OVERSAMPLING)
        if smaller <= SMALL or 4 * width > smaller:
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
        else:
            u, s, v = randomised_svd(flat, width)
        reached = float(s.double().square().sum()) >= (size.energy or 0.0) * total * (1 - 1e-9)
        if len(s) == smaller or reached:
            break
        wanted *= 2
    rank = size.of(s, total)
    down, up = truncate(u, s, v, rank, delta.shape)
    return AdapterModule.lora(down.contiguous(), up.contiguous(), float(rank)), lost(s, rank, total)
