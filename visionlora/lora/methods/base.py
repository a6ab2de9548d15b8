"""What every adapter method is: parameters on one layer and what they do to its output.

A method describes its effect in three terms, all differentiable, from which layers run, stack and merge it:
    factors        out[rows] += scaling · B·A·x          (low rank)
    gain           out += gain · (out - bias), or gain · out with the bias
    input gain     the base sees x · (1 + input_gain)
`scale` multiplies all of them and may change at any time; 0 gives the base's output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.functional import delta_weight, wide
from visionlora.lora.kernels import Rows, transformed

Factors = tuple[Tensor, Tensor, "float | Tensor"]
"""lora_A (r, i) or (r, i/g, *k), lora_B (o, r) or (o, r, 1, ...), and the scaling."""


class Gain(NamedTuple):
    """A factor on the base's output."""

    value: Tensor
    """(o,): gain minus 1, so that 0 changes nothing."""
    with_bias: bool
    """Whether the bias is multiplied too."""


_SWITCHED: list[object] = [object()]


def last_switch() -> object:
    """Stands for the last time that any adapter anywhere was switched on or off, or changed its scale."""
    return _SWITCHED[0]


def switched() -> None:
    """From now on `last_switch` is another object; no number, so that what was copied or unpickled never looks current."""
    _SWITCHED[0] = object()


