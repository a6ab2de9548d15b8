"""Whatever a training saved -> the weights of a model, under its own names.

Trainings write the state dict beside their optimizer's, averaged weights beside the last, and names with the prefixes of
what was around the model (DataParallel, torch.compile, Lightning).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from visionlora.models.heads import TRANSFORMERS_HEADS

AVERAGED = ("state_dict_ema", "model_ema", "teacher")
"""Under which trainings keep averaged weights, which are taken before others (`teacher`: DINO)."""
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "timm_model.")
"""Of what was around a model."""
BESIDE = re.compile(
    r"(optimizer|lr_scheduler|scheduler|scaler|amp|loss_scaler|callbacks|loops|rng)[a-z_]*\.|n_averaged$"
)
"""What trainings keep beside the weights."""
PRETRAINING = re.compile(r"(^|\.)(decoder[a-z_]*|mask_token)(\.|$)")
"""What masked pretraining (MAE) needs and a classifier has not."""
HEADS = re.compile(r"(dino_|ibot_)?(head|fc|classifier)[a-z_]*\.")
"""What may stand beside `backbone.`."""
FIRST = 3
"""Names that a message lists."""


def weights_in(tensors: Mapping[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The weights among what a file holds, and a sentence on what was taken and left out; empty for nothing.

    Args:
        tensors: under the names of the file.
        own: the names of the model's parameters and buffers.
    """
    found, notes = dict(tensors), []
    part = next((p for p in AVERAGED if any(n.startswith(p + ".") and n not in own for n in found)), None)
    if part is not None:
        found = under(found, part + ".")
        notes.append(f"the averaged weights were taken ({part})")
    else:
        found = {n: t for n, t in found.items() if n in own or not BESIDE.match(n)}
        if any(n.startswith("model.") for n in found) and not any(n in own for n in found):
            found = under(found, "model.")
    found = without_prefixes(found, own)
    extra = [n for n in found if n not in own and PRETRAINING.search(n)]
    if extra:
        notes.append(f"what only masked pretraining needs was left out ({len(extra)} tensors, first {extra[0]!r})")
    kept = {n: t for n, t in found.items() if n not in extra}
    return kept, f" Of its weights file {' and '.join(notes)}." if notes else ""


def of_backbone(model: nn.Module, tensors: Mapping[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The weights of a model of transformers that was saved without a head (`ViTModel`), and a sentence on what was left out.

    Their names lack what a classifier's begin with; the names of any other weights are given as they are.
    """
    prefix, note = f"{getattr(model, 'base_model_prefix', '')}.", ""
    whole = prefix == "." or any(n in own or n.startswith(prefix) for n in tensors)
    bare = not whole and any(prefix + n in own for n in tensors)
    found = {prefix + n if bare else n: t for n, t in tensors.items()}
    if pooler := [n for n in found if n.startswith(f"{prefix}pooler.") and n not in own]:
        note = f" Of its weights file the pooler was left out, which a classifier has not ({len(pooler)} tensors)."
    return {n: t for n, t in found.items() if n not in pooler}, note


def as_spelled_now(model: nn.Module, tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The weights of a model of transformers under its names, where a file has those of an older version.

    That are the names of the Hub's files too, which transformers still writes. Weights that would have to be cut or joined
    keep their names.
    """
    found, rename = dict(tensors), renaming(model)
    now = {name: name if name in own else rename(name) for name in found}
    return {now[name] if now[name] in own and now[name] not in found else name: t for name, t in found.items()}


def renaming(model: nn.Module, backward: bool = False) -> Callable[[str], str]:
    """From the names of an older version of transformers to those of a model, or back, by its own rules; else as they are.

    Back, those that were one tensor, one after the other by rows, get one name.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Chunk, PrefixChange, WeightConverter, WeightRenaming
    except ImportError:  # of a version that has but one spelling
        return str
    if not isinstance(model, PreTrainedModel):
        return str

    def cuts(step: Any) -> bool:
        by_rows = [isinstance(o, Chunk) and o.dim == 0 for o in getattr(step, "operations", ())]
        return isinstance(step, WeightConverter) and by_rows == [True]

    steps = [
        s for s in get_model_conversion_mapping(model, add_legacy=not backward)
        if isinstance(s, WeightRenaming) or (backward and cuts(s))
    ]  # fmt: skip
    # Files of a backbone may lack what a classifier's names begin with; its own names never did.
    prefix = f"{model.base_model_prefix}." if backward else ""
    if backward:
        steps = [step.reverse_transform() for step in reversed(steps) if not isinstance(step, PrefixChange)]

    def renamed(name: str) -> str:
        for step in steps:
            new = step.rename_source_key(name)[0]
            if not prefix or new != name.removeprefix(prefix):
                name = new
        return name

    return renamed


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def without_prefixes(tensors: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Names without what was around the model, as long as all begin with it and none is the model's."""
    while tensors and not any(n in own for n in tensors):
        inner = {n for n in tensors if n != "n_averaged" and not HEADS.match(n)}
        prefix = next((p for p in PREFIXES if inner and all(n.startswith(p) for n in inner)), None)
        if prefix is None:
            break
        tensors = under(tensors, prefix)
    return tensors


def classifiers(model: Any) -> tuple[str, ...]:
    """What timm calls the heads of a model; empty for other libraries."""
    given = dict(getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def head_names(model: Any, head: str) -> tuple[str, ...]:
    """What the names of a library's heads begin with: the one that was replaced, and those that stand aside."""
    own = dict(model.named_modules())
    tops = (n.split(".")[0] for n in classifiers(model))
    aside = [top for top in dict.fromkeys(tops) if top in own and not list(own[top].parameters())]
    aside += [n for n, m in own.items() if isinstance(m, nn.Identity) and n.split(".")[0] in TRANSFORMERS_HEADS]
    return tuple(f"{n}." for n in (head, *aside))


def differences(missing: Collection[str], extra: Collection[str], wrong: Mapping[str, tuple[str, str]]) -> str:
    """How the tensors of a file differ from a model's, as the end of a sentence.

    Args:
        missing: names that the file lacks.
        extra: names that the model has not.
        wrong: by name the shape in the file and in the model.

    >>> differences(["a"], ["b", "c"], {"d": ("(3,)", "(4,)")})
    "lacks 1 tensor (first 'a'); has 2 that the model has not (first 'b', 'c'); has 'd' of shape (3,) where the model has (4,)"
    """
    parts = [f"lacks {len(missing)} tensor{'s' * (len(missing) > 1)} {first(missing)}"] if missing else []
    parts += [f"has {len(extra)} that the model has not {first(extra)}"] if extra else []
    if wrong:
        name = min(wrong)
        parts.append(f"has {name!r} of shape {wrong[name][0]} where the model has {wrong[name][1]}")
    return "; ".join(parts)


def first(names: Collection[str]) -> str:
    """A few of the names in brackets."""
    return f"(first {', '.join(map(repr, sorted(names)[:FIRST]))})"
