"""From roles to modules: which layers of a model an adapter reaches.

A target is one of: a role (``attn.q``), the exact name of a module, the end of a name on a dot boundary (``to_q`` hits
``mid_block.attn1.to_q`` but not ``goto_q``), or ``re:`` and a regular expression for the whole name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from visionlora.errors import TargetError, nearest

# Ends of module names by role. diffusers UNets: to_q …, ff.net …; CLIP text encoders: q_proj …, mlp.fc1 ….
ROLES: dict[str, tuple[str, ...]] = {
    "attn.q": ("to_q", "self_attn.q_proj"),
    "attn.k": ("to_k", "self_attn.k_proj"),
    "attn.v": ("to_v", "self_attn.v_proj"),
    "attn.out": ("to_out.0", "self_attn.out_proj"),
    "mlp": ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "proj": ("proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time": ("time_emb_proj",),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("attn.q", "attn.k", "attn.v", "attn.out"),
    "attn.qv": ("attn.q", "attn.v"),
    "all": tuple(ROLES),
}
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PATCH_EMBEDDINGS = ("patch_embed.proj", "conv_proj", "patch_embeddings.projection", "embeddings.patch_embedding")


@dataclass(frozen=True)
class Hit:
    """One module that a target reached."""

    name: str
    module: nn.Module
    target: str


@dataclass(frozen=True)
class Resolution:
    """What the targets reached and what they reached in vain."""

    hits: tuple[Hit, ...]
    skipped: tuple[tuple[str, str], ...]
    """Pairs of module name and the reason why it is not adapted."""


def ends_on_boundary(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or its end after a dot."""
    return name == suffix or name.endswith("." + suffix)


def matches(name: str, target: str) -> bool:
    """Whether one target reaches the module of this name."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], name) is not None
    if target in GROUPS:
        return any(matches(name, role) for role in GROUPS[target])
    if target in ROLES:
        return any(ends_on_boundary(name, suffix) for suffix in ROLES[target])
    return ends_on_boundary(name, target)


def known_words(model: nn.Module) -> set[str]:
    """Every role and every last part of a module name: what a mistyped target may have meant."""
    names = {name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    return set(ROLES) | set(GROUPS) | {n.rsplit(".", 1)[-1] for n in names if not n.rsplit(".", 1)[-1].isdigit()}


def resolve(model: nn.Module, targets: tuple[str, ...], rank: int) -> Resolution:
    """The layers of `model` that `targets` reach, in the model's own order whatever the order of the targets.

    Raises:
        TargetError: when one of the targets reaches nothing, is not a valid expression, reaches only modules that
            cannot be adapted, names a patch embedding, or when the rank is larger than a layer.
    """
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as e:
                raise TargetError(f"Target {target!r} is not a valid regular expression: {e}.") from None
    hits: list[Hit] = []
    skipped: list[tuple[str, str]] = []
    reached: set[str] = set()
    for name, module in model.named_modules():
        if not (found := [t for t in targets if name and matches(name, t)]):
            continue
        reached.update(found)
        if not isinstance(module, ADAPTABLE):
            skipped.append((name, f"{type(module).__name__} is neither linear nor a convolution"))
        elif any(ends_on_boundary(name, p) for p in PATCH_EMBEDDINGS):
            raise TargetError(
                f"Target {found[0]!r} reaches the patch embedding {name!r}, which adapters leave alone: its output "
                "feeds every layer. Use a role such as `attn` or the full names of the layers you mean."
            )
        else:
            hits.append(Hit(name, module, found[0]))
    for target in targets:
        if target not in reached:
            raise TargetError(
                f"Target {target!r} reaches no layer of {type(model).__name__}. {nearest(target, known_words(model))}"
            )
    if not hits:
        raise TargetError(
            f"Targets {', '.join(targets)} reach no layer that can be adapted: "
            + "; ".join(f"{name} ({why})" for name, why in skipped[:5])
        )
    for hit in hits:
        weight = cast(Tensor, hit.module.weight)
        smaller = min(weight.shape[0], weight[0].numel())
        if rank > smaller:
            raise TargetError(
                f"Rank {rank} is larger than layer {hit.name!r} ({smaller} at its smaller side): "
                f"choose a rank of at most {smaller} or leave this layer out of the targets."
            )
    return Resolution(tuple(hits), tuple(skipped))
