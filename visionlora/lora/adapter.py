"""The in-memory form of an adapter, between every file format and every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visionlora.errors import AdapterFileError, TargetError
from visionlora.lora.functional import delta_weight

TENSOR_NAMES = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "magnitude"),
    "vera": ("lambda_b", "lambda_d"),
    "ia3": ("vector",),
    "full": ("value",),
}
"""The tensors of each kind.

    lora_A (r, i), lora_B (o, r); of a convolution lora_A (r, i/g, *k), lora_B (o, r, 1, ...)
    magnitude (o,); lambda_b (o,), lambda_d (r,); vector (o,) or (i,); value in the shape of the parameter
"""


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
    def rank(self) -> int:
        """Rank r; 0 where the kind has none."""
        for name in ("lora_A", "lambda_d"):
            if name in self.tensors:
                return len(self.tensors[name])
        return 0

    @property
    def scaling(self) -> float:
        """Alpha over the rank."""
        return self.alpha / max(1, self.rank)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, fp32."""
        return self.tensors["lora_A"].float(), self.tensors["lora_B"].float()

    def shape(self) -> tuple[int, ...] | None:
        """The shape of ΔW, where the tensors alone tell it."""
        if "lora_A" in self.tensors:
            return (len(self.tensors["lora_B"]), *self.tensors["lora_A"].shape[1:])
        return tuple(self.tensors["value"].shape) if "value" in self.tensors else None

    def delta_weight(self, base: Tensor | None = None) -> Tensor:
        """ΔW in fp32, in the shape of the base weight.

        Args:
            base: the base weight; all kinds but LoRA are defined through it.

        Raises:
            AdapterFileError: when this kind needs the base weight and it is not given.
        """
        if self.kind == "lora":
            return delta_weight(*self.lora_factors(), self.scaling)
        if base is not None and self.kind == "full":
            return self.tensors["value"].float() - base.float()
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
    """One adapter: its modules by component and name (`unet.mid_block…to_q`) and what is known about it."""

    modules: Mapping[str, AdapterModule]
    info: Mapping[str, Any] = field(default_factory=dict)
    """The visionlora header: base id and fingerprints, config, trigger, training summary."""

    def delta_weights(self, base: nn.Module | None = None) -> dict[str, Tensor]:
        """{module name: ΔW in fp32}, each in the shape of its base weight.

        Args:
            base: the base model, with components as children; LoRA alone does not need it.
        """
        return {
            name: m.delta_weight(None if base is None else base_weight(base, name)) for name, m in self.modules.items()
        }

    def component(self, prefix: str) -> dict[str, AdapterModule]:
        """The modules of one component (`unet`, `text_encoder`), without its prefix; all when it is empty."""
        start = prefix + "." if prefix else ""
        return {name[len(start) :]: m for name, m in self.modules.items() if name.startswith(start)}

    @property
    def components(self) -> list[str]:
        """The components that have modules, sorted."""
        return sorted({name.split(".", 1)[0] for name in self.modules})


def base_weight(base: nn.Module, name: str) -> Tensor:
    """The base weight that a module of an adapter changes, by its name in the file or without the component."""
    from visionlora.lora.targets import site_at

    for path in (name, name.partition(".")[2]):
        parameters = dict(base.named_parameters())
        if path in parameters:
            return parameters[path]
        try:
            return site_at(base, path).weight
        except TargetError:
            continue
    raise TargetError(f"The adapter changes {name}, which {type(base).__name__} has not.")
