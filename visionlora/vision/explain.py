"""What a classifier looks at: Grad-CAM and attention rollout, for plain and adapted models of any of the libraries.

In: a classifier and its input (n, c, h, w). Out: one heat map per picture, (n, h, w) in 0..1, and pictures of them.
Both read what the model itself computes, so whatever an adapter changes, merged or not, is in the maps. The model is left
as it was: modes, flags, gradients and hooks.
Letters in shapes: n pictures, h height, w width, t tokens, c channels, gh and gw rows and columns of the patches.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionlora.errors import ConfigError, DataError, ModelError
from visionlora.models.class_token import whole
from visionlora.models.evaluation import evaluating
from visionlora.models.heads import as_logits
from visionlora.vision.places import as_map, default_layer, first_tensor, input_size, patch_grid, submodule

COLOURS = "inferno"
"""A map of matplotlib whose lightness rises evenly with the value."""
OPACITY = 0.6
"""Of the colours over the picture."""


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor, layer: str | None = None) -> Tensor:
    """Grad-CAM (arXiv 1610.02391): the places whose features speak for a class.

    Eq. 1: a channel's weight is the mean over places of the gradient of the class's logit. Eq. 2: the map is the positive
    part of the weighted sum of channels. Of tokens the patches alone count as places; class and register tokens do not.

    Args:
        model: gives logits (n, classes), or an output with `logits`.
        x: the model's input, (n, c, h, w).
        classes: the class to explain for each picture, (n,).
        layer: name of the module whose output is read, (n, t, c), (n, c, gh, gw) or (n, gh, gw, c). When not given: in a
            ViT what enters the last block's attention, else the last stage's output.

    Returns:
        (n, h, w), each map from 0 to 1; all 0 where nothing speaks for the class.

    Raises:
        ModelError: when the layer is unknown or holds no map, or no layer can be found.
        ConfigError: when `classes` does not fit the pictures or the model.
    """
    model = getattr(model, "_orig_mod", model)  # compiled code does not see hooks that come later
    seen: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        """Hands the output on as the start of a graph of its own, as all below it is frozen or of no interest."""
        found = first_tensor(output)
        if found is None or seen:
            return None
        seen.append(found.detach().requires_grad_())
        passed = seen[0].clone()  # the next layer may write into it
        return passed if isinstance(output, Tensor) else type(output)((passed, *output[1:]))

    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x
        name = default_layer(model, x) if layer is None else layer
        handle = submodule(model, name).register_forward_hook(cut)
        try:
            logits = as_logits(model(x))
            chosen = checked(classes, logits)
            if not seen or not logits.requires_grad:
                raise ModelError(f"The output of layer {name!r} is no tensor, or the logits do not depend on it.")
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), seen[0], allow_unused=True)
            if gradient is None:  # the head reads what else the layer gives, such as a class token of its own
                raise ModelError(f"The logits do not depend on the map that layer {name!r} gives. Name another layer.")
        finally:
            handle.remove()
        h, w = x.shape[-2:]
        features, slopes = (as_map(model, name, v.detach().float(), h, w) for v in (seen[0], gradient))
        if gradient.any() and not slopes.any():
            raise ModelError(f"Past layer {name!r} the logits depend on the class token alone. Name an earlier layer.")
        weights = slopes.mean((2, 3), keepdim=True)
        return in_unit_range((weights * features).sum(1).relu(), h, w)


@torch.no_grad()
def attention_rollout(model: nn.Module, x: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928): how much each patch has flowed into what the head reads.

    Per block 0.5 A + 0.5 I with A the mean over heads, multiplied over blocks. The row of the class token is shown; where
    the model pools patches the mean of their rows, or the rows weighted by its pooling attention.

    Args:
        model: a ViT; windows, as in Swin, have no attention over the picture.
        x: the model's input, (n, c, h, w).

    Returns:
        (n, h, w), each map from 0 to 1.

    Raises:
        ModelError: when the model has no attention over the whole picture.
    """
    model = getattr(model, "_orig_mod", model)
    with evaluating(model), whole(), AttentionMaps() as watch:
        model(x)
    kind, (n, (h, w)) = type(model).__name__, (len(x), x.shape[-2:])
    blocks = [a for a in watch.found if a.shape[1] > 1]
    if not blocks:
        raise ModelError(f"No attention was seen in {kind}, so there is nothing to roll out. Use Grad-CAM.")
    t = blocks[0].shape[-1]
    grid = patch_grid(model, t, h, w)
    if grid is None or any(a.shape not in ((n, t, t), (n, 1, t)) for a in watch.found):
        raise ModelError(
            f"The attention of {kind} does not go over the whole picture (it has windows or stages), so it cannot be "
            "rolled out. Use Grad-CAM."
        )
    prefix, gh, gw = grid
    eye = torch.eye(t, device=x.device)
    total = eye
    for a in blocks:
        total = (0.5 * a + 0.5 * eye) @ total
    pools = [a for a in watch.found if a.shape[1] == 1]
    if pools:
        rows = pools[-1] @ total
    else:
        rows = total[:, prefix:].mean(1, keepdim=True) if pools_patches(model, prefix) else total[:, :1]
    return in_unit_range(rows[:, 0, prefix:].reshape(n, gh, gw), h, w)


