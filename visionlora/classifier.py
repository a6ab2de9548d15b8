"""Classifier adapters -> predictions: one adapter, or many tasks on one frozen backbone.

    classifier = load_classifier("pets/adapter.safetensors")
    classifier.predict(["a.jpg", "b.jpg"])[0].label

    many = load_classifier({"pets": "pets.safetensors", "digits": "digits.safetensors"})
    many.predict(pictures, tasks=["pets", "digits", "pets"])      # one forward pass

An adapter of `visionlora classify` holds all it needs beside the backbone: factors, head, class names, preprocessing and
temperature. Pictures of one task run with its ΔW merged into the weights; pictures of several in one batch run with the
factors side by side, each picture with its own.
Letters in shapes: n pictures, d features, c classes of a task.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from visionlora.data.images import as_seen, decode
from visionlora.data.preprocess import Preprocessing
from visionlora.errors import AdapterFileError, ConfigError, DataError, nearest
from visionlora.loaders import check_classifies, check_fingerprints, load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.lora.handle import Handle
from visionlora.lora.inject import attach
from visionlora.lora.merge import merge_together
from visionlora.models.devices import usable_device
from visionlora.models.evaluation import forget_biases
from visionlora.models.heads import as_logits
from visionlora.models.vision import VisionModel, open_backbone

COMPONENT = "model"
"""Of the backbone in adapter files."""
ONLY = "default"
"""Name of the task where there is but one."""

Picture = str | Path | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one picture."""

    labels: tuple[str, ...]
    """The classes asked for, likeliest first; with several labels per picture, those above the threshold."""
    probabilities: tuple[float, ...]
    """Of `labels`, calibrated by the temperature that the adapter carries."""
    task: str = ONLY
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest classes and their probabilities, as many as were asked for; with several labels also those that do not
    apply."""
    scores: tuple[tuple[str, float], ...] = ()
    """Every class and its probability, in the adapter's order of classes, where asked for."""

    @property
    def label(self) -> str | None:
        """The likeliest class; None when no label of several applies."""
        return self.labels[0] if self.labels else None

    @property
    def probability(self) -> float:
        """Of `label`."""
        return self.probabilities[0] if self.probabilities else 0.0


@dataclass(frozen=True)
class ClassTask:
    """What an adapter says about its classes."""

    classes: tuple[str, ...]
    multi_label: bool
    preprocessing: Preprocessing
    temperature: float
    weight: Tensor
    """Of the head, (c, d)."""
    bias: Tensor
    """Of the head, (c,)."""

    @classmethod
    def of(cls, adapter: Adapter, head: str) -> ClassTask:
        """From the header and the tensors of a classifier's adapter.

        Raises:
            AdapterFileError: when its head is missing or has other classes.
        """
        info = adapter.info["classifier"]
        names = [f"{COMPONENT}.{head}.{n}" for n in ("weight", "bias")]
        if any(n not in adapter.modules for n in names):
            raise AdapterFileError(f"This adapter has no head: {names[0]!r} is missing. Train it again.")
        weight, bias = (adapter.modules[n].tensors["value"].float() for n in names)
        classes = tuple(str(name) for name in info["classes"])
        if len(classes) != len(weight):
            raise AdapterFileError(f"This adapter names {len(classes)} classes, but its head has {len(weight)}.")
        preprocessing = Preprocessing.from_dict(info["preprocessing"])
        return cls(classes, bool(info["multi_label"]), preprocessing, float(info["temperature"]), weight, bias)

    def on(self, device: torch.device) -> ClassTask:
        """Itself with its head there."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def with_temperature_in_head(self) -> ClassTask:
        """The same probabilities, from logits as they come."""
        return replace(self, weight=self.weight / self.temperature, bias=self.bias / self.temperature, temperature=1.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated, (n, c)."""
        scaled = logits.float() / self.temperature
        return scaled.sigmoid() if self.multi_label else scaled.softmax(-1)

    def prediction(
        self, probabilities: Tensor, top_k: int, task: str, threshold: float = 0.5, all_scores: bool = False
    ) -> Prediction:
        """Of one picture, from its probabilities (c,)."""
        values, order = probabilities.sort(descending=True, stable=True)
        count = int((values > threshold).sum()) if self.multi_label else min(top_k, len(order))
        names, numbers = [self.classes[i] for i in order.tolist()], values.tolist()
        top = tuple(zip(names, numbers, strict=True))[: max(top_k, count)]
        scores = tuple(zip(self.classes, probabilities.tolist(), strict=True)) if all_scores else ()
        return Prediction(tuple(names[:count]), tuple(numbers[:count]), task, top, scores)


