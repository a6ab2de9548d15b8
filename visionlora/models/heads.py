"""Where the head of a classifier goes: where the library has its own, or after all that the model computes.

A head of one linear layer is replaced where it stands, so that its name stays the library's. Where the library has a
convolution of one pixel, which it flattens later, the new head flattens first. Several heads, or a head that other layers
follow, give way to one at the end, under a name of its own.
Letters in shapes: n pictures, d features, c classes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.errors import ModelError, first_line
from visionlora.lora.classes import adapted_class

LAST = "class_head"
"""Name of a head at the end of a model that has no place for one."""
NEAR = 1e-4
"""Largest difference, of the largest value, at which two tensors count as the same."""
CHOOSE = "Choose another model, such as vit_small_patch16_224."
"""What to do with a model that cannot classify."""
TRIED = 3
"""Classes of a head on trial."""
TRANSFORMERS_HEADS = (
    "classifier", "cls_classifier", "distillation_classifier", "classifier_distill", "head", "dist_head", "fc",
)  # fmt: skip
"""What image classifiers of transformers call their heads; those that learned from a teacher have two."""


def as_logits(output: Any) -> Tensor:
    """What a model of any of the libraries returns, as one tensor."""
    found: Tensor = getattr(output, "logits", output)
    return found


def heads_in(model: nn.Module) -> list[str]:
    """The heads of an image classifier of transformers: of each the last linear layer."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (top := name.split(".")[0]) in TRANSFORMERS_HEADS:
            found[top] = name
    return list(found.values())


class FlatLinear(nn.Linear):
    """A linear head of pictures that are one pixel by now: (n, d) or (n, d, 1, 1) -> (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x.flatten(1))


class HeadLast(nn.Module):
    """Mixed into a model whose head comes after all that it computes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the model gives, (n, d), through the head."""
        return cast(Tensor, cast(Any, self).class_head(as_logits(super().forward(*args, **kwargs))))


def append_head(model: nn.Module) -> None:
    """Gives a model a place for a head at its end, with nothing in it."""
    model.add_module(LAST, nn.Identity())
    model.__class__ = adapted_class(type(model), HeadLast)


def has(model: nn.Module, name: str) -> bool:
    """Whether there is a module of this name."""
    return name in dict(model.named_modules())


@torch.no_grad()
def run(id: str, model: nn.Module, place: nn.Module, picture: Tensor) -> tuple[Any, list[Tensor]]:
    """What the model gives for a picture, and what passed through one of its modules on the way.

    Raises:
        ModelError: when the model cannot run without its head.
    """
    passed: list[Tensor] = []
    watch = place.register_forward_hook(lambda _, given, __: passed.append(given[0]))
    try:
        return model.eval()(picture), passed
    except Exception as e:  # whatever it is, the model needs more than a picture, or its own head
        text = first_line(e)
        raise ModelError(
            f"{id} gives no features without its own head, for pictures of {picture.shape[-1]} px, so it cannot learn other "
            f"classes ({text[:200]}). {CHOOSE}"
        ) from None
    finally:
        watch.remove()


def fits(model: nn.Module, head: str, picture: Tensor, features: Tensor, passed: list[Tensor]) -> bool:
    """Whether a linear head in this place gives what it would give of the model's features.

    Args:
        model: with `nn.Identity` in the place.
        head: its name.
        picture: (1, 3, s, s).
        features: what the model gives for it.
        passed: what went through the place on the way.
    """
    if len(passed) != 1:
        return False
    x = passed[0]
    flat = x.flatten(1) if x.dim() == 4 else x
    if flat.shape == features.shape:
        return close(flat, features)
    if x.shape[-1] != features.shape[-1]:
        return False
    trial = nn.Linear(x.shape[-1], TRIED)  # tokens, of which one or the mean is taken later
    model.set_submodule(head, trial)
    try:
        with torch.no_grad():
            return close(model(picture), trial(features))
    finally:
        model.set_submodule(head, nn.Identity())


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= NEAR * b.abs().max())
