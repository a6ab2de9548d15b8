"""Puts adapters on a model and takes them off again: nothing is renamed and the base comes back bit for bit.

handle = inject(unet, AdapterConfig(rank=8, targets="attn"))
optimizer = AdamW(handle.parameter_groups(1e-4))
handle.merge(); handle.unmerge(); handle.eject()
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora import plugins
from visionlora.errors import AdapterFileError, ConfigError, TargetError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.attention import AdaptedAttention, give_back, take_over
from visionlora.lora.config import PLUGIN_GROUPS, AdapterConfig
from visionlora.lora.functional import wide
from visionlora.lora.layers import AdaptedLayer, adapt, release
from visionlora.lora.lean import Lean, make_lean, make_plain, unlean
from visionlora.lora.merge import write_weights
from visionlora.lora.methods import KINDS, METHODS
from visionlora.lora.methods.adalora import AdaLoRA, allocate
from visionlora.lora.methods.base import Method, Site
from visionlora.lora.methods.tlora import check_timed, follow_timestep
from visionlora.lora.names import resolve_names
from visionlora.lora.packed import packed_layers
from visionlora.lora.targets import check_ranks, ends_on_boundary, owners_of, resolve, site_at

IN_PLACE = ("full", "shift")
"""Kinds that change a parameter of the base in place."""


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

    def __str__(self) -> str:
        if not self.base_parameters:  # of a finished adapter
            text = f"{len(self.hits)} modules used"
            text += (
                f", {len(self.skipped)} left out ({self.skipped[0][0]}: {self.skipped[0][1]})" if self.skipped else ""
            )
            return text + (f", {len(self.zero)} change nothing" if self.zero else "")
        share = 100 * self.trained_parameters / self.base_parameters
        text = f"{len(self.hits)} layers adapted, {self.trained_parameters:,} parameters ({share:.2f} % of the base)"
        text += f", {len(self.in_full)} of them trained in full" if self.in_full else ""
        return text + (f", {len(self.skipped)} names skipped" if self.skipped else "")


@dataclass
class InFull:
    """A parameter of the base that an adapter replaces."""

    parameter: nn.Parameter
    original: Tensor
    """As it was before."""
    trained: Tensor | None = None
    """The adapter's value while the scale is not 1."""

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """original + scale · (trained - original); 1 and 0 are exact."""
        if self.trained is None:
            self.trained = self.parameter.detach().clone()
        if scale == 1:
            self.parameter.copy_(self.trained)
            self.trained = None
        else:
            self.parameter.copy_(torch.lerp(self.original, self.trained, scale) if scale else self.original)

    def value(self) -> Tensor:
        """The adapter's value."""
        return (self.parameter if self.trained is None else self.trained).detach()


