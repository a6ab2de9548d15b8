"""Puts adapters on a model and takes them off again: nothing is renamed and the base comes back bit for bit.

handle = inject(unet, AdapterConfig(rank=8, targets="attn"))
optimizer = AdamW(handle.parameters())
handle.merge(); handle.unmerge(); handle.eject()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, TargetError, nearest
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.config import AdapterConfig
from visionlora.lora.layers import AdaptedLayer, LoRA, adapt, release
from visionlora.lora.targets import resolve


@dataclass(frozen=True)
class InjectionReport:
    """What an adapter reached."""

    hits: tuple[tuple[str, str], ...]
    """Pairs of module name and the target that reached it."""
    skipped: tuple[tuple[str, str], ...]
    """Pairs of module name and the reason why it is not adapted."""
    trained_parameters: int
    base_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trained_parameters / max(1, self.base_parameters)
        text = f"{len(self.hits)} layers adapted, {self.trained_parameters:,} parameters ({share:.2f} % of the base)"
        return text + (f", {len(self.skipped)} names skipped" if self.skipped else "")


class Handle:
    """One adapter on one model."""

    def __init__(self, model: nn.Module, name: str, layers: Mapping[str, nn.Module], report: InjectionReport) -> None:
        self.model, self.name, self.report = model, name, report
        self.layers = {n: cast(AdaptedLayer, m) for n, m in layers.items()}
        self._originals: dict[str, Tensor] = {}

    def loras(self) -> dict[str, LoRA]:
        """The factors by module name."""
        return {name: cast(LoRA, layer.adapters[self.name]) for name, layer in self.layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        return [p for lora in self.loras().values() for p in lora.parameters()]

    def set_scale(self, scale: float) -> None:
        """Multiplies alpha/rank of every layer; 0 gives the base model's output bit for bit.

        Raises:
            ConfigError: when the scale is not finite, or the adapter is merged.
        """
        if not torch.isfinite(torch.tensor(float(scale))):
            raise ConfigError(f"The scale of adapter {self.name!r} is {scale!r}; it must be a finite number.")
        if self._originals:
            raise ConfigError(f"Adapter {self.name!r} is merged: unmerge it before changing its scale.")
        for lora in self.loras().values():
            lora.scale = float(scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds ΔW to the base weights in fp32, keeping the originals; twice is the same as once.

        Raises:
            ConfigError: when a merged weight would not be finite, before any weight is changed.
        """
        if self._originals:
            return
        merged: dict[str, Tensor] = {}
        for name, lora in self.loras().items():
            weight = cast(Tensor, self.layers[name].weight)
            merged[name] = (weight.float() + lora.delta_weight()).to(weight.dtype)
            if not torch.isfinite(merged[name]).all():
                raise ConfigError(
                    f"Merging adapter {self.name!r} gives NaN or infinite weights in {name!r}; nothing was "
                    "changed. Its training diverged, or its scale is too large."
                )
        for name, weight in merged.items():
            layer = self.layers[name]
            self._originals[name] = cast(Tensor, layer.weight).detach().clone()
            cast(Tensor, layer.weight).copy_(weight)
            layer.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit."""
        for name, original in self._originals.items():
            cast(Tensor, self.layers[name].weight).copy_(original)
            self.layers[name].merged = False
        self._originals.clear()

    def eject(self) -> None:
        """Takes the adapter off; the model is as it was before `inject`."""
        self.unmerge()
        for layer in self.layers.values():
            release(layer, self.name)
        self.layers = {}

    def modules(self, prefix: str) -> dict[str, AdapterModule]:
        """Copies of the factors on the CPU in fp32, named `prefix.module`, for an `Adapter`."""
        return {
            f"{prefix}.{name}": AdapterModule(
                lora.lora_A.detach().float().cpu().clone(), lora.lora_B.detach().float().cpu().clone(), lora.alpha
            )
            for name, lora in self.loras().items()
        }


def inject(model: nn.Module, config: AdapterConfig, name: str = "default", seed: int = 0) -> Handle:
    """Adds a new adapter to `model` and freezes everything else. The output of the model does not change by a bit.

    Args:
        model: any module; its base weights keep their names and identity.
        config: method, rank, targets.
        name: to tell adapters on one model apart.
        seed: of the random factor A, the same on every device.

    Raises:
        TargetError: when the targets reach nothing (see `visionlora.lora.targets.resolve`).
        ConfigError: when an adapter of that name is there. In both cases the model is left untouched.
    """
    check_name(model, name)
    resolution = resolve(model, config.target_list, config.rank)
    base_parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for hit in resolution.hits:
        adapt(hit.module, name, LoRA.new(cast(nn.Linear, hit.module), config, generator))
    layers = {hit.name: hit.module for hit in resolution.hits}
    handle = Handle(model, name, layers, InjectionReport((), (), 0, 0))
    handle.report = InjectionReport(
        tuple((hit.name, hit.target) for hit in resolution.hits),
        resolution.skipped,
        sum(p.numel() for p in handle.parameters()),
        base_parameters,
    )
    return handle


def attach(model: nn.Module, adapter: Adapter, component: str, name: str = "default") -> Handle:
    """Adds a finished adapter's factors for one component to `model`, frozen.

    Raises:
        TargetError: when a module is missing in the model or has another shape; the model is left untouched.
        ConfigError: when an adapter of that name is there.
    """
    check_name(model, name)
    available = dict(model.named_modules())
    modules = adapter.component(component)
    for path, m in modules.items():
        if path not in available or not hasattr(available[path], "weight"):
            names = [n for n, module in available.items() if hasattr(module, "weight")]
            raise TargetError(
                f"The adapter has a layer {component}.{path}, which {type(model).__name__} has not: it was "
                f"made for another base model. {nearest(path, names) if len(names) < 1000 else ''}"
            )
        wanted, given = tuple(available[path].weight.shape), (m.lora_B.shape[0], *m.lora_A.shape[1:])
        if wanted != given:
            raise TargetError(
                f"The adapter's ΔW for {component}.{path} has shape {given}, the base weight {wanted}: it was "
                "made for another base model."
            )
    layers = {}
    for path, m in modules.items():
        weight = cast(Tensor, available[path].weight)
        lora = LoRA(m.lora_A.to(weight.device), m.lora_B.to(weight.device), m.alpha)
        adapt(available[path], name, lora.requires_grad_(False))
        layers[path] = available[path]
    count = sum(m.lora_A.numel() + m.lora_B.numel() for m in modules.values())
    report = InjectionReport(tuple((path, "file") for path in modules), (), count, 0)
    return Handle(model, name, layers, report)


def check_name(model: nn.Module, name: str) -> None:
    """Raises ConfigError when some layer of `model` already carries an adapter called `name`."""
    taken = {n for m in model.modules() if isinstance(m, AdaptedLayer) for n in m.adapters}
    if name in taken:
        raise ConfigError(
            f"An adapter named {name!r} is on this model already (there: {', '.join(sorted(taken))}). "
            "Eject it first or choose another name."
        )
