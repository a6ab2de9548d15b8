"""What every layer that carries adapters has: which of them are to be run, and what of theirs is kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.lora.guards import check_loading
from visionlora.lora.methods.base import Method, last_switch, mark
from visionlora.lora.together import Batch, Stack, build_batch, build_stack


class AdaptedLayer(nn.Module):
    """Mixed into the class of an adapted layer. Adapters with scale 0 are not run: the output is the base's own."""

    by_picture: ClassVar[bool] = False
    """Whether pictures of a batch may have scales of their own."""

    adapters: nn.ModuleDict
    originals: dict[str, Tensor]
    """The untouched weight and bias while some adapter is merged."""
    _kept: dict[Any, tuple[list[Any], Any, list[Any]]]
    """What was built, after the state that it was built of and before the tensors that are meant there."""
    _written: tuple[list[Any], list[Tensor]] | None
    """The state in which the weights were written, and the tensors that are meant there; None where they are to be written."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What torch calls to move and cast a module: the originals go along."""
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.originals = {n: fn(t) for n, t in self.originals.items()}
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """What torch calls to load values: here of this layer alone, or through no model that is guarded."""
        check_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def methods(self) -> Iterator[Method]:
        """Every adapter's part on this layer."""
        return (cast(Method, m) for m in self.adapters.values())

    def active(self) -> list[Method]:
        """The parts that are to be run beside the weight; looked for again only after some adapter was switched."""
        compiling = torch.compiler.is_compiling()
        now = None if compiling else last_switch()  # compiled code would be traced again for it
        mine = self._modules["adapters"]  # other than that of the layer that this one is a replica of
        if not compiling and (known := self.__dict__.get("_active")) and known[0] is now and known[1] is mine:
            return cast("list[Method]", known[2])
        found, everywhere = [], True
        for m in self.methods():
            if m.merged:
                continue
            if m.sample_scale is not None:
                self.check_inference(m)
                everywhere = False
            if compiling or m.scale != 0:
                found.append(m)
        if not compiling and everywhere:
            self.__dict__["_active"] = (now, mine, found)
        return found

    def beside(self, active: list[Method]) -> tuple[list[Method], Mapping[str, Tensor]]:
        """What is to be run beside the weights, and parameters in place of those that it is run beside.

        What multiplies the base's output must not multiply the ΔW of others. Where these are merged they are run too, and the
        parameters are the untouched ones.
        """
        if not self.originals or all(m.additive for m in active):
            return active, {}
        return [m for m in self.methods() if m in active or (m.merged and m.scale)], self.originals

    def check_inference(self, method: Method) -> None:
        """Raises ConfigError where scales per picture have no path: with gradients, compiled, or read by another layer."""
        why = ""
        if torch.compiler.is_compiling():
            why = "compiled code"
        elif torch.is_grad_enabled():
            why = "training"
        elif not self.by_picture:
            why = "packed attention"
        if why:
            raise ConfigError(
                f"Adapter {method.adapter_name!r} has scales per picture, which do not go with {why}: "
                + ("run under torch.no_grad()." if why == "training" else "give it one scale for the batch.")
            )

    def guarded(self, out: Tensor) -> Tensor:
        """`out`; where merged adapters are in training mode, with an error for whoever runs backward through it."""
        if torch.is_grad_enabled() and self.training and not torch.compiler.is_compiling():
            for m in self.methods():
                if m.merged and m.trainable:
                    first = next(p for p in m.parameters() if p.requires_grad)
                    guarded: Tensor = MergedTraining.apply(out, first, m.adapter_name, m.site.name)
                    return guarded
        return out

    def masked(self, active: list[Method]) -> bool:
        """Whether pictures of the batch differ in the components that act.

        Raises:
            ConfigError: when they also have scales of their own.
        """
        found = any(m.row_mask is not None for m in active)
        if found and any(m.sample_scale is not None for m in active):
            raise ConfigError("Scales per picture do not go with T-LoRA at a timestep per picture: give one timestep.")
        return found

    def wants_graph(self, x: Tensor, active: list[Method]) -> bool:
        """Whether a gradient will be asked of this layer, or inputs are left out at random, as when it trains.

        The latter without gradients too: the first pass of `torch.utils.checkpoint` must see what its second will.
        """
        if torch.is_grad_enabled() and (x.requires_grad or any(m.trainable for m in active) or self.base_trains()):
            return True
        return self.training and any(m.dropout for m in active)

    def base_trains(self) -> bool:
        """Whether a gradient will be asked for the layer's own weight or bias."""
        return any(p is not None and p.requires_grad for p in self._parameters.values())

    def stack(self, dtype: torch.dtype, active: list[Method]) -> Stack:
        """The active adapters concatenated; kept until a scale or a factor changes."""
        stack: Stack = self.kept(dtype, active, lambda: build_stack(cast(Any, self).weight, dtype, active))
        return stack

    def batch(self, dtype: torch.dtype, active: list[Method]) -> Batch | None:
        """The active adapters picture by picture; None when no picture has scales of its own.

        Raises:
            ConfigError: when the adapters have scales for different numbers of pictures.
        """
        if all(m.sample_scale is None for m in active):
            return None
        sizes = {len(m.sample_scale) for m in active if m.sample_scale is not None and len(m.sample_scale) > 1} or {1}
        if len(sizes) > 1:
            raise ConfigError(
                f"Adapters have scales for {' and '.join(map(str, sorted(sizes)))} pictures: give all the same."
            )
        (pictures,) = sizes
        weight = cast(Any, self).weight
        found: Batch = self.kept(("batch", dtype), active, lambda: build_batch(weight, dtype, active, pictures))
        return found

    def kept(self, what: Any, active: list[Method], build: Callable[[], Any], base: Sequence[Tensor] = ()) -> Any:
        """What `build` gives, from before while the active adapters are the same, and the tensors of the base it reads.

        Those in training are not kept: writes through `.data`, which much training code does, leave no trace.
        """
        state: list[Any] = [mark(t) for t in base]
        for m in active:
            if m.trainable:
                return build()
            state += m.state()
        found = self._kept.get(what)
        if found is None or found[0] != state:
            for m in active:
                if any(t.is_meta for t in m.parameters()):
                    raise ConfigError(
                        f"The factors of adapter {m.adapter_name!r} are not in memory, as after offloading by layers: merge "
                        "it before (mode='merged'), or offload whole models (pipe.enable_model_cpu_offload())."
                    )
            # They are held, so that no other tensor can lie where one of them did, and pass for it.
            tensors: list[Any] = [*base, *(t for m in active for t in (*m.parameters(), *m.buffers()))]
            tensors += [] if all(m.additive for m in active) else self._parameters.values()
            found = self._kept[what] = (state, build(), tensors)
        return found[1]


def modules_of_base(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, without those of adapters: the time does not grow with how many are on the model."""
    seen: set[int] = set()
    left = [("", model)]
    while left:
        name, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        inner = [(n, m) for n, m in module._modules.items() if m is not None]
        if isinstance(module, AdaptedLayer):
            inner = [(n, m) for n, m in inner if n != "adapters"]
        left += [(f"{name}.{n}" if name else n, m) for n, m in reversed(inner)]


class MergedTraining(torch.autograd.Function):
    """The identity; backward is refused, as the gradient would not reach the merged adapter."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, parameter: Tensor, adapter: str, layer: str) -> Tensor:  # noqa: D102
        ctx.names = adapter, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # noqa: D102
        adapter, layer = ctx.names
        raise ConfigError(
            f"Adapter {adapter!r} is merged into {layer!r}, so training it would change nothing: call unmerge() first."
        )