class Handle:
    """One adapter on one model."""

    def __init__(self, model: nn.Module, name: str, config: AdapterConfig | None = None) -> None:
        self.model, self.name, self.config = model, name, config
        self.methods: dict[str, Method] = {}
        """The adapter's part on each site, by the site's name."""
        self.in_full: dict[str, InFull] = {}
        """Parameters that it replaces, by name."""
        self.report = InjectionReport((), (), 0, 0)
        self._owners: tuple[nn.Module, ...] = ()
        self._lean: list[nn.Module] = []
        self._hook: Any = None
        self._trained_before: list[nn.Parameter] = []

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
        if own.keys() - state.keys() or by_site.keys() - known:
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
            allocate(adaptive, step, steps, sum(self.config.rank_of(m.site.name) for m in adaptive))

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
            ConfigError: when the scale is not finite.
        """
        if not math.isfinite(scale):
            raise ConfigError(f"The scale of adapter {self.name!r} is {scale!r}; it must be a finite number.")
        for m in self.methods.values():
            m.scale = float(scale)
        for f in self.in_full.values():
            f.set_scale(float(scale))
        if self.merged:
            self._write()

    def merge(self) -> None:
        """Adds ΔW to the base weights in fp32, keeping the originals; twice is the same as once.

        Raises:
            ConfigError: when a merged weight would not be finite, before any weight is changed.
        """
        pending = [m for m in self.methods.values() if not m.merged]
        for m in pending:
            m.merged = True
        try:
            self._write()
        except ConfigError:
            for m in pending:
                m.merged = False
            raise

    def unmerge(self) -> None:
        """Takes ΔW out again, bit for bit."""
        for m in self.methods.values():
            m.merged = False
        self._write()

    def _write(self) -> None:
        """Writes the weights of every layer that this adapter is on."""
        write_weights([self])

    @torch.no_grad()
    def eject(self) -> None:
        """Takes the adapter off; the model is as it was before `inject`."""
        if self.merged:
            self.unmerge()
        for m in self.methods.values():
            release(m.site.layer, m.key)
        for f in self.in_full.values():
            f.parameter.copy_(f.original)
        for owner in self._owners:
            give_back(owner)
        if self._hook is not None:
            self._hook.remove()
        make_plain(self._lean)
        if not any(isinstance(m, AdaptedLayer) for m in self.model.modules()):
            for p in self.model.parameters():
                p.requires_grad_(False)
            for p in self._trained_before:
                p.requires_grad_(True)
        self.methods, self.in_full, self._owners, self._lean = {}, {}, (), []

    # -------------------------------------------------------------------------------------------------------- files

    def modules(self, prefix: str) -> dict[str, AdapterModule]:
        """Copies of the parameters on the CPU in fp32, named `prefix.module`, for an `Adapter`."""
        found = {f"{prefix}.{name}": m.export() for name, m in self.methods.items()}
        for name, f in self.in_full.items():
            found[f"{prefix}.{name}"] = AdapterModule("full", {"value": f.value().cpu().clone()}, 1.0)
        return found

    def adapter(self, component: str = "model", info: Mapping[str, Any] | None = None) -> Adapter:
        """The adapter as it is now, in memory."""
        config = {} if self.config is None else {"method": self.config.method, "config": self.config.to_dict()}
        return Adapter(self.modules(component), {**config, **(info or {})})

    def save(self, path: str | Path, component: str = "model", info: Mapping[str, Any] | None = None) -> None:
        """Writes the adapter to a file of our own format, atomically.

        Args:
            path: of the file.
            component: the part of a pipeline that the model is (`unet`, `text_encoder`), before the names in the file.
            info: more for the header.
        """
        # The loaders lie above this room, so they are looked up when they are called for.
        import_module("visionlora.loaders").save_adapter(self.adapter(component, info), path)


def method_class(name: str) -> type[Method]:
    """The class of a method, ours or a plug-in's.

    Raises:
        ConfigError: when a plug-in's method cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    found = plugins.load(PLUGIN_GROUPS["method"], name)
    if found is None:
        raise ConfigError(f"Method {name!r} comes from a plug-in that cannot be imported; see `visionlora plugins`.")
    return cast("type[Method]", found)


