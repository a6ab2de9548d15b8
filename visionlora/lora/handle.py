"""One adapter on one model: its parameters for the optimizer, its scale, merging, taking it off, writing it to a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, TargetError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.attention import give_back
from visionlora.lora.config import AdapterConfig
from visionlora.lora.guards import guard, unguard
from visionlora.lora.in_full import InFull
from visionlora.lora.layers import move_to_end, release
from visionlora.lora.lean import make_plain
from visionlora.lora.merge import (
    as_before_on_error,
    check_scale,
    check_unfused,
    check_unhooked,
    forget_fusing,
    merge_together,
    unmerge_together,
    write_weights,
)
from visionlora.lora.methods.adalora import AdaLoRA, allocate
from visionlora.lora.methods.base import Method
from visionlora.lora.targets import odd_layers


@dataclass
class Frozen:
    """What training adapters have made of a model's `requires_grad`; it hangs on the model, and is copied with it."""

    before: dict[str, bool]
    """As it was before the first, by name: another parameter may lie there since (`load_state_dict(…, assign=True)`)."""
    handles: int = 0


def freeze(model: nn.Module, base: Mapping[str, nn.Parameter], trained: Collection[str]) -> None:
    """Freezes a model for one more adapter that trains: all but what this one and others train of it in full."""
    frozen: Frozen = vars(model).setdefault("_frozen", Frozen({n: p.requires_grad for n, p in base.items()}))
    frozen.handles += 1
    for n, p in base.items():
        p.requires_grad_(n in trained or (frozen.handles > 1 and p.requires_grad))


def thaw(model: nn.Module, trained: Iterable[InFull]) -> None:
    """Undoes `freeze` for one of them; with the last everything is as it was before the first."""
    frozen: Frozen = vars(model)["_frozen"]
    frozen.handles -= 1
    for f in trained:
        f.parameter.requires_grad_(f.is_changed and f.parameter.requires_grad)
    if not frozen.handles:
        there = dict(model.named_parameters(remove_duplicate=False))
        for n, trains in vars(model).pop("_frozen").before.items():
            if n in there:
                there[n].requires_grad_(trains)


TEXT_ENCODERS = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
"""Parts of a pipeline of diffusers by the class of transformers."""


def component_of(model: nn.Module) -> str:
    """The part of a pipeline of diffusers that a model is: `unet`, `text_encoder`, `text_encoder_2`; else `model`.

    A pipeline finds its part of a file by this word, here and in diffusers.
    """
    if hasattr(model, "down_blocks") and hasattr(model, "mid_block"):
        return "unet"
    return next((TEXT_ENCODERS[c.__name__] for c in type(model).__mro__ if c.__name__ in TEXT_ENCODERS), "model")


@dataclass(frozen=True)
class InjectionReport:
    """What an adapter reached."""

    hits: tuple[tuple[str, str], ...]
    """Pairs of module name and the target that reached it."""
    skipped: tuple[tuple[str, str], ...]
    """Pairs of module name and the reason why it is not adapted."""
    trained_parameters: int
    base_parameters: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank by module name."""
    in_full: tuple[str, ...] = ()
    """Parameters of the base that train in full."""
    zero: tuple[str, ...] = ()
    """Modules of a file that change nothing: a factor of theirs is all zeros."""
    passed_by: tuple[str, ...] = ()
    """Others of PEFT's folders whose layers are not called, so that PEFT itself has no effect there before it merges."""

    def __str__(self) -> str:
        if not self.base_parameters:  # of a finished adapter
            text = f"{len(self.hits)} module{'' if len(self.hits) == 1 else 's'} used"
            text += (
                f", {len(self.skipped)} left out ({self.skipped[0][0]}: {self.skipped[0][1]})" if self.skipped else ""
            )
            text += f", {len(self.zero)} change nothing" if self.zero else ""
            if not self.passed_by:
                return text
            return f"{text}; PEFT has no effect on {len(self.passed_by)} of them ({self.passed_by[0]}) before it merges"
        share = 100 * self.trained_parameters / self.base_parameters
        text = f"{len(self.hits)} layers adapted, {self.trained_parameters:,} parameters ({share:.2f} % of the base)"
        text += f", {len(self.in_full)} of them trained in full" if self.in_full else ""
        return text + (f", {len(self.skipped)} names skipped" if self.skipped else "")


