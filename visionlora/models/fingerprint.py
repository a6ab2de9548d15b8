"""Tells base models apart: by architecture (may an adapter be applied?) and by weights (is it the same model?)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.lora.inject import base_parameters
from visionlora.lora.mapped import Mappings

SAMPLES = 8
"""Values read from each tensor, spread over it: enough to tell fine-tunes apart without reading gigabytes."""
THREADS = 8
"""That read at once; each holds a copy of one tensor."""
TEXT_MODEL = "text_model."
"""What transformers before 5.6 has before the names of all parameters of CLIP's text encoder, and later ones have not."""

DISTILLED = ("time_embedding.cond_proj.weight",)
"""What a UNet has more than its base that was distilled to be told the guidance (LCM, arXiv 2310.04378)."""


def respelled(name: str) -> str:
    """A parameter of a text encoder as another transformers names it: with `TEXT_MODEL`, or without where it has it."""
    return name.removeprefix(TEXT_MODEL) if name.startswith(TEXT_MODEL) else TEXT_MODEL + name


def base_tensors(module: nn.Module, spell: Callable[[str], str] = str) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the base, sorted by name, without any adapter's; those of one name were one tensor."""
    found: dict[str, list[Tensor]] = {}
    for name, p in base_parameters(module).items():
        found.setdefault(spell(name), []).append(p.detach())
    for name, parts in sorted(found.items(), key=itemgetter(0)):
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def architecture_fingerprint(module: nn.Module, spell: Callable[[str], str] = str) -> str:
    """16 hex digits over the names and shapes of all parameters; the same in every dtype, and for a base made into an LCM.

    Args:
        module: the model.
        spell: how another version of its library names a parameter; those of one name it had in one, by rows.
    """
    lines = [f"{name} {tuple(p.shape)}" for name, p in base_tensors(module, spell) if name not in DISTILLED]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


READ = (
    "act_fn", "attention_dropout", "bos_token_id", "eos_token_id", "force_upcast", "hidden_act", "latents_mean",
    "layer_norm_eps", "mid_block_add_attention", "norm_num_groups", "num_attention_heads", "pad_token_id",
)  # fmt: skip
"""Settings of VAEs and text encoders that change what they compute, and that names, shapes and values do not tell."""


def settings_fingerprint(config: Any) -> str:
    """16 hex digits over what a model's config says beside its weights; one that it does not have counts as none.

    Args:
        config: of a model of diffusers or transformers.
    """
    said = {name: value for name in READ if (value := getattr(config, name, None)) is not None}
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@torch.no_grad()
def weights_fingerprint(module: nn.Module, spell: Callable[[str], str] = str) -> str:
    """16 hex digits over a few values of each parameter, read as fp16: a model's fp32 and fp16 files agree."""
    digest, mappings = hashlib.sha256(), Mappings()
    for name, p in base_tensors(module, spell):
        index = torch.linspace(0, p.numel() - 1, SAMPLES, dtype=torch.float64).long().tolist()
        values = mappings.values(p, index)
        digest.update(name.encode() + values.to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def content_fingerprint(*modules: nn.Module | None, without: nn.Module | None = None) -> str:
    """16 hex digits over every bit of the parameters, in the precision that they are in.

    For what is computed from a model and kept: `weights_fingerprint` passes over weights that are damaged, or were tuned, in a
    few places. Gigabytes take a second or two.

    Args:
        modules: the parts of a model that count.
        without: one in them whose parameters do not.
    """
    aside, mappings = {id(p) for p in without.parameters()} if without is not None else set(), Mappings()
    found = [item for m in modules if m is not None for item in sorted(base_parameters(m).items(), key=itemgetter(0))]

    def digest(name: str, parameter: nn.Parameter) -> bytes:
        p = parameter.detach()
        told = hashlib.sha256(f"{name} {tuple(p.shape)} {p.dtype} ".encode())
        for piece in mappings.pieces(p):
            told.update(piece)
        return told.digest()

    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(lambda item: digest(*item), [item for item in found if id(item[1]) not in aside])
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