def inject(model: nn.Module, config: AdapterConfig, name: str = "default", seed: int = 0) -> Handle:
    """Adds a new adapter to `model` and freezes everything else. The output of the model does not change by a bit.

    Args:
        model: any module; its base weights keep their names and identity.
        config: method, rank, targets.
        name: to tell adapters on one model apart.
        seed: of the random factor A, the same on every device.

    Raises:
        TargetError: when the targets reach nothing (see `visionlora.lora.targets.resolve`).
        ConfigError: when an adapter of that name is there, or all is to train and weights are packed. In all cases the
            model is left untouched.
    """
    check_name((m for m in model.modules() if isinstance(m, AdaptedLayer)), name)
    if config.method == "full" and packed_layers(model):
        raise ConfigError("Method 'full' trains every weight, but those of this model are packed in few bits.")
    handle = Handle(model, name, config)
    base = base_parameters(model)
    replaced = select_in_full(model, config, base)
    methods: list[Method] = []
    skipped: tuple[tuple[str, str], ...] = ()
    if config.method not in ("full", "linear-probe"):
        resolution = resolve(model, config)
        cls, generator = method_class(config.method), torch.Generator().manual_seed(seed)
        if cls.bounded_rank:
            check_ranks(config, resolution.sites)
        methods = [cls.new(site, config, generator) for site in resolution.sites]
        skipped = resolution.skipped
    _place(handle, methods, name)
    handle._trained_before = [p for p in base.values() if p.requires_grad]
    for n, parameter in base.items():
        parameter.requires_grad_(n in replaced)
        if n in replaced:
            handle.in_full[n] = InFull(parameter, parameter.detach().clone())
    if config.save_memory and methods:
        handle._lean = make_lean(model)
    handle.report = InjectionReport(
        tuple((m.site.name, m.site.target) for m in methods),
        skipped,
        sum(p.numel() for p in handle.parameters()),
        sum(p.numel() for p in base.values()) + sum(layer.numbers for layer in packed_layers(model)),
        {m.site.name: len(p) for m in methods if (p := getattr(m, "lora_A", None)) is not None},
        tuple(handle.in_full),
    )
    return handle


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Hundreds of small modules are made at once; looking for garbage among a whole model's objects takes far longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_garbage_collection()
def attach(
    model: nn.Module, adapter: Adapter, component: str = "", name: str = "default", allow_partial: bool = False
) -> Handle:
    """Adds a finished adapter's factors for one component to `model`, frozen.

    Layers are found under the names of the file, or in another spelling of theirs (`visionlora.lora.names`).

    Args:
        model: the base model.
        adapter: from a file or a handle.
        component: which of the adapter's parts; the only one when empty.
        name: to tell adapters on one model apart.
        allow_partial: leave out modules that do not fit; `handle.report.skipped` lists them with the reason.

    Raises:
        TargetError: when a module is missing in the model or has another shape; the model is left untouched.
        ConfigError: when an adapter of that name is there.
    """
    check_name((), name)
    if not component:
        if len(adapter.components) != 1:
            raise ConfigError(f"The adapter has parts for {', '.join(adapter.components)}: say which to attach.")
        (component,) = adapter.components
    handle, modules = Handle(model, name), adapter.component(component)
    methods, replaced, skipped = fit(model, modules, component)
    if skipped and (not allow_partial or len(skipped) == len(modules)):
        raise misfits(model, component, skipped, len(modules))
    _place(handle, methods, name)
    with torch.no_grad():
        for parameter, path, m in replaced:
            handle.in_full[path] = InFull(parameter, parameter.detach().clone())
            parameter.copy_(m.tensors["value"] if m.kind == "full" else wide(parameter) + wide(m.tensors["shift"]))
    left_out = {path for path, _ in skipped}
    used = {path: m for path, m in modules.items() if path not in left_out}
    count = sum(t.numel() for m in used.values() for t in m.tensors.values())
    handle.report = InjectionReport(
        tuple((path, "file") for path in used),
        tuple(skipped),
        count,
        0,
        {path: m.rank for path, m in used.items() if m.rank},
        tuple(path for _, path, _ in replaced),
        tuple(path for path, m in used.items() if m.is_zero()),
    )
    return handle


def fit(
    model: nn.Module, modules: Mapping[str, AdapterModule], component: str
) -> tuple[list[Method], list[tuple[nn.Parameter, str, AdapterModule]], list[tuple[str, str]]]:
    """Matches an adapter's modules with a model's layers, without touching the model.

    Returns:
        The methods to place; (parameter, name, module) for what is changed in place; (name, reason) for what does not fit.

    Raises:
        AdapterFileError: for a kind of module that is unknown here.
    """
    base = base_parameters(model) if any(m.kind in IN_PLACE for m in modules.values()) else {}
    known = {n for n, _ in model.named_modules()}
    strange = [n for n in modules if n not in known and n.rpartition(".")[0] not in known]
    spelled = resolve_names(strange, [*known, *base]) if strange else {}
    methods, replaced, skipped = [], [], []
    for given, m in modules.items():
        path = spelled.get(given, given)
        try:
            if m.kind in IN_PLACE:
                replaced.append((fitting_parameter(base, path, m, component, model), path, m))
                continue
            if m.kind not in KINDS:
                raise AdapterFileError(f"The adapter's layer {component}.{path} is of kind {m.kind!r}, unknown here.")
            site = site_at(model, path)
            shaped = m.fitted(site.weight.shape)
            check_shape(site, shaped, f"{component}.{given}")
            methods.append(KINDS[m.kind].load(site, shaped))
        except TargetError as e:
            skipped.append((given, str(e)))
    return methods, replaced, skipped


def misfits(model: nn.Module, component: str, skipped: Sequence[tuple[str, str]], total: int) -> TargetError:
    """What an adapter gets that does not fit a model, or not all of it."""
    path, why = skipped[0]
    kind = type(model).__name__
    if why.startswith(f"{kind} has no layer"):
        why = f"The adapter has a layer {component}.{path}, which {kind} has not. {why.partition('. ')[2]}".rstrip()
    if len(skipped) > 1:
        more = ", ".join(n for n, _ in skipped[1:4]) + (" …" if len(skipped) > 4 else "")
        why += f" So it is with {len(skipped)} of its {total} modules ({more})."
    hint = "" if len(skipped) == total else " Nothing was loaded; allow_partial=True (--allow-partial) takes what fits."
    return TargetError(f"{why} It was made for another base model.{hint}")


