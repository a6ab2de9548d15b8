"""The last block of a ViT, for the class token alone: the head reads no other.

Keys and values come from all tokens; the queries, the output projection and the MLP of the others change no logit and no
gradient. Leaving them out saves about 0.8 of a block, forward and backward, and as much of what is kept for backward: of
ViT-B/16's twelve blocks 7 %. Only `model(x)` is shortened. Whoever asks for all tokens gets them: `forward_features`,
hooks on the last block or the norm after it, `whole()`, compilation, tracing and export, gradient checkpointing.
Letters in shapes: n pictures, t tokens, d width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from visionlora.lora.classes import adapted_class

CLOSE = 1e-4
"""Largest difference between the two ways, of the largest output, at which a model is shortened: fp32 rounds by less."""


class Asked(threading.local):
    """What this thread wants of last blocks."""

    block: nn.Module | None = None
    """The one whose other tokens nobody reads."""
    whole: bool = False


ASKED = Asked()


@contextmanager
def whole() -> Iterator[None]:
    """Every block computes every token in here, for those that look inside without hooks."""
    before, ASKED.whole = ASKED.whole, True
    try:
        yield
    finally:
        ASKED.whole = before


class ReadsClassToken(nn.Module):
    """Mixed into timm's VisionTransformer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (n, 3, h, w) -> features or logits (n, d)."""
        last = cast(Any, self).blocks[-1]
        shorter = isinstance(x, Tensor) and not (args or kwargs) and unwatched(self)  # of FX it is no tensor
        before, ASKED.block = ASKED.block, last if shorter else None
        try:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        finally:
            ASKED.block = before


class LastBlock(nn.Module):
    """Mixed into its last block."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (n, t, d) -> (n, t, d), or (n, 1, d) while the model runs for its class token."""
        if ASKED.block is not self:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        own = cast(Any, self)
        y = x[:, :1] + own.drop_path1(own.ls1(attended(own.attn, own.norm1(x))))
        return cast(Tensor, y + own.drop_path2(own.ls2(own.mlp(own.norm2(y)))))


def attended(attn: Any, x: Tensor) -> Tensor:
    """What timm's Attention gives for the first token: (n, t, d) -> (n, 1, d)."""
    n, t, _ = x.shape
    q, k, v = attn.qkv(x).reshape(n, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    seen = F.scaled_dot_product_attention(attn.q_norm(q[:, :, :1]), attn.k_norm(k), v, dropout_p=dropout)
    seen = attn.norm(seen.transpose(1, 2).reshape(n, 1, -1)) if hasattr(attn, "norm") else seen
    return cast(Tensor, attn.proj_drop(attn.proj(seen)))


def unwatched(model: Any) -> bool:
    """Whether nobody can see that tokens are missing, and none of them is made again for backward."""
    if model.global_pool != "token" or getattr(model, "attn_pool", None) is not None:  # it was changed since
        return False
    if ASKED.whole or model.grad_checkpointing or not model.blocks[-1].attn.fused_attn:
        return False
    if torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    seen = (model.blocks, *model.blocks[-1].modules(), *model.norm.modules())
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        for m in seen
    )


def suits(model: nn.Module) -> bool:
    """Whether it is timm's own ViT, with its own attention, and pools its class token."""
    from timm.models import vision_transformer

    own, timms = cast(Any, model), cast(Any, vision_transformer)
    # What FX and others ask of a signature is that of timm's own forward.
    cast(Any, ReadsClassToken.forward).__wrapped__ = timms.VisionTransformer.forward
    cast(Any, LastBlock.forward).__wrapped__ = timms.Block.forward
    if type(model) is not timms.VisionTransformer or not own.has_class_token or own.global_pool != "token":
        return False
    last: Any = own.blocks[-1] if len(own.blocks) else None
    return type(last) is timms.Block and type(last.attn) is timms.Attention and getattr(last.attn, "gate", None) is None


@torch.no_grad()
def shorten(model: nn.Module, x: Tensor, given: Tensor | None = None) -> bool:
    """Makes `model(x)` leave out what nobody reads, if the model is one of those and gives the same so.

    Args:
        model: a backbone in evaluation mode.
        x: pictures to try it on, (n, 3, h, w), not all alike.
        given: what the model gives for them, where that is known already.

    Returns:
        Whether it does now.
    """
    if not suits(model):
        return False
    last, expected = cast(Any, model).blocks[-1], model(x) if given is None else given
    kinds = {m: type(m) for m in (model, last)}
    model.__class__, last.__class__ = (
        adapted_class(kinds[model], ReadsClassToken),
        adapted_class(kinds[last], LastBlock),
    )
    if (model(x) - expected).abs().max() <= CLOSE * expected.abs().max():
        return True
    for module, kind in kinds.items():
        module.__class__ = kind
    return False
