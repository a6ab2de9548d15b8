"""Refuses weights that are not those of the model that a library reads them into.

The libraries fill what a file lacks with random values and say so to their logs alone.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import ModelError
from visionlora.models.state_dicts import differences

TIMM_LOG = "timm.models._builder"
SAID_BY_TIMM = re.compile(r"(Missing|Unexpected) keys \((.*)\) (discovered|found) while loading pretrained weights")
SAID_BY_DIFFUSERS = re.compile(
    r"because (?P<name>\S+) expected shape torch\.Size\(\[(?P<own>.*?)\]\), but got torch\.Size\(\[(?P<given>.*?)\]\)"
)
SAID_BY_TORCH = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\(\[(?P<given>.*?)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[(?P<own>.*?)\]\)"
)
LISTED_BY_TORCH = [re.compile(rf"{kind} key\(s\) in state_dict: (.*)") for kind in ("Missing", "Unexpected")]
QUOTED = re.compile('"(.*?)"')
NOTHING: Mapping[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
"""What a library tells of the loading where all went well."""
NEW_NORM = re.compile(r"(^|\.)(pooler\.layernorm|fc_norm|head\.norm)\.|^(norm|layernorm)\.")
"""At the end of a backbone, which masked pretraining (BEiT, ConvNeXt V2), or a model saved without its head (CvT), has not; at
first it changes nothing."""


def loaded(what: str, library: str, kind: Any, source: str | Path, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """What `from_pretrained` gives, and what it tells of the loading, for `check_loaded`.

    Args:
        what: begins the message of a refusal: whose weights they are.
        library: diffusers or transformers.
        kind: a class of it.
        source: a folder or a Hub id.
        more: for `from_pretrained`.

    Raises:
        ModelError: when diffusers finds another shape.
    """
    if library == "transformers":  # which since version 5 reads fp32 files as the fp16 that a config.json may name
        more = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **more}
    try:
        model, info = kind.from_pretrained(source, output_loading_info=True, **more)
    except Exception as e:
        if (refusal := misfit(what, e)) is not None:
            raise refusal from None
        raise
    return model, info


def check_loaded(what: str, model: nn.Module, info: Mapping[str, Any] = NOTHING, spare: tuple[str, ...] = ()) -> None:
    """Raises ModelError when a library had to make up values.

    Args:
        what: begins the message: whose weights they are.
        model: as the library gave it.
        info: what it told of the loading, where it tells.
        spare: what the names of tensors begin with that may be missing, or have another shape.
    """
    own = model.state_dict()
    empty = {
        n for n, t in own.items() if t.is_meta
    }  # of diffusers, also where an index promises more than its files hold
    missing = {n for n in {*info["missing_keys"], *empty} if is_needed(n, own, spare)}
    wrong = {}
    for given in info["mismatched_keys"]:  # names alone before transformers 5
        name, *shapes = (given,) if isinstance(given, str) else given
        if is_needed(name, own, spare):
            wrong[name] = (str(tuple(shapes[0])) if shapes else "another size", str(tuple(own[name].shape)))
    if missing or wrong:
        raise not_its_own(what, missing, info["unexpected_keys"], wrong)


def is_needed(name: str, own: Mapping[str, Tensor], spare: tuple[str, ...]) -> bool:
    """Whether a model would be another without this tensor of a file; tables and counters are always the same."""
    numbers = name in own and own[name].is_floating_point()
    return numbers and not name.startswith(spare) and not NEW_NORM.search(name)


def misfit(what: str, error: Exception) -> ModelError | None:
    """What torch or diffusers say of tensors that do not fit, in our words; None for anything else.

    Args:
        what: begins the message: whose weights they are.
        error: as they raised it.
    """
    text = str(error)
    missing, extra = (QUOTED.findall(line[1]) if (line := said.search(text)) else [] for said in LISTED_BY_TORCH)
    found = SAID_BY_TORCH.search(text) or SAID_BY_DIFFUSERS.search(text)
    wrong = {found["name"]: (f"({found['given']})", f"({found['own']})")} if found else {}
    return not_its_own(what, missing, extra, wrong) if missing or extra or wrong else None


def not_its_own(
    what: str,
    missing: Collection[str] = (),
    extra: Collection[str] = (),
    wrong: Mapping[str, tuple[str, str]] | None = None,
) -> ModelError:
    """For weights that are not those of their configuration."""
    return ModelError(
        f"{what} are not those of its configuration: the file {differences(missing, extra, wrong or {})}. "
        "Copy or download it again, with versions of its libraries as new as those that saved it."
    )


@contextlib.contextmanager
def told_by_timm() -> Iterator[dict[str, Any]]:
    """What timm tells of the loading, in the words of the others: timm has but its log for it."""
    info: dict[str, Any] = dict(NOTHING)

    def listen(record: logging.LogRecord) -> bool:
        if (found := SAID_BY_TIMM.match(record.getMessage())) is not None:
            info[f"{found[1].lower()}_keys"] = found[2].split(", ")
        return found is None and record.levelno >= level

    log = logging.getLogger(TIMM_LOG)
    before, level = log.level, log.getEffectiveLevel()
    log.setLevel(logging.INFO)
    log.addFilter(listen)
    try:
        yield info
    finally:
        log.removeFilter(listen)
        log.setLevel(before)
