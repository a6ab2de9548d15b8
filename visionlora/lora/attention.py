"""Modules that use the weights of adapted layers instead of calling them: torch's own attention, and others.

`nn.MultiheadAttention` keeps q, k and v in one packed weight and reads the weight of `out_proj`; timm's BEiT and EVA and
torchvision's Swin read the weight of `qkv`. Without help an adapter on such a layer would train in vain.
Letters in shapes: b batch, l queries, s keys, h heads, d width of a head, e = h·d.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionlora.errors import ConfigError
from visionlora.lora.adapted import AdaptedLayer
from visionlora.lora.classes import adapted_class
from visionlora.lora.kernels import low_rank_linear, ordinary
from visionlora.lora.layers import (
    AdaptedLinear,
    restore_class,
    swap_class,
    with_adapters,
)
from visionlora.lora.methods.base import Method
from visionlora.lora.packed import Packed, owner_of
from visionlora.lora.together import branches_of


class AdaptedAttention(AdaptedLayer):
    """`nn.MultiheadAttention` with adapters on q, k, v; `out_proj` is called, so that it may carry its own.

    Without gradients it is torch's own code on W + ΔW, fast path included.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False keeps `nn.TransformerEncoderLayer` from reading the weights past an active adapter."""
        return bool(self.__dict__["_qkv_same_embed_dim"]) and not self.running()

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def running(self) -> bool:
        """Whether some adapter is to be run, here or on the output projection."""
        mha = cast(Any, self)
        inner = [*self.active(), *(mha.out_proj.active() if isinstance(mha.out_proj, AdaptedLayer) else [])]
        return bool(inner)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        mha = cast(Any, self)
        training = torch.is_grad_enabled() and (
            any(x.requires_grad for x in (query, key, value)) or any(p.requires_grad for p in mha.parameters())
        )
        if not (self.running() and (training or ordinary())):
            forward: Any = self.with_weights().forward if self.running() else super().forward
            found, seen_by = forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return self.guarded(found), seen_by
        if is_causal and attn_mask is None:
            raise ConfigError("is_causal is a hint about attn_mask, as in torch's own attention: give the mask too.")
        batched = query.dim() == 3
        same = query is key and key is value
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif mha.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        length, batch, _ = query.shape
        heads, head = mha.num_heads, mha.embed_dim // mha.num_heads
        q, k, v = self.project(query, key, value, same)
        mask = merged_mask(attn_mask, key_padding_mask, batch, heads, k.shape[0], q.dtype)
        if mha.bias_k is not None:
            k, v = (torch.cat([x, b.repeat(1, batch, 1)]) for x, b in ((k, mha.bias_k), (v, mha.bias_v)))
            mask = None if mask is None else F.pad(mask, (0, 1))
        if mha.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
            mask = None if mask is None else F.pad(mask, (0, 1))
        q, k, v = (x.reshape(len(x), batch * heads, head).transpose(0, 1) for x in (q, k, v))
        dropout = mha.dropout if mha.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * (1.0 / head) ** 0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = (scores.view(batch, heads, *scores.shape[1:]) + mask).view_as(scores)
            weights = F.dropout(scores.softmax(-1), dropout)
            seen = weights @ v
        else:
            q, k, v = (x.view(batch, heads, -1, head) for x in (q, k, v))
            causal = is_causal and mask is None
            seen = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).flatten(0, 1)
        out = mha.out_proj(seen.transpose(0, 1).reshape(length * batch, mha.embed_dim)).view(length, batch, -1)
        if weights is not None:
            weights = weights.view(batch, heads, *weights.shape[1:])
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return (out.transpose(0, 1) if mha.batch_first else out), weights

    def with_weights(self) -> nn.Module:
        """A module of torch's own class with W + ΔW in place of W: its fast path and its bits.

        It shares all else with this one, which is not touched: several threads may run it at once.
        """
        output = cast(Any, self).out_proj
        children = {**self._modules, "out_proj": plain_with(output) if isinstance(output, AdaptedLayer) else output}
        return plain_with(self, _modules=children)

    def project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, (l or s, b, e) each."""
        mha = cast(Any, self)
        active, untouched = self.beside(self.active())

        def read(name: str) -> Any:
            return untouched.get(name, getattr(mha, name))

        bias, packed_weight = read("in_proj_bias"), read("in_proj_weight")
        if packed_weight is not None and same:
            packed = self.one(query, packed_weight, bias, active)
            q, k, v = packed.chunk(3, dim=-1)
            return q, k, v
        found = []
        for n, (part, x) in enumerate((("q", query), ("k", key), ("v", value))):
            rows = slice(n * mha.embed_dim, (n + 1) * mha.embed_dim)
            weight = read(f"{part}_proj_weight") if packed_weight is None else packed_weight[rows]
            own = [m for m in active if m.site.part == part]
            found.append(self.one(x, weight, None if bias is None else bias[rows], own, alone=True))
        return found[0], found[1], found[2]

    def one(self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method], alone: bool = False) -> Tensor:
        """One projection with its adapters; `alone` when the weight is that of one part."""
        if not active:
            return F.linear(x, weight, bias)
        plain = [m for m in active if m.gain() is None and m.input_gain() is None]
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if ordinary() or trains or len(plain) < len(active):
            return plain_projection(x, weight, bias, active, alone)
        branches = branches_of(plain)
        if alone:
            branches = [b._replace(rows=None) for b in branches]
        # Scales are the kernels' own numbers, so the same code serves with and without gradients.
        return low_rank_linear(x, weight, bias, [b for b in branches if b.scaling])


def plain_with(layer: AdaptedLayer, **attributes: Any) -> nn.Module:
    """A module of the class that the layer had before, with the parameters that its active adapters make."""
    active = layer.active()
    adapters = [m for m in layer.methods() if m.merged or m in active]
    values: dict[str, Tensor] = {}
    if active:
        base = [p for p in (*layer._parameters.values(), *layer.originals.values()) if p is not None]
        values = layer.kept("weights", adapters, partial(with_adapters, layer, adapters), base)
    parameters = {n: nn.Parameter(v, requires_grad=False) for n, v in values.items()}
    cls: type[nn.Module] = cast(Any, layer).base_class
    module = cls.__new__(cls)
    module.__dict__.update({**vars(layer), "_parameters": {**layer._parameters, **parameters}, **attributes})
    return module


def plain_projection(x: Tensor, weight: Tensor, bias: Tensor | None, active: list[Method], alone: bool) -> Tensor:
    """One projection in ordinary operations, with gains."""
    total = out = F.linear(x, weight, bias)
    for m in active:
        rows = slice(0, out.shape[-1]) if alone or m.site.rows is None else m.site.rows
        pad = (rows.start, out.shape[-1] - rows.stop)
        if (gain := m.gain()) is not None:
            part = out[..., rows]
            shown = part if gain.with_bias or bias is None else part - bias[rows].to(out.dtype)
            total = total + F.pad(gain.value.to(out.dtype) * shown, pad)
        if (scale := m.input_gain()) is not None:
            total = total + F.pad(F.linear(x * scale.to(x.dtype), weight[rows]), pad)
        for lora_A, lora_B, scaling in m.factors():
            seen = F.dropout(x.to(out.dtype), m.dropout, m.training)
            change = F.linear(F.linear(seen, lora_A.to(out.dtype)), lora_B.to(out.dtype)) * scaling
            total = total + F.pad(change, pad)
    return total


def merged_mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, keys: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one additive mask, broadcastable to (b, h, l, s)."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))

    total: Tensor | None = None
    if attn_mask is not None:
        mask = additive(attn_mask)
        total = mask.view(batch, heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
    if padding is not None:
        mask = additive(padding).view(batch, 1, 1, keys)
        total = mask if total is None else total + mask
    return total


class Reroute(TorchFunctionMode):
    """Sends F.linear on the weight of an adapted layer to that layer, with the caller's bias."""

    def __init__(self, layers: list[AdaptedLinear]) -> None:
        super().__init__()
        self.packed: dict[Packed | None, AdaptedLinear] = {m: m for m in layers if isinstance(m, Packed)}
        self.by_weight = {id(cast(Any, m).weight): m for m in layers if not isinstance(m, Packed)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every torch call passes here while the owner's forward runs."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = bound(*args, **kwargs)
            layer = self.by_weight.get(id(weight))
            if layer is None and self.packed:  # unpacked anew for each who asks
                layer = self.packed.get(owner_of(weight))
            if layer is not None and not layer.__dict__["calling"]:
                return layer.run(x, bias)
        return func(*args, **kwargs)


def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of F.linear."""
    return input, weight, bias


class EncoderLayer(nn.Module):
    """Mixed into `nn.TransformerEncoderLayer`, whose fast path would pass by the adapters of its linear layers."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """0 says to torch that the fast path does not suit."""
        return 0 if self.runs_linears() else int(self.__dict__["activation_relu_or_gelu"])

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value

    def runs_linears(self) -> bool:
        """Whether an adapter is to be run on one of its own linear layers."""
        return any(m.active() for m in self.children() if isinstance(m, AdaptedLinear))


class Encoder(nn.Module):
    """Mixed into `nn.TransformerEncoder`, which makes nested tensors of padded texts for layers on the fast path.

    Where a layer leaves it, or its adapters train, the texts stay padded, as torch has them in training.
    """

    @property
    def use_nested_tensor(self) -> bool:
        """Whether every layer can read nested tensors."""
        return bool(self.__dict__["use_nested_tensor"]) and not any(
            (isinstance(m, EncoderLayer) and m.runs_linears()) or (isinstance(m, AdaptedLayer) and learns(m))
            for m in self.modules()
        )

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def learns(layer: AdaptedLayer) -> bool:
    """Whether an adapter runs on it that gets gradients."""
    return torch.is_grad_enabled() and bool(layer.active()) and any(p.requires_grad for p in layer.parameters())


class WeightUser(nn.Module):
    """Mixed into a module that reads the weights of its children: its forward runs their adapters all the same."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        with Reroute([m for m in self.children() if isinstance(m, AdaptedLinear) and "calling" in m.__dict__]):
            return super().forward(*args, **kwargs)


def take_over(owner: nn.Module, children: tuple[str, ...]) -> None:
    """Makes a module run the adapters of these children, whose weights it uses; call it after they are adapted."""
    for torchs, mixin in ((nn.TransformerEncoderLayer, EncoderLayer), (nn.TransformerEncoder, Encoder)):
        if isinstance(owner, torchs):
            if not isinstance(owner, mixin):
                owner.__class__ = cast(Any, adapted_class(type(owner), mixin))
            return
    if not isinstance(owner, nn.MultiheadAttention):
        for child in children:
            if isinstance(layer := getattr(owner, child), AdaptedLinear):
                layer.__dict__["calling"] = False
    if isinstance(owner, (AdaptedAttention, WeightUser)):
        return
    if isinstance(owner, nn.MultiheadAttention):
        swap_class(owner, AdaptedAttention)
    else:
        owner.__class__ = adapted_class(type(owner), WeightUser)


def give_back(owner: nn.Module, children: tuple[str, ...]) -> None:
    """Makes it its plain self again when no adapter is left on it or on these children; of others' no one will say when."""
    parts = [owner, *(getattr(owner, child) for child in children)] if children else owner.modules()
    if any(isinstance(m, AdaptedLayer) and m.adapters for m in parts):
        return
    if isinstance(owner, AdaptedAttention):
        restore_class(owner)
    elif isinstance(owner, (EncoderLayer, Encoder, WeightUser)):
        owner.__class__ = cast(Any, owner).base_class