def mark(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when a tensor is written in place, replaced or cast. Those of inference mode are not counted by torch."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device


@dataclass(frozen=True)
class Site:
    """A place for an adapter: a layer, or the rows of a fused layer that belong to one projection."""

    name: str
    """As in adapter files: the module's name, and the part of a fused layer after a dot."""
    layer: nn.Module
    part: str = ""
    """`q`, `k`, `v` … of a fused layer."""
    rows: Rows = None
    weight_name: str = "weight"
    """The layer's parameter that is adapted."""
    bias_name: str = "bias"
    target: str = ""
    """What reached it."""
    role: str | None = None

    @property
    def weight(self) -> Tensor:
        """The base weight, (o, i) or (o, i/g, *k), of this part alone and without what is merged into it."""
        whole: Tensor = getattr(self.layer, "originals", {}).get(
            self.weight_name, getattr(self.layer, self.weight_name)
        )
        return whole if self.rows is None else whole[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The base bias of this part, (o,)."""
        whole: Tensor | None = getattr(self.layer, self.bias_name, None)
        return whole if whole is None or self.rows is None else whole[self.rows]

    def mark(self) -> tuple[Any, ...]:
        """Changes whenever the base weight may have."""
        if (code := getattr(self.layer, "code", None)) is not None:  # packed, and unpacked anew for each who asks
            return (id(code),)
        whole = getattr(self.layer, "originals", {}).get(self.weight_name)
        return mark(getattr(self.layer, self.weight_name) if whole is None else whole)

    @property
    def inputs(self) -> int:
        """Width of the layer's input (of all groups of a convolution)."""
        return int(self.weight.shape[1] * getattr(self.layer, "groups", 1))


class Method(nn.Module):
    """One adapter on one site. Subclasses fill in parameters and the terms of their effect."""

    kind: ClassVar[str]
    additive: ClassVar[bool] = True
    """Whether the effect is ΔW alone, independent of the base weight: the sum of its factors."""

    bounded_rank: ClassVar[bool] = False
    """Whether a rank above the smaller side of a layer makes no sense."""

    timed: ClassVar[bool] = False
    """Whether the effect follows the timestep that the model is called with."""

    scale_tensor: Tensor

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple: a module here would become a child of its own child
        self.dropout, self._merged = float(dropout), False
        self.adapter_name = "default"
        self._scale = 1.0
        self._of_weight: tuple[tuple[Any, ...], Tensor] | None = None
        self._sample_scale: Tensor | None = None
        self._sample_mark: object = None
        self.row_mask: Tensor | None = None
        """(b, r): which components of the factors act on each picture; all when None."""
        # For compiled code, which must not be traced again when only a scale changes.
        self.register_buffer("scale_tensor", torch.ones((), device=site.weight.device), persistent=False)

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> Method:
        """Fresh parameters whose effect is nothing."""
        raise NotImplementedError(f"{cls.__name__} cannot be made anew")

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> Method:
        """From what a file says about this site."""
        raise NotImplementedError(f"{cls.__name__} cannot be read from a file")

    @classmethod
    def numbers(cls, site: Site, rank: int, config: AdapterConfig, stored: bool = False) -> int:
        """How many numbers of this rank, 1 or more, train on a site; with `stored` how many its file holds."""
        return rank * (len(site.weight) + site.weight[0].numel())

    def learn_on(self, config: AdapterConfig) -> None:
        """From here on it trains, as one made anew would."""
        self.dropout = float(config.dropout)
        for p in self.parameters():
            p.data = p.data.to(torch.float32, copy=True)  # the adapter that it came from stays as it is
            p.requires_grad_(True)

    def export(self) -> AdapterModule:
        """Copies for a file, fp32 on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} cannot be written to a file")

    # ------------------------------------------------------------------------------------------------------- effect

    def begin(self) -> None:
        """Called before the terms are asked for in one forward pass: what they share may be computed once."""

    def end(self) -> None:
        """Called when that forward pass has its terms."""

    def factors(self) -> list[Factors]:
        """Low-rank terms at the present scale."""
        return []

    def gain(self) -> Gain | None:
        """Factor on the output, minus 1, at the present scale."""
        return None

    def input_gain(self) -> Tensor | None:
        """Factor on the base's input, minus 1, (i,), at the present scale."""
        return None

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW at the present scale in fp32, given the base weight of this site."""
        total = torch.zeros(weight.shape, device=weight.device)
        for lora_A, lora_B, scaling in self.factors():
            total += delta_weight(lora_A.detach(), lora_B.detach(), float(scaling))
        return total

    def delta_bias(self, bias: Tensor) -> tuple[Tensor] | None:
        """The change of the bias in fp32, in a tuple; None when there is none."""
        return None

    # -------------------------------------------------------------------------------------------------- bookkeeping

    @property
    def site(self) -> Site:
        """Where it is."""
        return self._site[0]

    @property
    def key(self) -> str:
        """Its name among the adapters of its layer."""
        return f"{self.adapter_name}:{self.site.part}" if self.site.part else self.adapter_name

    @property
    def scale(self) -> float:
        """Multiplies the whole effect."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = float(value)
        self.scale_tensor.fill_(value)
        switched()

    @property
    def sample_scale(self) -> Tensor | None:
        """(b,): multiplies the effect on each picture of a batch by its own number; at inference alone."""
        return self._sample_scale

    @sample_scale.setter
    def sample_scale(self, value: Tensor | None) -> None:
        if value is not None or self._sample_scale is not None:
            self._sample_scale, self._sample_mark = value, None if value is None else object()
            switched()

    @property
    def merged(self) -> bool:
        """Whether the effect is in the layer's weight now."""
        return self._merged

    @merged.setter
    def merged(self, value: bool) -> None:
        self._merged = value
        switched()

    @property
    def factor(self) -> float | Tensor:
        """The scale as the present code path wants it."""
        return self.scale_tensor if torch.compiler.is_compiling() else self._scale

    def times(self, scaling: float) -> float | Tensor:
        """`factor` · scaling, with no product by one: torch's compiler drops that, and misses it in checkpointed blocks."""
        return self.factor if scaling == 1 else self.factor * scaling

    @property
    def trainable(self) -> bool:
        """Whether any parameter trains."""
        # Asked in every layer at every step, where `parameters()`, which looks into children, takes longer than a matmul.
        for p in self._parameters.values():
            if p is not None and p.requires_grad:
                return True
        return bool(self._modules) and any(p.requires_grad for child in self.children() for p in child.parameters())

    def state(self) -> tuple[Any, ...]:
        """Changes whenever the effect may have: scale and the versions of all tensors."""
        tensors = (*self._parameters.values(), *self._buffers.values())
        # The scales by picture are replaced, and a new tensor may lie where a freed one did: the mark is kept instead.
        weight = () if self.additive else self.site.mark()
        return (self._scale, self._sample_mark, *weight, *[mark(t) for t in tensors if t is not None])

    def of_weight(self, build: Callable[[Tensor], Tensor]) -> Tensor:
        """What `build` makes of the base weight in fp32 or wider, from before while the weight is the same.

        Compiled code takes it as it is.
        """
        kept = self._of_weight
        if kept is not None and (torch.compiler.is_compiling() or kept[0] == self.site.mark()):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            made = build(wide(self.site.weight))
        if not transformed():  # in which the weight may stand for many
            self._of_weight = self.site.mark(), made
        return made

    def memory(self) -> dict[str, Tensor]:
        """What training changes: the parameters, and what else the method keeps between steps."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def remember(self, values: Mapping[str, Tensor]) -> None:
        """Takes over the values of another `memory`."""
        for name, p in self.named_parameters():
            p.copy_(values[name])

    def regularisation(self) -> Tensor | None:
        """A term that the training loss should include, if the method has one."""
        return None


def cpu(tensor: Tensor) -> Tensor:
    """A copy for a file."""
    return tensor.detach().float().cpu().clone()
