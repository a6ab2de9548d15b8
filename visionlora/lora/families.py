"""How model families name their layers, so that targets can be roles. A family is data; none is imported here.

A plug-in adds one through the entry point group `visionlora.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from visionlora import plugins

MINGLED = "attn.mingled"
"""The role of a layer that holds q, k and v in a way in which they cannot be told apart: groups with q and v take all of it."""
ROLES = ("attn.q", "attn.k", "attn.v", "attn.out", MINGLED, "mlp.in", "mlp.out", "proj", "conv", "time")
GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("attn.q", "attn.k", "attn.v", "attn.out", MINGLED),
    "attn.qv": ("attn.q", "attn.v", MINGLED),
    "attn.qkv": ("attn.q", "attn.k", "attn.v", MINGLED),
    "mlp": ("mlp.in", "mlp.out"),
    "linear": ("attn.q", "attn.k", "attn.v", "attn.out", MINGLED, "mlp.in", "mlp.out"),
    "all": ROLES,
    "auto": ("attn.q", "attn.v", MINGLED),
}


@dataclass(frozen=True)
class Family:
    """The names of one family's layers. Every name is the end of a module's name, on a dot boundary."""

    name: str
    roles: Mapping[str, tuple[str, ...]]
    """Role -> names of layers."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers that hold several projections, one after the other in their output: name -> parts, such as q, k, v."""
    weight_users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Classes (`module.Class`) that use the weight of a child instead of calling it -> those children."""
    mingled: Mapping[str, str] = field(default_factory=dict)
    """Classes whose `fused` layers hold their projections in another way, head by head or fewer of them -> the attribute that
    says so, empty where it is always so. Such a layer has no parts; its role is `attn.mingled`."""
    patch_embeddings: tuple[str, ...] = ()
    """Layers that adapters leave alone unless they are named in full: their output feeds every other layer."""


UNET = Family(
    "diffusers UNet",
    roles={
        "attn.q": ("to_q",),
        "attn.k": ("to_k",),
        "attn.v": ("to_v",),
        "attn.out": ("to_out.0",),
        "mlp.in": ("ff.net.0.proj",),
        "mlp.out": ("ff.net.2",),
        "proj": ("proj_in", "proj_out"),
        "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
        "time": ("time_emb_proj",),
    },
    fused={"to_qkv": ("q", "k", "v"), "to_kv": ("k", "v")},
)
TRANSFORMERS = Family(
    "transformers: CLIP, ViT, DINOv2, Swin, PVT, ConvNeXt, in the names before and since version 5.9",
    roles={
        "attn.q": ("self_attn.q_proj", "attention.q_proj", "attention.query", "attention.self.query"),
        "attn.k": ("self_attn.k_proj", "attention.k_proj", "attention.key", "attention.self.key"),
        "attn.v": ("self_attn.v_proj", "attention.v_proj", "attention.value", "attention.self.value"),
        "attn.out": ("self_attn.out_proj", "attention.o_proj", "attention.output.dense"),
        "mlp.in": (
            "mlp.fc1",
            "intermediate.dense",
            "mlp.weights_in",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.dense1",
            "pwconv1",
        ),
        "mlp.out": ("mlp.fc2", "output.dense", "mlp.weights_out", "mlp.down_proj", "mlp.dense2", "pwconv2"),
        "conv": ("layer.0.convolution", "layer.1.convolution", "layer.2.convolution", "shortcut.convolution", "dwconv"),
    },
    patch_embeddings=("patch_embeddings.projection", "embeddings.patch_embedding"),
)
TIMM = Family(
    "timm: ViT, DeiT, BEiT, EVA, Swin, CaFormer, CoaT",
    roles={
        "attn.q": ("attn.q_proj",),
        "attn.k": ("attn.k_proj",),
        "attn.v": ("attn.v_proj",),
        "attn.out": ("attn.proj", "token_mixer.proj", "factoratt_crpe.proj"),
        "mlp.in": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.w12"),
        "mlp.out": ("mlp.fc2", "mlp.w3"),
        "proj": ("downsample.reduction",),
        "conv": ("token_mixer.pwconv1", "token_mixer.pwconv2", "token_mixer.dwconv", "downsample.conv"),
    },
    fused=dict.fromkeys(("attn.qkv", "token_mixer.qkv", "factoratt_crpe.qkv"), ("q", "k", "v")),
    weight_users={
        "timm.models.beit.Attention": ("qkv",),
        "timm.models.eva.EvaAttention": ("qkv",),
        "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    },
    mingled={
        "timm.models.efficientformer.Attention": "",
        "timm.models.gcvit.WindowAttentionGlobal": "use_global",
        "timm.models.maxxvit.AttentionCl": "",
        "timm.models.tiny_vit.Attention": "",
    },
    patch_embeddings=("patch_embed.proj", "stem.conv"),
)
TORCHVISION = Family(
    "torchvision: ViT, Swin",
    roles={"mlp.in": ("mlp.0",), "mlp.out": ("mlp.3",)},
    weight_users={
        "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("qkv", "proj"),
    },
    patch_embeddings=("conv_proj", "features.0.0"),
)
BUILT_IN = (UNET, TRANSFORMERS, TIMM, TORCHVISION)


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """The built-in families and those of plug-ins."""
    extra = plugins.load_all("visionlora.families")
    return BUILT_IN + tuple(f for f in extra.values() if isinstance(f, Family))


@lru_cache(maxsize=1)
def role_names() -> dict[str, str]:
    """Name of a layer -> its role."""
    return {name: role for f in families() for role, names in f.roles.items() for name in names}


@lru_cache(maxsize=1)
def fused_names() -> dict[str, tuple[str, ...]]:
    """Name of a fused layer -> its parts."""
    return {name: parts for f in families() for name, parts in f.fused.items()}


@lru_cache(maxsize=1)
def weight_users() -> dict[str, tuple[str, ...]]:
    """Class -> children whose weights it uses."""
    return {cls: children for f in families() for cls, children in f.weight_users.items()}


@lru_cache(maxsize=1)
def mingled() -> dict[str, str]:
    """Class -> the attribute that says that its fused layers have no parts."""
    return {cls: attribute for f in families() for cls, attribute in f.mingled.items()}


@lru_cache(maxsize=1)
def patch_embeddings() -> tuple[str, ...]:
    """Names of patch embeddings."""
    return tuple(name for f in families() for name in f.patch_embeddings)


LONGEST = 4
"""Parts of the longest name in a table."""


def lookup(name: str, table: Mapping[str, object]) -> str | None:
    """The longest entry of a table that `name` ends with, on a dot boundary.

    >>> lookup("layer.0.attention.output.dense", {"output.dense": 1, "attention.output.dense": 2})
    'attention.output.dense'
    """
    parts = name.split(".")
    for k in range(min(LONGEST, len(parts)), 0, -1):
        if (end := ".".join(parts[-k:])) in table:
            return end
    return None
