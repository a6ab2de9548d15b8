"""T-LoRA, arXiv 2507.05964, section 4.1: the noisier the picture, the fewer components of the LoRA act.

y = Wx + s·B·M_t·A·x, where M_t keeps the first r(t) = ⌊(r - r_min)·(T - t)/T⌋ + r_min components at timestep t of T. At high
noise a picture's layout is settled, which is what a LoRA of one picture learns by heart first.

The paper starts A and B at the last singular vectors of a random matrix and subtracts that start again. Here B is zero as in
LoRA, and `init: orthogonal` gives A orthonormal rows, so that the components are different from the start.

The timestep comes from the model: it must be one that is called with a `timestep`, as UNets are.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, ConfigError
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.methods.base import Factors, Site, cpu
from visionlora.lora.methods.lora import LoRA

TIMESTEPS = 1000
"""T of Stable Diffusion."""


class TLoRA(LoRA):
    """A LoRA whose rank follows the timestep."""

    kind = "tlora"
    additive: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    least: int
    """r_min, acting at every timestep."""
    timesteps: int
    """T."""
    active: int
    """Components that act now, where they are the same for all pictures of a batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.least, self.timesteps, self.active = self.rank, TIMESTEPS, self.rank

    @classmethod
    def new(cls, site: Site, config: AdapterConfig, generator: torch.Generator) -> TLoRA:
        """As LoRA."""
        made = cast(TLoRA, super().new(site, config, generator))
        made.least = min(made.rank, config.min_rank or -(-made.rank // 2))
        return made

    @classmethod
    def load(cls, site: Site, module: AdapterModule) -> TLoRA:
        """Frozen."""
        device, tensors = site.weight.device, module.tensors
        made = cls(site, tensors["lora_A"].to(device), tensors["lora_B"].to(device), module.alpha, module.scaling)
        made.least, made.timesteps = int(module.options["least"]), int(module.options["timesteps"])
        return made.requires_grad_(False)

    def rank_at(self, timestep: float) -> int:
        """r(t)."""
        left = min(1.0, max(0.0, (self.timesteps - timestep) / self.timesteps))
        return int((self.rank - self.least) * left) + self.least

    def at(self, moments: tuple[float, ...], masks: dict[Any, Tensor]) -> None:
        """Lets the components act that do at the timesteps of a batch.

        Args:
            moments: one for all pictures, or one each.
            masks: those of other layers, by what they depend on.
        """
        ranks = [self.rank_at(t) for t in moments]
        self.active, self.row_mask = max(ranks), None
        if len(set(ranks)) > 1:
            key = (self.rank, self.least, self.timesteps, self.lora_A.device)
            if key not in masks:
                masks[key] = torch.arange(self.rank) < torch.tensor(ranks)[:, None]
                masks[key] = masks[key].to(self.lora_A.device)
            self.row_mask = masks[key][:, : self.active]

    def factors(self) -> list[Factors]:
        """s·B·A of the components that act."""
        ((down, up, scaling),) = super().factors()
        return [
            (down, up, scaling) if self.active == self.rank else (down[: self.active], up[:, : self.active], scaling)
        ]

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Refused: there is no one ΔW.

        Raises:
            AdapterFileError: always.
        """
        raise AdapterFileError(f"{self.site.name or 'The module'} is T-LoRA: its ΔW changes from timestep to timestep.")

    def state(self) -> tuple[Any, ...]:
        """Changes with the components that act, too."""
        return (*super().state(), self.active)

    def export(self) -> AdapterModule:
        """Both factors and the schedule."""
        tensors = {"lora_A": cpu(self.lora_A), "lora_B": cpu(self.lora_B)}
        return AdapterModule(
            self.kind, tensors, self.scaling * self.rank, {"least": self.least, "timesteps": self.timesteps}
        )


def check_timed(model: nn.Module) -> None:
    """Raises ConfigError when a model is not called with a timestep."""
    if "timestep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"Method 'tlora' acts by the timestep, which {type(model).__name__} is not given: it is for the UNets of diffusion "
            "models. Take method='lora' here."
        )


def follow_timestep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: tells every T-LoRA of the model its timesteps."""
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    moments = tuple(torch.as_tensor(timestep).flatten().tolist())
    masks: dict[Any, Tensor] = {}
    for m in model.modules():
        if isinstance(m, TLoRA):
            m.at(moments, masks)