def _place(handle: Handle, methods: Sequence[Method], name: str) -> None:
    """Puts methods on their layers."""
    check_name((m.site.layer for m in methods), name)
    timed = any(m.timed for m in methods)
    if timed:
        check_timed(handle.model)
    owners = owners_of(handle.model, [m.site for m in methods])
    for m in methods:
        if isinstance(m.site.layer, Lean):
            unlean(m.site.layer)
    for m in methods:
        m.adapter_name = name
        adapt(m.site.layer, m, AdaptedAttention if isinstance(m.site.layer, nn.MultiheadAttention) else None)
    for owner, children in owners:
        take_over(owner, children)
    if timed:
        handle._hook = handle.model.register_forward_pre_hook(follow_timestep, with_kwargs=True)
    handle.methods, handle._owners = {m.site.name: m for m in methods}, tuple(owner for owner, _ in owners)


def check_targets(model: nn.Module, config: AdapterConfig) -> None:
    """Raises what `inject` would raise for the targets and ranks, without touching the model."""
    select_in_full(model, config, base_parameters(model))
    if config.method not in ("full", "linear-probe"):
        sites = resolve(model, config).sites
        if method_class(config.method).timed:
            check_timed(model)
        if method_class(config.method).bounded_rank:
            check_ranks(config, sites)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base, by name, without any adapter's."""
    adapters = {id(p) for m in model.modules() if isinstance(m, AdaptedLayer) for p in m.adapters.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in adapters}


def select_in_full(model: nn.Module, config: AdapterConfig, base: Iterable[str]) -> set[str]:
    """The parameters that train in full.

    Raises:
        TargetError: when a name in `train` reaches none.
    """
    if config.method == "full":
        return set(base)
    found = set()
    for word in config.train_list:
        paths = [n for n, _ in model.named_modules() if n and ends_on_boundary(n, word)]
        reached = {p for p in base if p == word or any(p.startswith(path + ".") for path in paths)}
        if not reached:
            from visionlora.errors import nearest

            names = {n.split(".", 1)[0] for n in base} | {n.rpartition(".")[0] for n in base}
            raise TargetError(
                f"train names {word!r}, which is no module of {type(model).__name__}. {nearest(word, names)}"
            )
        found |= reached
    return found


def check_shape(site: Site, module: AdapterModule, name: str) -> None:
    """Raises TargetError when an adapter's module does not fit the base weight."""
    wanted = tuple(site.weight.shape)
    given = module.shape()
    if given is None and (flat := module.flat_shape()) is not None:
        given = wanted if flat == (wanted[0], math.prod(wanted[1:])) else flat
    if given is None and module.kind == "oft":
        blocks = module.tensors["oft_blocks"].shape
        given = (blocks[-3] * blocks[-1], *wanted[1:])
    if given is None and module.kind == "vera":
        given = (len(module.tensors["lambda_b"]), *wanted[1:])
    if given is None and module.kind == "ia3":
        width = site.inputs if module.options.get("on_input") else wanted[0]
        given = wanted if module.tensors["vector"].numel() == width else (module.tensors["vector"].numel(),)
    if wanted != given:
        raise TargetError(f"The adapter's ΔW for {name} has shape {given}, the base weight {wanted}.")


def fitting_parameter(
    base: Mapping[str, nn.Parameter], path: str, module: AdapterModule, component: str, model: nn.Module
) -> nn.Parameter:
    """The base parameter that a module of kind `full` or `shift` changes in place.

    Raises:
        TargetError: when there is none of this name and shape.
    """
    (value,) = module.tensors.values()
    if path not in base:
        raise TargetError(f"The adapter changes {component}.{path}, which {type(model).__name__} has not.")
    if base[path].shape != value.shape:
        raise TargetError(
            f"The adapter's {component}.{path} has shape {tuple(value.shape)}, the base's {tuple(base[path].shape)}."
        )
    return base[path]


def check_name(layers: Iterable[nn.Module], name: str) -> None:
    """Raises ConfigError when `name` cannot name an adapter, or one of these layers already carries one of it."""
    if not name or "." in name or ":" in name or hasattr(nn.ModuleDict, name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: use a word without dots and colons that is no method of a module."
        )
    for layer in layers:
        if isinstance(layer, AdaptedLayer):
            taken = {m.adapter_name for m in layer.methods()}
            if name in taken:
                raise ConfigError(
                    f"An adapter named {name!r} is on this model already (there: {', '.join(sorted(taken))}). "
                    "Eject it first or choose another name."
                )
