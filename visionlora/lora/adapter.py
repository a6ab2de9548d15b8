"""The in-memory form of an adapter, between every file format and every model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, TargetError
from visionlora.lora.names import common_names, resolve_names
from visionlora.lora.products import factors, problem, product, rank_of

PRODUCT_KINDS = ("lora", "loha", "lokr", "diff")
"""Kinds whose ΔW does not depend on the base: see `visionlora.lora.products` for their tensors."""
TENSOR_NAMES = {
    "tlora": ("lora_A", "lora_B"),
    "vera": ("lambda_b", "lambda_d"),
    "ia3": ("vector",),
    "oft": ("oft_blocks", "rescale"),
    "full": ("value",),
    "shift": ("shift",),
}
"""The tensors of the other kinds; `dora` has those of its product (option `product`, lora by default) and `magnitude`.

    lora_A, lora_B   of tlora, with options `least` and `timesteps`: `visionlora.lora.methods.tlora`
    magnitude   of dora, (o,); with option `axis` "in" (i,), the norms of the columns
    lambda_b (o,), lambda_d (r,) of vera
    vector      of ia3, (o,) or (i,) with option `on_input`; with `relative` it is the factor minus 1; `spatial` is the number
                of a convolution's dimensions
    oft_blocks (n, b, b) or (m, n, b, b) and rescale (o, 1, ...), which may be missing: `visionlora.lora.methods.oft`
    value, shift   in the shape of a parameter of the base, which they replace or are added to