class Classifier:
    """One frozen backbone and any number of classifier adapters on it; several threads may use it."""

    def __init__(self, backbone: VisionModel, device: str | torch.device = "cpu") -> None:
        """No task yet.

        Args:
            backbone: from `visionlora.models.vision.open_backbone`.
            device: to run on; auto takes a GPU where there is one: cuda, xpu of Intel, or mps on a Mac.

        Raises:
            ConfigError: when there is no such device.
        """
        self.backbone, self.device = backbone, usable_device(device)
        self.fingerprints, self.older = backbone.fingerprints(), backbone.fingerprints(older=True)
        self.model = backbone.model.to(self.device).eval()
        self.tasks: dict[str, ClassTask] = {}
        self.handles: dict[str, Handle | None] = {}
        """None for a head alone."""
        self._numbers = itertools.count()
        self._ready: str | None = None
        """The task whose ΔW is in the weights."""
        self._alone = threading.RLock()
        """What changes the weights, or runs on them as they are, has them to itself."""

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return list(self.tasks)

    def add(self, name: str, adapter: str | Path | Adapter, force: bool = False) -> None:
        """Adds a task.

        Raises:
            ConfigError: when the name is taken.
            AdapterFileError: when the adapter is no classifier's, or of another backbone; `force` accepts other weights
                in the same architecture.
            TargetError: when a module does not fit.
        """
        loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
        check_classifies(loaded, f"The adapter {name!r}" if isinstance(adapter, Adapter) else adapter)
        with self._alone:
            if name in self.tasks:
                raise ConfigError(f"A task named {name!r} is there already; remove it first or choose another name.")
            head = self.backbone.head
            task = ClassTask.of(loaded, head)
            check_fingerprints(loaded, self.backbone.id, self.fingerprints, force, self.older)
            if (loaded.info.get("base") or {}).get("image_size") != self.backbone.image_size:
                raise AdapterFileError(
                    f"This adapter was trained on pictures of {task.preprocessing.size} px, and {self.backbone.id} is open "
                    f"for {self.backbone.preprocessing.size} px: give it a classifier of its own."
                )
            if task.weight.shape[1] != self.backbone.features:
                raise AdapterFileError(
                    f"The head of this adapter reads {task.weight.shape[1]} features; {self.backbone.id} gives "
                    f"{self.backbone.features}."
                )
            rest = {n: m for n, m in loaded.modules.items() if not n.startswith(f"{COMPONENT}.{head}.")}
            self._release()
            body = Adapter(rest, loaded.info)
            handle = attach(self.model, body, COMPONENT, f"task{next(self._numbers)}") if rest else None
            if handle is not None:
                handle.set_scale(0.0)
            self.handles[name], self.tasks[name] = handle, task.on(self.device)

    def remove(self, name: str) -> None:
        """Takes a task off."""
        with self._alone:
            self.known(name)
            self._release()
            handle = self.handles.pop(name)
            del self.tasks[name]
            if handle is not None:
                handle.eject()

    def known(self, name: str) -> None:
        """Raises ConfigError when no task has this name."""
        if name not in self.tasks:
            raise ConfigError(f"There is no task {name!r}. {nearest(name, self.tasks) if self.tasks else 'Add one.'}")

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, which a copy has of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_alone"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As `__getstate__` gave it."""
        self.__dict__.update(state, _alone=threading.RLock())

    # -------------------------------------------------------------------------------------------------------- running

    def _release(self) -> None:
        """The weights are the base's, bit for bit."""
        for handle in self.handles.values():
            if handle is not None:
                if handle.merged:
                    handle.unmerge()
                for f in handle.in_full.values():
                    f.set_scale(0.0)
        forget_biases(self.model)
        self._ready = None

    def _use(self, name: str) -> None:
        """Puts the ΔW of one task into the weights."""
        if self._ready == name:
            return
        self._release()
        handles = {n: h for n, h in self.handles.items() if h is not None}
        for n, handle in handles.items():
            for m in handle.methods.values():
                m.sample_scale, m.scale = None, float(n == name)
        if (own := handles.get(name)) is not None:
            for f in own.in_full.values():
                f.set_scale(1.0)
        if not any(h.in_full for h in handles.values()):
            merge_together(list(handles.values()))  # at scale 0 too: then every layer runs as a plain one
        elif own is not None and own.methods:
            own.merge()
        self._ready = name

    def _mixable(self, names: Iterable[str]) -> bool:
        """Whether these tasks can share a forward pass: none changes parameters that all pictures use."""
        return all(h is None or not h.in_full for h in (self.handles[n] for n in names))

    @torch.no_grad()
    def features(self, x: Tensor, tasks: Sequence[str]) -> Tensor:
        """Features of preprocessed pictures under the adapter of each one's task, (n, d).

        Args:
            x: (n, 3, h, w).
            tasks: n names.
        """
        used = list(dict.fromkeys(tasks))
        x = x.to(self.device)
        with self._alone:
            if len(used) == 1:
                self._use(used[0])
                return as_logits(self.model(x)).float()
            if not self._mixable(used):
                found = torch.empty(len(x), self.backbone.features, device=self.device)
                for name in used:
                    rows = [i for i, task in enumerate(tasks) if task == name]
                    found[rows] = self.features(x[rows], [name] * len(rows))
                return found
            self._release()
            for name, handle in self.handles.items():
                if handle is not None:
                    shares = torch.tensor([float(task == name) for task in tasks])
                    for m in handle.methods.values():
                        m.scale, m.sample_scale = float(name in used), shares
            return as_logits(self.model(x)).float()

    @torch.no_grad()
    def logits(self, x: Tensor, tasks: Sequence[str] | str | None = None) -> list[Tensor]:
        """Logits of preprocessed pictures, one row (c,) each; tasks may have different numbers of classes."""
        names = self.names_of(tasks, len(x))
        with self._alone:
            features, heads = self.features(x, names), {name: self.tasks[name] for name in names}
        rows: list[Tensor] = [torch.empty(0)] * len(x)
        for name, task in heads.items():
            own = [i for i, n in enumerate(names) if n == name]
            for i, row in zip(own, torch.nn.functional.linear(features[own], task.weight, task.bias), strict=True):
                rows[i] = row
        return rows

    def names_of(self, tasks: Sequence[str] | str | None, count: int) -> list[str]:
        """One task name per picture.

        Raises:
            ConfigError: when a name is unknown, there are several tasks and none is named, or the numbers differ.
        """
        if tasks is None:
            if len(self.tasks) != 1:
                raise ConfigError(f"There are {len(self.tasks)} tasks ({', '.join(self.tasks)}): say which, tasks=….")
            return self.names * count
        names = [tasks] * count if isinstance(tasks, str) else list(tasks)
        for name in dict.fromkeys(names):
            self.known(name)
        if len(names) != count:
            raise ConfigError(f"There are {count} pictures and {len(names)} tasks: give one task per picture.")
        return names

    def predict(
        self,
        images: Picture | Sequence[Picture],
        tasks: Sequence[str] | str | None = None,
        top_k: int = 1,
        batch_size: int = 32,
        threshold: float = 0.5,
        all_scores: bool = False,
    ) -> list[Prediction]:
        """Predicts pictures.

        Args:
            images: one or more files, PIL pictures or uint8 arrays (h, w, 3).
            tasks: a task for all, or one per picture; not needed where there is but one.
            top_k: classes per picture.
            batch_size: pictures per forward pass.
            threshold: with several labels per picture, those above it apply.
            all_scores: keep the probability of every class in `Prediction.scores`.

        Raises:
            DataError: when a picture cannot be read, or there is none.
            ConfigError: see `names_of`.
        """
        given: list[Any] = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)
        if not given:
            raise DataError("There are no pictures to predict.")
        check_asked(top_k, batch_size, threshold)
        names = self.names_of(tasks, len(given))
        found: list[Prediction] = []
        for start in range(0, len(given), batch_size):
            own = names[start : start + batch_size]
            x = torch.cat([self.prepared(p, n) for p, n in zip(given[start : start + batch_size], own, strict=True)])
            for row, name in zip(self.logits(x, own), own, strict=True):
                task = self.tasks[name]
                found.append(task.prediction(task.probabilities(row).cpu(), top_k, name, threshold, all_scores))
        return found

    def prepared(self, picture: Picture, name: str) -> Tensor:
        """One picture as its task wants it, (1, 3, h, w)."""
        preprocessing = self.tasks[name].preprocessing
        return preprocessing.batch(preprocessing.stored(opened(picture))[None])


