"""Any number of adapters on one model, each with its own scale, exact in every mode.

    mix = attach(pipe, {"dog": "dog.safetensors", "ink": "ink.safetensors"}, scales={"dog": 1.0, "ink": 0.6})
    mix.set_scales({"ink": Scale(0.8, blocks={"up": 1.2}, steps=Window(0.5, 1.0))})
    mix.detach()

Three ways to run, one result (`mode`):
    merged    ΔW of all adapters in the weights, written anew from the untouched originals when scales change; costs nothing
              per step
    stacked   factors of all active adapters side by side: one pair of small matmuls per layer, scales may change at any step
    batched   each picture of a batch with its own adapters and scales
`auto` takes merged, stacked when scales or the composition change from step to step or weights are packed in few bits,
batched when pictures have scales of their own or the composition evaluates adapters one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import ConfigError, nearest
from visionlora.loaders import adapter_of, check_called, check_family_of, load_adapter
from visionlora.lora.adapter import Adapter, AdapterModule, in_one_spelling
from visionlora.lora.handle import Handle
from visionlora.lora.merge import check_scale
from visionlora.lora.overlap import PairOverlap, overlap
from visionlora.mixing.attached import Attached
from visionlora.mixing.compose import Composition, composition
from visionlora.mixing.compose.balanced import scaled
from visionlora.mixing.moments import Moments, check_stepped, not_stepped
from visionlora.mixing.parts import word_for
from visionlora.mixing.rows import check_pictures, knows_pictures, of_prompts, repeated, rows_of, tiled
from visionlora.mixing.scales import Scale, as_scale, block_factors

MODES = ("auto", "merged", "stacked", "batched")


@dataclass
class Member:
    """One adapter of a mix."""

    adapter: Adapter
    """As it was given."""
    scale: Scale
    factors: dict[tuple[str, str], float] = field(default_factory=dict)
    """By component and layer, from the blocks of its scale."""
    in_steps: bool = True
    """Whether it changes anything in what runs at every step, apart from the factors of the steps."""


class Mix:
    """Adapters on one pipeline or model; as a context manager they are off again after its block."""

    def __init__(
        self,
        target: Any,
        mode: str = "auto",
        compose: str | Composition = "sum",
        allow_partial: bool = False,
        **options: Any,
    ) -> None:
        """Nothing is attached yet.

        Args:
            target: a pipeline of diffusers, or any module.
            mode: see the module.
            compose: see `visionlora.mixing.compose`.
            allow_partial: leave out modules that do not fit.
            options: of the composition.

        Raises:
            ConfigError: for an unknown mode or composition.
        """
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}. {nearest(mode, MODES)}")
        self.target, self.mode, self.allow_partial = target, mode, allow_partial
        self.composition = composition(compose, **options)
        self.attached = Attached(target, allow_partial)
        self.parts = self.attached.parts
        self.members: dict[str, Member] = {}
        self.running = "stacked"
        """The mode in use."""
        self._hooks: list[Any] = []
        self._moment = (0, 1)
        self._moments = Moments(target)
        self._rows = 0
        self._evaluates = False
        """Whether the composition wants several evaluations of the UNet, at whatever step."""
        self._evaluations: list[dict[str, float]] = []
        """Factors of the adapters in each of them, at the present step."""
        self._set_to: dict[Handle, tuple[float, float, Any]] = {}
        """What the scales of a handle's layers were made of; while that is the same, there is nothing to set."""
        self._rescaled: set[Handle] = set()
        """Handles that have got other scales since the weights were written."""
        self._by_picture: set[Handle] = set()
        """Handles that may have scales of their own for each picture."""

    def __enter__(self) -> Mix:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        uses = ", ".join(f"{name} {member.scale.strength:g}" for name, member in self.members.items())
        return f"<Mix of {uses or 'nothing'}, {self.running}, on {type(self.target).__name__}>"

    # ------------------------------------------------------------------------------------------------------ members

    @property
    def names(self) -> list[str]:
        """The adapters in order."""
        return list(self.members)

    @property
    def handles(self) -> dict[str, list[tuple[str, Handle]]]:
        """What is on the model: name -> pairs of component and handle."""
        return self.attached.handles

    def layers(self, name: str) -> list[tuple[str, str]]:
        """(component, layer) of everything that an attached adapter changes."""
        return self.attached.layers(name)

    def add(self, name: str, adapter: str | Path | Adapter, scale: Any = 1.0) -> None:
        """Adds an adapter.

        Raises:
            ConfigError: when the name is taken, or the scale cannot be used.
            AdapterFileError: when the file cannot be read or is for another family of base models.
            TargetError: when it does not fit; in all cases the model is as before.
        """
        self.change({**self.members, name: self.member(name, adapter, scale)})

    def member(self, name: str, adapter: str | Path | Adapter, scale: Any) -> Member:
        """A checked member under a new name."""
        check_called(name)
        if name in self.members:
            raise ConfigError(
                f"An adapter named {name!r} is in this mix already; remove it first or choose another name."
            )
        return self.checked(adapter, scale)

    def checked(self, adapter: str | Path | Adapter, scale: Any) -> Member:
        """A member that is for a model of this family."""
        if isinstance(adapter, (str, Path)):
            adapter = load_adapter(adapter, self.allow_partial)
        loaded = adapter_of(adapter)
        if "unet" in self.parts:
            check_family_of(loaded, self.parts["unet"], type(self.target).__name__)
        return Member(loaded, as_scale(scale))

    def remove(self, name: str) -> None:
        """Takes an adapter off.

        Raises:
            ConfigError: when there is none of this name.
        """
        self.known(name)
        self.change({n: m for n, m in self.members.items() if n != name})

    def replace(self, name: str, adapter: str | Path | Adapter, scale: Any = None) -> None:
        """Puts another adapter in the place of one, at its scale unless another is given.

        A compiled model is not compiled again, if it runs merged, or stacked and the ranks are the same.

        Raises:
            ConfigError: when there is none of this name, or the scale cannot be used.
            AdapterFileError: when the file cannot be read or is for another family of base models.
            TargetError: when it does not fit; in all cases the model is as before.
        """
        self.known(name)
        fresh = self.checked(adapter, self.members[name].scale if scale is None else scale)
        self.change({n: fresh if n == name else m for n, m in self.members.items()})

    def known(self, name: str) -> None:
        """Raises ConfigError when no adapter has this name."""
        if name not in self.members:
            check_called(name)
            there = nearest(name, self.members) if self.members else "There are none."
            raise ConfigError(f"No adapter named {name!r} is attached. {there}")

    def change(self, members: dict[str, Member]) -> None:
        """Attaches these members in place of those that are there; on an error everything is as before."""
        self.attached.check_changeable()
        before = self.members
        try:
            self.members = members
            self._exchange()
        except BaseException:
            self.members = before
            self._rebuild()
            raise

    def set_scales(self, scales: Any) -> None:
        """New scales for some adapters, by name; the others keep theirs. Anything else is the scale of all.

        Raises:
            ConfigError: for an unknown name or block, or a number that is not finite; the mix stays as it was.
        """
        scales = scales if isinstance(scales, Mapping) else dict.fromkeys(self.members, scales)
        for name in scales:
            self.known(name)
        self.attached.check_changeable()
        changed = {n: Member(m.adapter, as_scale(scales[n])) if n in scales else m for n, m in self.members.items()}
        before, self.members = self.members, changed
        try:
            if self._prepared_from_scales or (self.composition.skips_silent and zeros(before) != zeros(changed)):
                self._rebuild()
            else:
                self._configure()
        except BaseException:
            self.members = before
            self._rebuild()
            raise

    def set_composition(self, compose: str | Composition, **options: Any) -> None:
        """Another way to compose, see `visionlora.mixing.compose`."""
        self.attached.check_changeable()
        before, self.composition = self.composition, composition(compose, **options)
        try:
            self._rebuild()
        except BaseException:
            self.composition = before
            self._rebuild()
            raise

    def overlap(self) -> list[PairOverlap]:
        """What the adapters share, pair by pair, at their strengths; see `visionlora.lora.overlap`."""
        return overlap({n: scaled(m.adapter, m.scale.strength) for n, m in self.members.items()})

    def detach(self) -> None:
        """Takes everything off; the base is bit for bit as before."""
        self._clear()
        self.members, self.attached.mix = {}, None

    # ------------------------------------------------------------------------------------------------------ building

    @property
    def _prepared_from_scales(self) -> bool:
        """Whether the composition builds the strengths into the adapters."""
        return list(self.handles) != list(self.members)

    def _clear(self) -> None:
        self.attached.check_free()
        for hook in self._hooks:
            hook.remove()
        self.attached.clear()
        self._hooks, self._set_to, self._rescaled, self._by_picture = [], {}, set(), set()

    def _rebuild(self, prepared: Mapping[str, Adapter] | None = None) -> None:
        """Attaches the adapters as the composition wants them, which may be known already: it can take its time over it."""
        if self.members:
            self.attached.mix = self
            self.attached.check_bare()
        self._clear()
        if not self.members:
            self.attached.mix = None
            return
        self.attached.put(prepared or self._prepare(), {n: m.adapter for n, m in self.members.items()})
        for member in self.members.values():
            member.factors = {}
        if self._prepared_from_scales:
            self._check_plain_scales()
        self._configure()

    def _exchange(self) -> None:
        """As `_rebuild`, but what is attached and still wanted as it is stays on."""
        prepared = self._prepare() if self.members else {}
        fresh = self.attached.exchange(prepared, {n: m.adapter for n, m in self.members.items()})
        if fresh is None:
            self._rebuild(prepared)
            return
        for name in fresh:
            if name in self.members:
                self.members[name].factors = {}
        self._configure()

    def _prepare(self) -> dict[str, Adapter]:
        """What is to be attached, by name."""
        alike = dict(zip(self.members, in_one_spelling([m.adapter for m in self.members.values()]), strict=True))
        strengths = {n: 0.0 if m.scale.silent else m.scale.strength for n, m in self.members.items()}
        if not self.composition.skips_silent:
            return self.composition.prepare(alike, strengths)
        # Layers whose blocks are at 0 are as those of another adapter at 0. They go on as they are, for the scales to come.
        idle = {n: self._idle(adapter, self.members[n].scale) for n, adapter in alike.items()}
        acting = {n: replace(a, modules=without(a.modules, idle[n])) if idle[n] else a for n, a in alike.items()}
        strengths = {n: strength if acting[n].modules else 0.0 for n, strength in strengths.items()}
        return {
            n: replace(a, modules={**a.modules, **idle[n]}) if idle[n] else a
            for n, a in self.composition.prepare(acting, strengths).items()
        }

    def _idle(self, adapter: Adapter, scale: Scale) -> dict[str, AdapterModule]:
        """The modules of an adapter whose blocks are at 0."""
        if not scale.blocks:
            return {}
        at = {name: (word_for(self.parts, name.partition(".")[0]), name.partition(".")[2]) for name in adapter.modules}
        try:
            factors = block_factors(scale, at.values())
        except ConfigError:  # of a word that the model's own names may fit; if not, that is found out there
            return {}
        return {name: m for name, m in adapter.modules.items() if not factors[at[name]]}

    def _check_plain_scales(self) -> None:
        """Raises ConfigError when one adapter stands for all, and a scale has more than a strength."""
        for name, member in self.members.items():
            if member.scale != Scale(member.scale.strength):
                raise ConfigError(
                    f"The scale of {name!r} has blocks, steps or pictures, but this composition makes one adapter of all, in "
                    "which they are lost: give a number, or compose otherwise (balanced, orthogonal, switch)."
                )

    def _configure(self) -> None:
        """Chooses the mode and sets every scale."""
        for name in self.handles:
            member = self.members.get(name)
            if member is not None and not member.factors:
                words = {(c, layer): (word_for(self.parts, c), layer) for c, layer in self.layers(name)}
                factors = block_factors(member.scale, words.values())
                member.factors = {at: factors[word] for at, word in words.items()}
                reached = (f for (component, _), f in member.factors.items() if self._on_unet(component))
                member.in_steps = not member.scale.silent and any(reached)
        acting = [n for n in self.handles if n not in self.members or self.members[n].in_steps]
        self._evaluates = bool(acting) and bool(self.composition.evaluations(acting))
        batched, stepped = self.needs_batch, self.needs_steps
        if stepped:
            check_stepped(self.parts.get("unet", self.parts.get("", next(iter(self.parts.values())))))
        if self.mode == "merged" and (batched or stepped):
            what = "scales per picture" if batched else "scales or a composition that change from step to step"
            raise ConfigError(f"mode 'merged' cannot have {what}: use mode='auto'.")
        if self.mode == "stacked" and batched:
            raise ConfigError(
                "mode 'stacked' cannot have scales per picture or evaluations per adapter: use mode='auto'."
            )
        auto = "batched" if batched else "stacked" if stepped or self.attached.packed else "merged"
        self.running = auto if self.mode == "auto" else self.mode
        if self.running != "merged":
            self.attached.unmerge()
        self._rows = 0
        self._moments.begin()
        self._set(0, 1)
        for hook in self._hooks:
            hook.remove()
        self._hooks = list(self._hooked())
        if self.running == "merged":
            self.attached.merge(self._rescaled)
        self._rescaled = set()

    @property
    def needs_batch(self) -> bool:
        """Whether pictures or evaluations differ in their adapters."""
        return self._evaluates or any(m.scale.images is not None for m in self.members.values())

    @property
    def needs_steps(self) -> bool:
        """Whether something changes from step to step."""
        return (
            self.attached.timed
            or self.composition.per_step
            or any(m.scale.steps is not None for m in self.members.values())
        )

    # ------------------------------------------------------------------------------------------------------- scales

    def _set(self, step: int, steps: int) -> None:
        """The scales of one step."""
        progress = step / (steps - 1) if steps > 1 else 0.0
        acting = self._acting(progress)
        weights = self.composition.weights(acting, step, steps) if acting else {}
        self._evaluations = self.composition.evaluations(acting) if acting else []
        for name, pairs in self.handles.items():
            member = self.members.get(name)
            for component, handle in pairs:
                # Text encoders run once, before the first step: they have the strength throughout.
                stepped = self._on_unet(component)
                strength = 1.0 if member is None else member.scale.at(progress) if stepped else member.scale.strength
                weight = weights.get(name, 1.0) if stepped or not self.composition.per_step else 1.0
                last = self._set_to.pop(handle, None)  # what is set in part alone is set again
                if isinstance(weight, (int, float)):
                    now = strength, weight, None if member is None else member.factors
                    if last is not None and last[:2] == now[:2] and last[2] is now[2]:
                        self._set_to[handle] = last
                        continue
                self._rescaled.add(handle)
                for layer, m in handle.methods.items():
                    factor = 1.0 if member is None else member.factors[component, layer]
                    given = self.attached.in_file(name, component, layer)
                    own = weight if isinstance(weight, (int, float)) else weight.get(f"{component}.{given}", 1.0)
                    scale = strength * factor * own
                    if scale != m.scale:
                        check_scale(name, scale)
                        m.scale = scale
                for layer, changed in handle.in_full.items():
                    factor = 1.0 if member is None else member.factors[component, layer] * member.scale.of_all_images
                    changed.set_scale(strength * factor * (weight if isinstance(weight, (int, float)) else 1.0))
                if isinstance(weight, (int, float)):
                    self._set_to[handle] = now
        self._set_rows(self._rows)
        self._moment = (step, steps)  # not before: what is refused at a step is refused again

    def _acting(self, progress: float) -> list[str]:
        """The adapters that change anything in what runs at this moment."""
        found = ((n, self.members.get(n)) for n in self.handles)
        return [n for n, m in found if m is None or (m.in_steps and m.scale.at(progress))]

    @property
    def _images(self) -> dict[str, Tensor]:
        """Factors by picture, of the adapters that have any."""
        given = {n: m.scale.images for n, m in self.members.items() if n in self.handles}
        return {n: torch.tensor(list(v)).float() for n, v in given.items() if v is not None}

    def _on_unet(self, component: str) -> bool:
        """Whether a part runs at every step: of a pipeline the UNet, of a bare module all there is."""
        return component == "unet" or "" in self.parts

    def _set_rows(self, rows: int) -> None:
        """The scales of pictures and evaluations; rows of one evaluation, 0 where there is but one."""
        evaluations, factors_by_picture = self._evaluations if rows else [], self._images
        for name, pairs in self.handles.items():
            images = factors_by_picture.get(name)
            shares: Tensor | None = images
            if evaluations:
                own = torch.ones(rows) if images is None else tiled(images, rows)
                shares = torch.cat([own * factors.get(name, 1.0) for factors in evaluations])
            elif self.running == "batched" and images is None:
                shares = torch.ones(1)
            for component, handle in pairs:
                if shares is not None and handle.in_full and bool((shares != shares[0]).any()):
                    raise ConfigError(
                        f"Adapter {name!r} changes norms or biases of {component}, which all pictures of a batch share: it "
                        "cannot have scales per picture."
                    )
                per_part = shares if self._on_unet(component) or not evaluations else images
                if per_part is not None:
                    self._by_picture.add(handle)
                elif handle not in self._by_picture:
                    continue
                for m in handle.methods.values():
                    m.sample_scale = per_part

    # -------------------------------------------------------------------------------------------------------- hooks

    def _hooked(self) -> Iterator[Any]:
        """Hooks on the UNet, where something depends on the step or on evaluations."""
        unet = self.parts.get("unet", self.parts.get(""))
        images = self._images
        for component, part in self.parts.items() if images else ():
            if not self._on_unet(component):
                yield part.register_forward_pre_hook(partial(self._before_text, component), with_kwargs=True)
        counted = images and knows_pictures(self.target)
        if unet is None or not (self.needs_steps or self._evaluates or counted):
            return
        yield unet.register_forward_pre_hook(self._before, with_kwargs=True)
        if self._evaluates:
            yield unet.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Sets the scales of this step; repeats the batch for evaluations."""
        if self.needs_steps:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            if timestep is None:
                raise not_stepped(unet)
            moment = self._moments.at(timestep)
            if moment != self._moment:
                self._set(*moment)
        if not self._evaluations and not knows_pictures(self.target):
            return None
        rows = rows_of(args, kwargs)
        for images in self._images.values():
            if len(images) > 1 and knows_pictures(self.target):
                check_pictures(self.target, len(images), rows)
        if not self._evaluations:
            return None
        if rows != self._rows:
            self._set_rows(rows)
            self._rows = rows
        times = len(self._evaluations)
        return repeated(args, rows, times), repeated(kwargs, rows, times)

    def _before_text(self, component: str, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sets the scales of the prompts that a text encoder reads."""
        for name, images in self._images.items():
            handles = [h for c, h in self.handles[name] if c == component]
            self._by_picture.update(handles)
            acting = [m for h in handles for m in h.methods.values() if m.scale]
            shares = of_prompts(images, rows_of(args, kwargs)) if acting else images
            for m in acting:
                if m.sample_scale is None or not torch.equal(m.sample_scale, shares):
                    m.sample_scale = shares

    def _after(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Blends the evaluations."""
        if not self._evaluations:
            return None
        sample = output if isinstance(output, Tensor) else output[0]
        blended = self.composition.blend(sample.view(len(self._evaluations), -1, *sample.shape[1:]))
        if isinstance(output, Tensor):
            return blended
        if isinstance(output, tuple):
            return (blended, *output[1:])
        output[next(iter(output))] = blended  # sample of diffusers, logits of transformers
        return output


def zeros(members: Mapping[str, Member]) -> dict[str, object]:
    """The same for as long as the same adapters and blocks are at 0."""
    found: dict[str, object] = {}
    for name, member in members.items():
        blocks = member.scale.blocks
        of_blocks = (
            {word: not v for word, v in blocks.items()} if isinstance(blocks, Mapping) else [not v for v in blocks]
        )
        found[name] = member.scale.silent or of_blocks
    return found


def without(modules: Mapping[str, AdapterModule], left_out: Collection[str]) -> dict[str, AdapterModule]:
    """The modules of other names."""
    return {name: m for name, m in modules.items() if name not in left_out}