"""
MODULE_KINDS = (*PRODUCT_KINDS, "dora", *TENSOR_NAMES)
OPTIONAL = ("rescale",)


@dataclass(frozen=True)
class AdapterModule:
    """What an adapter holds for one layer (or one part of a fused layer)."""

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float
    """The scaling times the rank."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the kind needs: the seed of VeRA's projections, the side of an (IA)³ vector."""

    @classmethod
    def lora(cls, lora_A: Tensor, lora_B: Tensor, alpha: float) -> AdapterModule:
        """Plain factors."""
        return cls("lora", {"lora_A": lora_A, "lora_B": lora_B}, float(alpha))

    @property
    def product(self) -> str | None:
        """The kind of the ΔW inside: of a DoRA what its magnitude is applied to."""
        return str(self.options.get("product", "lora")) if self.kind == "dora" else self.kind

    @property
    def product_tensors(self) -> dict[str, Tensor]:
        """The tensors without the magnitude."""
        return {name: t for name, t in self.tensors.items() if name != "magnitude"}

    @property
    def rank(self) -> int:
        """Rank r; 0 where the kind has none."""
        if self.kind in ("vera", "tlora"):
            return len(self.tensors["lambda_d" if self.kind == "vera" else "lora_A"])
        return rank_of(str(self.product), self.tensors)

    @property
    def scaling(self) -> float:
        """Alpha over the rank; 1 where there is no rank."""
        return self.alpha / self.rank if self.rank else 1.0

    def lora_factors(self, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in fp32 with the same product, whatever the kind; see `visionlora.lora.products.factors`."""
        return factors(str(self.product), self.product_tensors, shape)

    def widened(self, rank: int) -> AdapterModule:
        """The same LoRA with a rank that is no smaller: its factors end with zeros."""
        down, up, more = self.tensors["lora_A"], self.tensors["lora_B"], rank - self.rank
        wide_down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        wide_up = torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], dim=1)
        return AdapterModule.lora(wide_down, wide_up, self.alpha * rank / self.rank)

    def with_alpha_for_none(self, alpha: float | None) -> AdapterModule:
        """The same ΔW, none, by a factor of zeros and this alpha where alpha is 0, which other programs take for the rank."""
        if self.alpha or not self.rank:
            return self
        zeros = ["lora_B"] if "lora_B" in self.tensors else list(self.product_tensors)
        tensors = {name: torch.zeros_like(t) if name in zeros else t for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, alpha=alpha or float(self.rank))

    def is_zero(self) -> bool:
        """Whether ΔW is zero whatever the base: a factor is."""
        if self.kind not in (*PRODUCT_KINDS, "shift"):
            return False
        return any(not bool(t.any()) for t in self.tensors.values())

    def problem(self) -> str | None:
        """Why these tensors cannot be used, or None."""
        if self.kind == "dora" or self.kind in PRODUCT_KINDS:
            if self.kind == "dora" and "magnitude" not in self.tensors:
                return "it lacks magnitude"
            if self.product not in PRODUCT_KINDS:
                return f"its product is of an unknown kind, {self.product!r}"
            return problem(str(self.product), self.product_tensors)
        if self.kind == "tlora":
            least, timesteps = (self.options.get(name) for name in ("least", "timesteps"))
            if (why := problem("lora", self.tensors)) is not None:
                return why
            if not isinstance(least, int) or not 1 <= least <= self.rank:
                return f"its least rank is {least!r}, not between 1 and its rank"
            return None if isinstance(timesteps, int) and timesteps >= 1 else f"its timesteps are {timesteps!r}"
        names = TENSOR_NAMES[self.kind]
        missing = [n for n in names if n not in self.tensors and n not in OPTIONAL]
        if missing or set(self.tensors) - set(names):
            return f"it lacks {', '.join(missing)}" if missing else "it has a tensor too many"
        if any(not t.numel() for t in self.tensors.values()):
            return "a tensor is empty"
        blocks = self.tensors.get("oft_blocks")
        if blocks is not None and (blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]):
            return f"oft_blocks has shape {tuple(blocks.shape)}"
        return None

    def shape(self) -> tuple[int, ...] | None:
        """The shape of ΔW, where the tensors alone tell it."""
        t = self.tensors
        if "lora_A" in t:
            return (len(t["lora_B"]), *t["lora_A"].shape[1:])
        if "hada_t1" in t:
            return (t["hada_w1_a"].shape[1], t["hada_w1_b"].shape[1], *t["hada_t1"].shape[2:])
        if "lokr_w2" in t:
            one = t["lokr_w1"].shape if "lokr_w1" in t else (len(t["lokr_w1_a"]), t["lokr_w1_b"].shape[1])
            two = t["lokr_w2"].shape
            return (one[0] * two[0], one[1] * two[1], *two[2:])
        return next((tuple(t[n].shape) for n in ("value", "shift", "diff") if n in t), None)

    def flat_shape(self) -> tuple[int, int] | None:
        """The shape of ΔW with inputs and kernel in one, (o, n); None where it depends on the base."""
        if (shape := self.shape()) is not None:
            return shape[0], math.prod(shape[1:])
        t = self.tensors
        if self.product == "loha":
            return len(t["hada_w1_a"]), t["hada_w1_b"].shape[1]
        if self.product == "lokr":
            one = t["lokr_w1"].shape if "lokr_w1" in t else (len(t["lokr_w1_a"]), t["lokr_w1_b"].shape[1])
            if "lokr_t2" in t:
                kernel = math.prod(t["lokr_t2"].shape[2:])
                return one[0] * t["lokr_w2_a"].shape[1], one[1] * t["lokr_w2_b"].shape[1] * kernel
            return one[0] * len(t["lokr_w2_a"]), one[1] * t["lokr_w2_b"].shape[1]
        return None

    def fitted(self, shape: Sequence[int]) -> AdapterModule:
        """Itself for a weight of this shape: a linear layer and a 1x1 convolution have the same ΔW in two shapes.

        Stable Diffusion 1.x has convolutions where 2.x and XL have linear layers, and files come from both sides. With
        option `columns` "first" (PEFT's VeRA) lora_A is as wide as the widest layer, and each takes its first columns.
        """
        if self.options.get("columns") == "first":
            down = self.tensors["lora_A"][:, : shape[1]].contiguous()
            return replace(self, tensors={**self.tensors, "lora_A": down}, options={})
        own = self.shape()
        if len(shape) > 2 and own == (shape[0], math.prod(shape[1:])):  # inputs and kernel in one
            tensors = dict(self.tensors)
            to = {"lora_A": (-1, *shape[1:]), "lora_B": (shape[0], -1, *(1,) * (len(shape) - 2)), "diff": tuple(shape)}
            for name in tensors.keys() & to.keys():
                tensors[name] = tensors[name].reshape(*to[name])
            return replace(self, tensors=tensors)
        if (
            own is None
            or own == tuple(shape)
            or own[:2] != tuple(shape[:2])
            or math.prod(own[2:]) != 1
            or math.prod(shape[2:]) != 1
        ):
            return self
        ones, tensors = (1,) * (len(shape) - 2), dict(self.tensors)
        for name in ("lora_A", "lora_B", "diff", "lokr_w2"):
            if name in tensors:
                tensors[name] = tensors[name].reshape(*tensors[name].shape[:2], *ones)
        return replace(self, tensors=tensors)

    def part(self, rows: slice) -> AdapterModule | None:
        """What it does to some of the layer's outputs; None for kinds that cannot be cut.

        Args:
            rows: of the weight, or of the parameter that it changes.
        """
        by_rows = {"lora": ("lora_B",), "tlora": ("lora_B",), "dora": ("lora_B", "magnitude"), "diff": ("diff",),
                   "full": ("value",), "shift": ("shift",), "ia3": ("vector",)}  # fmt: skip
        if self.kind in ("loha", "lokr"):
            return AdapterModule("diff", {"diff": self.delta_weight()[rows]}, 1.0)
        if self.kind not in by_rows or self.product not in (self.kind, "lora") or self.options.get("axis") == "in":
            return None
        cut = () if self.options.get("on_input") else by_rows[self.kind]
        return replace(self, tensors={n: t[rows].contiguous() if n in cut else t for n, t in self.tensors.items()})

    def delta_weight(self, base: Tensor | None = None) -> Tensor:
        """ΔW in fp32, in the shape of the base weight.

        Args:
            base: the base weight. LoRA, LoHa, LoKr and differences do not need it, but the files of LoHa and factored
                LoKr do not say the kernel of a convolution: without the base their ΔW is (o, i·k·k).

        Raises:
            AdapterFileError: when this kind needs the base weight and it is not given.
        """
        if self.kind in PRODUCT_KINDS:
            own = self if base is None else self.fitted(base.shape)
            delta = product(self.kind, own.tensors).float() * self.scaling
            return delta if base is None or delta.numel() != base.numel() else delta.view(base.shape)
        if self.kind == "shift":
            return self.tensors["shift"].float()
        if base is not None and self.kind == "full":
            return self.tensors["value"].float() - base.float()
        if self.kind == "tlora":
            raise AdapterFileError("A module of T-LoRA has no one ΔW: it changes from timestep to timestep.")
        if base is None:
            raise AdapterFileError(
                f"ΔW of a {self.kind} module depends on the base weight: call delta_weights(model) with the base model."
            )
        from visionlora.lora.methods import KINDS
        from visionlora.lora.methods.base import Site

        layer = nn.Module()
        layer.weight = nn.Parameter(base.detach(), requires_grad=False)
        found: Tensor = KINDS[self.kind].load(Site("", layer), self).delta_weight(base)
        return found


@dataclass(frozen=True)
class Adapter:
    """One adapter: its modules by component and name (`unet.mid_block…to_q`) and what is known about it.

    Raises:
        AdapterFileError: when a module has no component.
    """

    modules: Mapping[str, AdapterModule]
    info: Mapping[str, Any] = field(default_factory=dict)
    """The visionlora header: base id and fingerprints, config, trigger, training summary."""
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Tokens that textual inversion added: token -> component (`text_encoder`) -> vectors (n, d)."""
    format: str = "visionlora"
    """Which spelling the file had; see `visionlora.formats`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What other tools wrote into the header, word by word."""
    unused: tuple[str, ...] = ()
    """Tensors of the file that nothing here takes; always empty unless the file was read with `allow_partial`."""

    def __post_init__(self) -> None:
        for name in self.modules:
            if not all(name.partition(".")):  # it would be a component without a layer, and do nothing
                raise AdapterFileError(
                    f"An adapter has a module {name!r}, which is not a component and a layer in it, such as "
                    f"{'model.' + name.strip('.')!r} or 'unet.conv_in'."
                )

    def __repr__(self) -> str:
        """In words; a notebook shows what its last line gives, and the tensors are many pages."""
        parts = f" of {', '.join(self.components)}" if self.modules else ""
        return f"<Adapter of {len(self.modules)} modules{parts}, format {self.format!r}>"

    def delta_weights(self, base: nn.Module | Any = None) -> dict[str, Tensor]:
        """{module name: ΔW in fp32}, each in the shape of its base weight.

        Args:
            base: the base model: a pipeline, or a module with components as children; see `AdapterModule.delta_weight` for who
                needs it.
        """
        if base is not None and not isinstance(base, nn.Module):
            parts = getattr(base, "components", {})
            base = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        weights = {} if base is None else base_weights(base, list(self.modules))
        return {name: m.delta_weight(weights.get(name)) for name, m in self.modules.items()}

    def component(self, prefix: str) -> dict[str, AdapterModule]:
        """The modules of one component (`unet`, `text_encoder`), without its prefix; all when it is empty."""
        start = prefix + "." if prefix else ""
        return {name[len(start) :]: m for name, m in self.modules.items() if name.startswith(start)}

    @property
    def clip_skip(self) -> int:
        """How many layers from the end the text was read in training; 1, the last, where it is not said."""
        return int((self.info.get("training") or {}).get("clip_skip", 1))

    @property
    def max_token_length(self) -> int:
        """How many tokens of a caption were learned at most; 75, what CLIP reads at once, where it is not said."""
        return int((self.info.get("training") or {}).get("max_token_length", 75))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it was trained at noise levels that end at nothing but noise."""
        return bool((self.info.get("training") or {}).get("zero_terminal_snr"))

    @property
    def odd_layers(self) -> dict[str, str]:
        """Layers where adapters of other tools do something else, and why; see `visionlora.lora.targets.odd_layers`."""
        found = self.info.get("odd_layers")
        return {str(name): str(why) for name, why in found.items()} if isinstance(found, Mapping) else {}

    @property
    def components(self) -> list[str]:
        """The components that have modules, sorted."""
        return sorted({name.split(".", 1)[0] for name in self.modules})


def in_one_spelling(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters, with one name for a layer that their files spell in different ways; see `visionlora.lora.names`."""
    names: dict[str, str] = {}
    distinct = {frozenset(a.modules): a for a in adapters}.values()  # most files have the same layers
    for component in {c for a in distinct for c in a.components}:
        found = common_names([a.component(component) for a in distinct])
        names |= {f"{component}.{name}": f"{component}.{chosen}" for name, chosen in found.items()}
    if not names:
        return list(adapters)
    return [replace(a, modules={names.get(n, n): m for n, m in a.modules.items()}) for a in adapters]


def base_weights(base: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The base weights that modules of an adapter change, by their names in the file, with the component or without.

    Raises:
        TargetError: when the base has none of a name.
    """
    from visionlora.lora.targets import site_at

    parameters = dict(base.named_parameters())
    known = {n for n, _ in base.named_modules()} | parameters.keys()
    short = {name: name.partition(".")[2] for name in names}
    paths = resolve_names([*names, *short.values()], known)
    found = {}
    for name in names:
        path = paths.get(name) or paths.get(short[name])
        # Parts of fused layers are no modules of their own: the last word is theirs.
        path = path or next((p for p in (name, short[name]) if p.rpartition(".")[0] in known), name)
        try:
            found[name] = parameters[path] if path in parameters else site_at(base, path).weight
        except TargetError:
            kind = "the base" if isinstance(base, nn.ModuleDict) else type(base).__name__
            raise TargetError(f"The adapter changes {name}, which {kind} has not.") from None
    return found