def check_asked(top_k: int, batch_size: int, threshold: float) -> None:
    """Raises ConfigError when one of what is asked of `Classifier.predict` is out of range."""
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold is {threshold:g}; it must be at least 0 and below 1.")


def opened(picture: Picture) -> Image.Image:
    """A picture in any form as an RGB one."""
    if isinstance(picture, (str, Path)):
        return decode(Path(picture).expanduser())
    if isinstance(picture, Image.Image):
        return as_seen(picture)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise DataError(f"A picture is a uint8 array (h, w, 3); this one is {array.dtype} {array.shape}.")
    return Image.fromarray(array)


def load_classifier(
    adapters: str | Path | Adapter | Mapping[str, str | Path | Adapter],
    model: str | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    weights: str | None = None,
) -> Classifier:
    """A ready classifier.

    Args:
        adapters: one file, run folder or `Adapter`; or several by task name, on one backbone.
        model: the backbone; by default the one that the first adapter names.
        device: to run on; auto takes a GPU where there is one: cuda, xpu of Intel, or mps on a Mac.
        force: accept a backbone of the same architecture with other weights.
        weights: a state dict of the backbone, where it is no longer where the first adapter says.

    Raises:
        ConfigError: when there is no such device.
        AdapterFileError: when an adapter cannot be read, is no classifier's or is of another backbone.
        ModelError: when the backbone cannot be opened.
    """
    device = usable_device(device)
    several = dict(adapters) if isinstance(adapters, Mapping) else {ONLY: adapters}
    loaded = {n: a if isinstance(a, Adapter) else load_adapter(a) for n, a in several.items()}
    if not loaded:
        raise ConfigError("No adapter was given.")
    for name, adapter in loaded.items():
        given = several[name]
        check_classifies(adapter, f"The adapter {name!r}" if isinstance(given, Adapter) else given)
    base = next(iter(loaded.values())).info.get("base", {})
    chosen = model or base.get("id")
    if chosen is None:
        raise AdapterFileError("This adapter does not say which backbone it is for: name it with --model.")
    chosen_weights = weights or (base.get("weights") if model is None else None)
    backbone = open_backbone(chosen, chosen_weights, base.get("image_size"), None if model else "the adapter")
    classifier = Classifier(backbone, device)
    for name, adapter in loaded.items():
        classifier.add(name, adapter, force)
    return classifier
