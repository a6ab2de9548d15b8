"""Tells base models apart: by architecture (may an adapter be applied?) and by weights (is it the same model?)."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from visionlora.lora.inject import base_parameters
from visionlora.lora.mapped import Mappings

SAMPLES = 8
"""Values read from each tensor, spread over it: enough to tell fine-tunes apart without reading gigabytes."""


TEXT_MODEL = "text_model."
"""What transformers before 5.6 has before the names of all parameters of CLIP's text encoder, and later ones have not."""


def base_tensors(module: nn.Module, respelled: bool = False) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the base, sorted by name, without any adapter's."""
    found = base_parameters(module)
    if respelled:
        found = {
            n.removeprefix(TEXT_MODEL) if n.startswith(TEXT_MODEL) else TEXT_MODEL + n: p for n, p in found.items()
        }
    return sorted(found.items())


def architecture_fingerprint(module: nn.Module, respelled: bool = False) -> str:
    """16 hex digits over the names and shapes of all parameters; the same in every dtype.

    Args:
        module: the model.
        respelled: with `TEXT_MODEL` where the names are without, and without it where they have it: a text encoder as another
            transformers names it.
    """
    lines = [f"{name} {tuple(p.shape)}" for name, p in base_tensors(module, respelled)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def weights_fingerprint(module: nn.Module, respelled: bool = False) -> str:
    """16 hex digits over a few values of each parameter, read as fp16: a model's fp32 and fp16 files agree."""
    digest, mappings = hashlib.sha256(), Mappings()
    for name, p in base_tensors(module, respelled):
        index = torch.linspace(0, p.numel() - 1, SAMPLES, dtype=torch.float64).long().tolist()
        values = mappings.values(p.detach(), index)
        digest.update(name.encode() + values.to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