def supports(model: nn.Module) -> tuple[str, ...]:
    """Which of `grad-cam` and `rollout` work for a model, tried out on an empty picture."""
    like = next(model.parameters(), torch.zeros(()))
    x = torch.zeros(1, 3, *input_size(model), device=like.device, dtype=like.dtype)
    found = []
    with suppress(ModelError):
        grad_cam(model, x, torch.zeros(1, dtype=torch.long))
        found.append("grad-cam")
    with suppress(ModelError):
        attention_rollout(model, x)
        found.append("rollout")
    return tuple(found)


def overlay(picture: Image.Image | npt.NDArray[np.uint8], heat: Tensor) -> Image.Image:
    """A heat map in colour over the grey picture, of the picture's size.

    Args:
        picture: as the model saw it, that is after the crop; an array is uint8 (h, w, 3) or (h, w).
        heat: (h, w) in 0..1; stretched when the picture is larger.

    Raises:
        DataError: when `heat` is no single map.
    """
    from matplotlib import colormaps

    if heat.dim() != 2:
        raise DataError(f"overlay takes one heat map (h, w), not a tensor of shape {tuple(heat.shape)}. Pass maps[k].")
    shown = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    values = heat.detach().float().cpu().clamp(0, 1)[None, None]
    size = (shown.height, shown.width)
    if values.shape[2:] != size:
        values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None] / 255
    colours = np.asarray(colormaps[COLOURS](values[0, 0].numpy()), dtype=np.float32)[..., :3]
    mixed = OPACITY * colours + (1 - OPACITY) * grey
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


class AttentionMaps(TorchFunctionMode):
    """Collects the attention that a model computes while it runs, averaged over heads: (n, queries, keys) in fp32 each.

    It sees q and k where they are used, after adapters, normalisation, rotation and biases, and so needs to know no model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every torch call of the model passes here."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            self.found.append(cast(Tensor, weights).float().mean(1))
            return out, weights if kwargs.get("need_weights", True) else None
        if func is F.scaled_dot_product_attention:
            self.found.append(attention_weights(*args, **kwargs).mean(1))
        result = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and result.dim() == 4:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if dim in (-1, 3):
                self.found.append(result.float().mean(1))
        return result


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    scale: float | None = None,
    **__: Any,
) -> Tensor:
    """softmax(q·kᵀ·scale + mask) of the arguments of `F.scaled_dot_product_attention`, (n, heads, queries, keys) in fp32."""
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask.float()
    return scores.softmax(-1)


def checked(classes: Tensor, logits: Tensor) -> Tensor:
    """`classes` where the logits (n, classes) are, as a tensor that backward may keep.

    Raises:
        ConfigError: when they do not fit each other.
    """
    (n, count), given = logits.shape, classes.tolist()
    if classes.shape != (n,) or not all(0 <= c < count for c in given):
        raise ConfigError(f"Grad-CAM needs one class per picture, {n} numbers from 0 to {count - 1}, and got {given}.")
    return torch.tensor(given, device=logits.device)


def pools_patches(model: nn.Module, prefix: int) -> bool:
    """Whether the head reads all patches instead of the class token."""
    pool = getattr(model, "global_pool", "")  # timm: token, avg, max, avgmax, map
    averaged = getattr(getattr(model, "config", None), "use_mean_pooling", False)  # transformers
    return prefix == 0 or bool(averaged) or (isinstance(pool, str) and pool not in ("", "token"))


def in_unit_range(maps: Tensor, h: int, w: int) -> Tensor:
    """(n, gh, gw) -> (n, h, w), each map stretched from its least value, 0, to its largest, 1; even maps become 0."""
    sized = F.interpolate(maps[:, None], size=(h, w), mode="bilinear", align_corners=False)[:, 0]
    low = sized - sized.amin((1, 2), keepdim=True)
    high = low.amax((1, 2), keepdim=True)
    return low / torch.where(high > 0, high, 1.0)
