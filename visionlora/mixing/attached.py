"""What is on a model: adapters by name, with the handles of their layers and the words that they bring."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from visionlora.errors import ConfigError
from visionlora.lora.adapted import AdaptedLayer, modules_of_base
from visionlora.lora.adapter import Adapter
from visionlora.lora.classes import is_hooked
from visionlora.lora.guards import adapters_on, allow_saving, refuse_saving, uncompiled
from visionlora.lora.handle import Handle
from visionlora.lora.inject import IN_PLACE, check_bare, inner_names
from visionlora.lora.inject import attach as attach_one
from visionlora.lora.merge import merge_together, reads_fused, unmerge_together
from visionlora.lora.names import resolve_names
from visionlora.mixing.holder import hold, is_copy, let_go, mix_on
from visionlora.mixing.parts import parts_of, places
from visionlora.mixing.words import Words

if TYPE_CHECKING:
    from visionlora.mixing.mix import Mix


class Attached:
    """The adapters that a mix has put on its target; their scales are the mix's."""

    def __init__(self, target: Any, allow_partial: bool) -> None:
        """Nothing is attached yet.

        Args:
            target: a pipeline of diffusers, or any module.
            allow_partial: leave out modules that do not fit.

        Raises:
            ConfigError: when the target is neither.
        """
        self.target, self.allow_partial = target, allow_partial
        self.mix: Mix | None = None
        """Whose they are, while there are any: in a circle the two, and the target, would wait for the garbage collector."""
        self.parts = parts_of(target)
        self.words = Words(target, allow_partial)
        self.handles: dict[str, list[tuple[str, Handle]]] = {}
        """Name -> pairs of component and handle."""
        self._called: dict[str, tuple[Adapter, str]] = {}
        """What is attached, by name, and what it is called on the layers."""
        self._in_file: dict[tuple[str, str, str], str] = {}
        """How files spell the layers that they spell otherwise, by name, component and layer."""

    @property
    def all_handles(self) -> list[Handle]:
        """Of every adapter and component, in order."""
        return [handle for pairs in self.handles.values() for _, handle in pairs]

    @property
    def packed(self) -> bool:
        """Whether adapters are on weights in few bits, into which nothing can be merged."""
        return any(h.packed for h in self.all_handles)

    @property
    def timed(self) -> bool:
        """Whether one follows the timestep by itself."""
        return any(h.timed for h in self.all_handles)

    def layers(self, name: str) -> list[tuple[str, str]]:
        """(component, layer) of everything that an adapter changes."""
        return [(c, layer) for c, h in self.handles[name] for layer in (*h.methods, *h.in_full)]

    def in_file(self, name: str, component: str, layer: str) -> str:
        """The layer as the adapter's file spells it."""
        return self._in_file.get((name, component, layer), layer)

    def check_changeable(self) -> None:
        """Raises ConfigError when a change would act on another part than that which is drawn with, or others hold layers."""
        self.check_there()
        self.check_free()

    def check_there(self) -> None:
        """Raises ConfigError when the pipeline draws with another part than that which has the adapters."""
        for name, part in self.parts.items():
            now = getattr(self.target, name) if name else part
            if now is part or not isinstance(now, nn.Module):  # text encoders are let go once prompts are encoded
                continue
            if all(m is not uncompiled(part) for m in now.modules()):
                raise ConfigError(
                    f"The {name} of this {type(self.target).__name__} is no longer the one that these adapters are on: take "
                    "them off (mix.detach()) and attach them to the pipeline as it is now."
                )

    def check_free(self) -> None:
        """Raises ConfigError when others hold layers that are to be changed, so that nothing is half changed."""
        # Each layer is looked at once, however many adapters are on it.
        there = (m for part in self.parts.values() for _, m in modules_of_base(part))
        if any(reads_fused(m) or (isinstance(m, AdaptedLayer) and is_hooked(m)) for m in there):
            for handle in self.all_handles:
                handle.check_free()

    def check_bare(self) -> None:
        """Raises TargetError when what is taken off could not be put on again, as others have adapters around the layers."""
        for part in self.parts.values():
            if self.mix is not None and mix_on(part) is self.mix:
                check_bare(part)

    def clear(self) -> None:
        """Takes everything off."""
        self.unmerge()
        for handle in self.all_handles:
            handle.eject()
        self.words.remove()
        for part in self.parts.values():
            if self.mix is not None and mix_on(part) is self.mix:
                let_go(part)
        allow_saving(self.target)
        self.handles, self._in_file, self._called = {}, {}, {}

    def put(self, wanted: Mapping[str, Adapter], given: Mapping[str, Adapter]) -> None:
        """Attaches what is wanted, in order, to a target that has nothing on it.

        Args:
            wanted: the adapters by name.
            given: those whose words are brought, as they were before they were composed.

        Raises:
            ConfigError: for a model that is another mix's, or a copy of one, and for words that are taken.
        """
        for part in self.parts.values():
            if is_copy(part) and (names := adapters_on(part)):
                raise ConfigError(
                    f"This {type(part).__name__} is a copy that was made while adapters were on the original "
                    f"({', '.join(names)}); they are on it for good, and would act beside these: copy it after mix.detach()."
                )
        self.words.add(given)
        for encoder in self.words.encoders:
            self._take(encoder)
        inner = inner_names(wanted)
        for name, adapter in wanted.items():
            self._attach(name, adapter, inner[name])

    def exchange(self, wanted: Mapping[str, Adapter], given: Mapping[str, Adapter]) -> list[str] | None:
        """Attaches what is wanted where what is there already may stay on, in the weights too.

        Returns:
            The names that are new; None when all must be put on anew, and nothing was done.
        """
        inner = inner_names(wanted)
        stays = [n for n, (a, called) in self._called.items() if wanted.get(n) is a and inner[n] == called]
        fresh = [n for n in wanted if n not in stays]
        words = self.words.encoders or any(a.embeddings for a in given.values())
        layered = any(h.in_full for h in self.all_handles)
        layered = layered or any(m.kind in IN_PLACE for n in fresh for m in wanted[n].modules.values())
        if not stays or [n for n in wanted if n in stays] != stays or words or layered:
            return None
        if fresh:
            self.check_bare()
        for name in [n for n in self._called if n not in stays]:
            self._take_off(name)
        for name in fresh:
            self._attach(name, wanted[name], inner[name])
        # The last bits of a sum depend on the order on the layers.
        self.handles = {n: self.handles[n] for n in wanted}
        self._called = {n: self._called[n] for n in wanted}
        behind = list(wanted)[list(wanted).index(fresh[0]) :] if fresh else []
        for name in behind if behind != fresh else ():
            for _, handle in self.handles[name]:
                handle.move_to_end()
        return fresh

    def merge(self, changed: Collection[Handle]) -> None:
        """Writes adapters into the weights, where they are not in them or have changed; layers then run as the base's own."""
        merge_together([h for h in self.all_handles if h in changed or not h.merged])

    def unmerge(self) -> None:
        """Gives the weights back."""
        unmerge_together([h for h in self.all_handles if h.merged])

    def _take_off(self, name: str) -> None:
        """Takes one adapter off; the others stay as they are."""
        for _, handle in self.handles[name]:
            handle.eject()
        gone = {component for component, _ in self.handles.pop(name)}
        del self._called[name]
        self._in_file = {at: given for at, given in self._in_file.items() if at[0] != name}
        for component in gone - {c for pairs in self.handles.values() for c, _ in pairs}:
            if component in self.parts:
                let_go(self.parts[component])

    def _attach(self, name: str, adapter: Adapter, inner: str) -> None:
        """Puts one adapter on the parts that it is for, without a scale yet."""
        pairs: list[tuple[str, Handle]] = []
        self.handles[name] = pairs
        for component, part in places(adapter, self.parts, self.target, self.allow_partial).items():
            self._take(part)
            handle = attach_one(part, adapter, component, inner, self.allow_partial)
            pairs.append((component, handle))
            if strange := [n for n in adapter.component(component) if n not in handle.methods]:
                spelled = resolve_names(strange, list(handle.methods))
                self._in_file |= {(name, component, layer): given for given, layer in spelled.items()}
        self._called[name] = adapter, inner

    def _take(self, part: nn.Module) -> None:
        """Marks a model as this mix's.

        Raises:
            ConfigError: when it is another's, whose adapters would act too.
        """
        there = mix_on(part)
        if there is not None and there is not self.mix:
            raise ConfigError(
                f"Adapters of an earlier vl.attach are on this {type(part).__name__} ({', '.join(there.members)}): add to that "
                "mix (mix.add), or take it off first (mix.detach(), or vl.detach(…) of the pipeline or model)."
            )
        assert self.mix is not None
        hold(part, self.mix)
        refuse_saving(self.target)