class Handle:
    """One adapter on one model."""

    def __init__(self, model: nn.Module, name: str, config: AdapterConfig | None = None) -> None:
        self.model, self.name, self.config = model, name, config
        self.methods: dict[str, Method] = {}
        """The adapter's part on each site, by the site's name."""
        self.in_full: dict[str, InFull] = {}
        """Parameters that it replaces, by name."""
        self.report = InjectionReport((), (), 0, 0)
        self._owners: tuple[tuple[nn.Module, tuple[str, ...]], ...] = ()
        self._attentions: tuple[nn.Module, ...] = ()
        """Of diffusers, where its projections are adapted: it can fuse them."""
        self._lean: list[nn.Module] = []
        self._hook: Any = None
        self.timed = False
        """Whether its effect follows the timestep that the model is called with."""
        self.packed = False
        """Whether it is on weights in few bits, into which nothing can be merged."""
        self._untied = False
        self._freezes = False
        self._guards = False

    # ----------------------------------------------------------------------------------------------------- training

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        own = [p for m in self.methods.values() for p in m.parameters() if p.requires_grad]
        return own + [f.parameter for f in self.in_full.values() if f.parameter.requires_grad]

    def parameter_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        full_lr: float | None = None,
        rate_of: Callable[[str], float] | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer. B has its own rate (LoRA+, arXiv 2402.12354); vectors are not decayed.

        Args:
            lr: of everything but B and what trains in full.
            weight_decay: of matrices.
            full_lr: of modules trained in full, such as a head; `lr` when not given.
            rate_of: from the name of a layer or parameter to a factor on its rate, for rates by depth.
        """
        ratio = self.config.effective_lr_ratio if self.config else 1.0
        factor_of = rate_of or (lambda _: 1.0)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for site, m in self.methods.items():
            for name, p in m.named_parameters():
                if p.requires_grad:
                    kind = "lora_B" if name == "lora_B" else "vectors" if p.dim() < 2 else "adapter"
                    groups.setdefault((kind, factor_of(site)), []).append(p)
        for path, f in self.in_full.items():
            if f.parameter.requires_grad:
                kind = "full_1d" if f.parameter.dim() < 2 else "full"
                groups.setdefault((kind, factor_of(path)), []).append(f.parameter)
        head = lr if full_lr is None else full_lr
        rates = {"adapter": lr, "lora_B": lr * ratio, "vectors": lr, "full": head, "full_1d": head}
        decays = {"adapter": weight_decay, "lora_B": weight_decay, "vectors": 0.0, "full": weight_decay, "full_1d": 0.0}
        return [
            {
                "name": kind if factor == 1 else f"{kind} x {factor:g}",
                "params": params,
                "lr": rates[kind] * factor,
                "weight_decay": decays[kind],
            }
            for (kind, factor), params in sorted(groups.items(), key=lambda g: (list(rates).index(g[0][0]), -g[0][1]))
        ]

    def training_state(self) -> dict[str, Tensor]:
        """What training changes, by name, for a checkpoint: parameters and what methods remember between steps."""
        found = {f"{site}|{n}": t.detach() for site, m in self.methods.items() for n, t in m.memory().items()}
        return found | {f"full|{path}": f.parameter.detach() for path, f in self.in_full.items()}

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts a checkpoint's values back, into an adapter made anew with the same settings.

        Raises:
            ConfigError: when the checkpoint is of another adapter; nothing is changed then.
        """
        own = self.training_state()
        by_site: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            site, _, name = key.rpartition("|")
            by_site.setdefault(site, {})[name] = tensor
            if key in own and own[key].shape != tensor.shape:
                raise ConfigError(
                    f"The checkpoint's {key!r} has shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}."
                )
        known = {*self.methods, *(["full"] if self.in_full else [])}
        # What a method measures step by step is not there before the first.
        needed = {f"{site}|{n}" for site, m in self.methods.items() for n, _ in m.named_parameters()}
        needed |= {f"full|{path}" for path in self.in_full}
        if needed - state.keys() or by_site.keys() - known:
            raise ConfigError("The checkpoint is of another adapter: its layers are not those of this one.")
        for site, values in by_site.items():
            if site != "full":
                self.methods[site].remember(values)
        for path, f in self.in_full.items():
            f.parameter.copy_(state[f"full|{path}"])

    def regularisation(self) -> Tensor | None:
        """A term that the loss should include; AdaLoRA alone has one (the mean of its sites, times 0.5)."""
        parts = [r for m in self.methods.values() if (r := m.regularisation()) is not None]
        return 0.5 * torch.stack(parts).mean() if parts else None

    def after_step(self, step: int, steps: int) -> None:
        """Call after the optimizer step, before the gradients are cleared; AdaLoRA prunes its ranks here.

        Args:
            step: counted from 1.
            steps: of the whole training.

        Raises:
            TargetError: on the first step, when some adapted layer got no gradient: the model never calls it.
        """
        if step == 1:
            self.check_gradients()
        adaptive = [m for m in self.methods.values() if isinstance(m, AdaLoRA)]
        if adaptive and self.config is not None:
            ranks = {m: self.config.rank_of(m.site.name) for m in adaptive}
            most = sum(m.numbers(m.site, rank, self.config, stored=True) for m, rank in ranks.items())
            allocate(adaptive, step, steps, sum(ranks.values()), most=most)

    def check_gradients(self) -> None:
        """Raises TargetError when, after a backward pass, some adapted layer has no gradient: it trains in vain."""
        dead = [
            name
            for name, m in self.methods.items()
            if m.trainable and all(p.grad is None for p in m.parameters() if p.requires_grad)
        ]
        if dead:
            raise TargetError(
                f"{len(dead)} adapted layers got no gradient, the first {dead[0]!r}: the model never calls them, or "
                "uses their weights past them. Leave them out: exclude=" + repr(tuple(dead[:3])) + "."
            )

    # ------------------------------------------------------------------------------------------------ scale and merge

    @property
    def merged(self) -> bool:
        """Whether ΔW is in the weights."""
        return any(m.merged for m in self.methods.values())

    def set_scale(self, scale: float) -> None:
        """Multiplies the adapter's effect in every layer; 0 gives the base model's output bit for bit.

        A merged adapter is merged anew from the untouched originals.

        Raises:
            ConfigError: when the scale, or a weight that is merged at it, is not finite; nothing is changed then.
        """
        check_scale(self.name, scale)
        with as_before_on_error(list(self.methods.values())):
            for m in self.methods.values():
                m.scale = float(scale)
            if self.merged:
                self._write()
        for f in self.in_full.values():
            f.set_scale(float(scale))

    def merge(self) -> None:
        """Adds ΔW to the base weights in fp32, keeping the originals; twice is the same as once.

        Raises:
            ConfigError: when a merged weight would not be finite, before any weight is changed.
        """
        merge_together([self])

    def unmerge(self) -> None:
        """Takes ΔW out again, bit for bit.

        Raises:
            ConfigError: when others have put hooks on the layers, or joined their weights; nothing is changed then.
        """
        unmerge_together([self])

    def check_free(self) -> None:
        """Raises ConfigError when others have put hooks on the layers, or have joined weights into which this is merged."""
        check_unhooked(self)
        if self.merged:
            check_unfused(self._attentions, self.name)

    def move_to_end(self) -> None:
        """Makes it the last adapter on each of its layers: the last bits of their sum depend on the order."""
        for m in self.methods.values():
            move_to_end(m.site.layer, m.key)

    def guard(self) -> None:
        """From now on the model cannot be saved, nor weights be loaded into what the adapter has changed."""
        guard(self.model, self.name)
        self._guards = True

    def _write(self) -> None:
        """Writes the weights of every layer that this adapter is on."""
        write_weights([self])

    @torch.no_grad()
    def eject(self) -> None:
        """Takes the adapter off; the model is as it was before `inject`.

        Raises:
            ConfigError: when others have put hooks on the layers, or joined their weights; nothing is changed then.
        """
        self.check_free()
        if self.merged:
            self.unmerge()
        for m in self.methods.values():
            release(m.site.layer, m.key)
        for f in self.in_full.values():
            f.take_off()
        for owner, children in self._owners:
            give_back(owner, children)
        for attention in self._attentions:
            forget_fusing(attention)
        if self._hook is not None:
            self._hook.remove()
        lean, self._lean = self._lean, []
        make_plain(lean)
        if self._guards:
            self._guards = False
            unguard(self.model, self.name)
        if self._freezes:
            self._freezes = False
            thaw(self.model, self.in_full.values())
        self.methods, self.in_full, self._owners, self._attentions = {}, {}, (), ()

    # -------------------------------------------------------------------------------------------------------- files

    def modules(self, prefix: str) -> dict[str, AdapterModule]:
        """Copies of the parameters on the CPU in fp32, named `prefix.module`, for an `Adapter`."""
        found = {f"{prefix}.{name}": m.export() for name, m in self.methods.items()}
        for name, f in self.in_full.items():
            found[f"{prefix}.{name}"] = AdapterModule("full", {"value": f.value().cpu().clone()}, 1.0)
        return found

    def adapter(self, component: str | None = None, info: Mapping[str, Any] | None = None) -> Adapter:
        """The adapter as it is now, in memory; see `save`."""
        component = component_of(self.model) if component is None else component
        said: dict[str, Any] = {}
        if self.config is not None:
            said |= {"method": self.config.method, "config": self.config.to_dict()}
        if odd := odd_layers(self.model, [m.site for m in self.methods.values()]):
            said["odd_layers"] = odd
        return Adapter(self.modules(component), {**said, **(info or {})})

    def save(self, path: str | Path, component: str | None = None, info: Mapping[str, Any] | None = None) -> None:
        """Writes the adapter to a file of our own format, atomically.

        Args:
            path: of the file.
            component: the part of a pipeline that the model is, before the names in the file; see `component_of` where it is
                not given.
            info: more for the header.
        """
        # The loaders lie above this room, so they are looked up when they are called for.
        import_module("visionlora.loaders").save_adapter(self.adapter(component, info), path)
