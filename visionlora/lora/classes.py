"""Subclasses made on the fly: a module stays the object that it is, with its names and values, and computes otherwise."""

from __future__ import annotations

from typing import Any

from torch import nn

OWN_ROOM = __name__.rpartition(".")[0]
TORCHS_ROOM = "torch.nn."

ADAPTED_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


class OnTheFly(type):
    """Of such subclasses: PEFT makes the factors of a convolution with the class of the layer, and means the plain one."""

    base_class: type[nn.Module]

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """A new layer."""
        return cls.base_class(*args, **kwargs)


def adapted_class(base: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` with `mixin`; one per pair, so that compiled code is shared."""
    if (base, mixin) not in ADAPTED_CLASSES:
        body = {"__module__": base.__module__, "base_class": base, "__reduce_ex__": _reduce}
        kind: Any = OnTheFly if type(base) in (type, OnTheFly) else type(base)
        ADAPTED_CLASSES[base, mixin] = kind(f"{mixin.__name__}{base.__name__}", (mixin, base), body)
    return ADAPTED_CLASSES[base, mixin]


def _reduce(self: Any, protocol: int) -> Any:
    """Pickles a module as the class that can be imported and what was mixed in, the innermost first."""
    cls: type[nn.Module] = type(self)
    mixins: list[type[nn.Module]] = []
    while "base_class" in vars(cls):
        mixins.insert(0, cls.__mro__[1])
        cls = cls.base_class  # type: ignore[attr-defined]
    return _rebuild, (cls, *mixins), self.__dict__


def _rebuild(cls: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    for mixin in mixins:
        cls = adapted_class(cls, mixin)
    return cls.__new__(cls)


def is_hooked(module: nn.Module) -> bool:
    """Whether others have put a `forward` on this instance; it may call what the module's class was then."""
    found = vars(module).get("forward")
    return found is not None and not (
        getattr(found, "__self__", None) is module and getattr(found, "__func__", None) is type(module).forward
    )


def unmask(module: nn.Module) -> None:
    """Lets an instance follow its class again: accelerate leaves the class's own `forward` on what it was taken off."""
    if not is_hooked(module):
        vars(module).pop("forward", None)


def forward_of_its_own(module: nn.Module) -> str:
    """What keeps other code from computing this layer's output as torch's class does; empty where nothing does.

    Subclasses may pad, standardise weights or unpack them; an instance may have a `forward` put on it, as accelerate and
    diffusers do for models that do not fit the GPU.
    """
    if is_hooked(module):
        return "has a forward put on it, as offloading by layers does: take it off first, or offload whole models"
    for name in ("forward", "_conv_forward"):
        cls = next((c for c in type(module).__mro__ if name in vars(c) and not c.__module__.startswith(OWN_ROOM)), None)
        if cls is not None and not cls.__module__.startswith(TORCHS_ROOM):
            return f"is a {cls.__name__}, which does not compute as torch's layers do"
    return ""
