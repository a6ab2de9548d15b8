"""How files spell the name of a layer: dotted with a component before it, or flat as kohya, LyCORIS and sgm have it.

Names in memory are `component.path` with diffusers' paths (`unet.mid_block.attentions.0.proj_in`) and CLIP's with
`text_model.`, the spelling that other tools know. A flat name that is no name of Stable Diffusion stays flat, until a model
tells what it means (`visionlora.lora.names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version

FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "",
}
"""kohya's and LyCORIS' prefixes; what follows `lycoris_` may be any model's."""
COMFY_PREFIXES = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
"""ComfyUI's own, before sgm's names with dots and CLIP's."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
PEFT_PREFIX = "base_model.model."
UNET_BLOCKS = ("down_blocks.", "up_blocks.", "mid_block.")
"""What tells that names without a component are a UNet's; `conv_in` and the like may be anybody's."""
PROCESSOR = re.compile(r"^(?P<layer>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)$")

# ---------------------------------------------------------------------------------------------------------- flat names

TOKENS = tuple(
    (re.compile(pattern + r"(?=_|$)"), replacement)
    for pattern, replacement in (
        (r"(down_blocks|up_blocks|attentions|resnets|transformer_blocks|downsamplers|upsamplers)_(\d+)", r"\1.\2"),
        (r"(time_embedding|add_embedding)_(linear_[12])", r"\1.\2"),
        (r"(mid_block|conv_in|conv_out|conv_norm_out)", r"\1"),
        (r"(attn1|attn2)_(to_q|to_k|to_v)", r"\1.\2"),
        (r"(attn1|attn2)_to_out_0", r"\1.to_out.0"),
        (r"ff_net_0_proj", r"ff.net.0.proj"),
        (r"ff_net_2", r"ff.net.2"),
        (r"(proj_in|proj_out|conv_shortcut|time_emb_proj|conv1|conv2|conv|norm[123]?)", r"\1"),
        (r"(text_model|text_projection|final_layer_norm)", r"\1"),
        (r"encoder_layers_(\d+)", r"encoder.layers.\1"),
        (r"self_attn_([qkv]_proj|out_proj)", r"self_attn.\1"),
        (r"mlp_(fc[12])", r"mlp.\1"),
        (r"(layer_norm[12])", r"\1"),
        (r"embeddings_(token_embedding|position_embedding)", r"embeddings.\1"),
    )
)
"""The words that the names of Stable Diffusion's UNets and text encoders are made of, flat and dotted."""


def dotted(flat: str) -> str | None:
    """The dotted name of a flat one, when it is made of Stable Diffusion's words alone.

    >>> dotted("down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0'
    """
    parts, rest = [], flat
    while rest:
        for pattern, replacement in TOKENS:
            if match := pattern.match(rest):
                parts.append(match.expand(replacement))
                rest = rest[match.end() :].removeprefix("_")
                break
        else:
            return None
    return ".".join(parts)


def flattened(path: str) -> str:
    """As kohya and LyCORIS write a name.

    >>> flattened("mid_block.attentions.0.proj_in")
    'mid_block_attentions_0_proj_in'
    """
    return path.replace(".", "_")


# ------------------------------------------------------------------------------------------------------- sgm's names

SGM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SGM_ALONE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
DIFFUSERS_RESNET = {v: k for k, v in SGM_RESNET.items()}
DIFFUSERS_ALONE = {v: k for k, v in SGM_ALONE.items()}
SGM_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)")
SGM_MIDDLE = re.compile(r"middle_block_(\d)_(.+)")
LAYERS = 3
"""Of a block: two residual layers and a downsampler going in, three layers going out: so in every Stable Diffusion."""


def from_sgm(flat: str) -> str:
    """The flat diffusers name of a flat sgm (SDXL's original) name; other names as they are.

    >>> from_sgm("input_blocks_4_1_transformer_blocks_0_attn1_to_q")
    'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    """
    if flat in SGM_ALONE:
        return SGM_ALONE[flat]
    if match := SGM_MIDDLE.fullmatch(flat):
        place, rest = int(match[1]), match[2]
        if place == 1:
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{place // 2}_{SGM_RESNET.get(rest, rest)}"
    if not (match := SGM_BLOCK.fullmatch(flat)):
        return flat
    side, number, place, rest = match[1], int(match[2]), int(match[3]), match[4]
    block, layer = divmod(number - (side == "input_blocks"), LAYERS)
    start = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{block}_"
    if rest == "op":
        return start + "downsamplers_0_conv"
    if rest == "conv":
        return start + "upsamplers_0_conv"
    return start + (f"resnets_{layer}_{SGM_RESNET.get(rest, rest)}" if place == 0 else f"attentions_{layer}_{rest}")


def to_sgm(flat: str, attends: frozenset[int] = frozenset({0, 1})) -> str:
    """The flat sgm name of a flat diffusers name.

    Args:
        flat: of a UNet's layer.
        attends: the up blocks with attention, after which the upsampler is the third part of its layer, not the second;
            SDXL's by default.

    >>> to_sgm("up_blocks_0_upsamplers_0_conv")
    'output_blocks_2_2_conv'
    """
    if flat in DIFFUSERS_ALONE:
        return DIFFUSERS_ALONE[flat]
    if match := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(.+)", flat):
        if match[1] == "attentions":
            return f"middle_block_1_{match[3]}"
        return f"middle_block_{2 * int(match[2])}_{DIFFUSERS_RESNET.get(match[3], match[3])}"
    match = re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_(.+)", flat)
    if match is None:
        return flat
    side, block, what, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if what == "downsamplers":
        return f"input_blocks_{LAYERS * block + LAYERS}_0_op"
    if what == "upsamplers":
        return f"output_blocks_{LAYERS * block + 2}_{2 if block in attends else 1}_conv"
    start = (
        f"input_blocks_{LAYERS * block + 1 + layer}" if side == "down" else f"output_blocks_{LAYERS * block + layer}"
    )
    return f"{start}_1_{rest}" if what == "attentions" else f"{start}_0_{DIFFUSERS_RESNET.get(rest, rest)}"


# ----------------------------------------------------------------------------------------------------------- location


def locate(layer: str) -> tuple[str, str]:
    """(component, path) of the only layer of a file; see `locate_all`.

    >>> locate("lora_te1_encoder_layers_0_mlp_fc1")
    ('text_encoder', 'text_model.encoder.layers.0.mlp.fc1')
    >>> locate("lora_unet_middle_block_1_proj_in")
    ('unet', 'mid_block.attentions.0.proj_in')
    >>> locate("blocks.0.attn.qkv")
    ('model', 'blocks.0.attn.qkv')
    """
    return locate_all([layer])[layer]


def locate_all(layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{layer: (component, path)} of a file's names, in the spelling used in memory.

    Names that say no component belong to one model: a UNet when any of them is in a UNet's blocks, a text encoder when all
    are CLIP's, or else `model`.
    """
    found = {layer: spelled(layer) for layer in layers}
    bare = [path for component, path in found.values() if not component]
    rest = "model"
    if any(path.startswith(UNET_BLOCKS) for path in bare):
        rest = "unet"
    elif bare and all(path.startswith("text_model.encoder.") for path in bare):
        rest = "text_encoder"
    return {layer: (component or rest, path) for layer, (component, path) in found.items()}


@lru_cache(maxsize=1 << 15)
def spelled(layer: str) -> tuple[str, str]:
    """(component, path) of a name, the component empty where the name says none."""
    for prefix, component in FLAT_PREFIXES.items():
        if "." not in layer and layer.startswith(prefix):
            body = from_sgm(layer.removeprefix(prefix))
            return component, with_text_model(component, dotted(body) or body)
    for prefix, component in COMFY_PREFIXES.items():
        if layer.startswith(prefix) and (found := dotted(from_sgm(flattened(layer.removeprefix(prefix))))) is not None:
            return component, with_text_model(component, found)
    first, _, rest = layer.removeprefix(PEFT_PREFIX).partition(".")
    component, path = (first, rest) if first in COMPONENTS and rest else ("", layer.removeprefix(PEFT_PREFIX))
    ours = (
        component or ".processor." in path or path.startswith((*UNET_BLOCKS, "text_model."))
    )  # others' names are theirs
    if ours and (match := PROCESSOR.match(path)):  # the oldest spelling has the factors on the attention's processor
        clip = "self_attn" in match["layer"]
        last = {"out": "out_proj" if clip else "to_out.0"}.get(match["which"], match["which"] + "_proj" if clip else "")
        path = f"{match['layer']}.{last or 'to_' + match['which']}"
    return component, with_text_model(component, path)


def with_text_model(component: str, path: str) -> str:
    """CLIP's text encoders always with `text_model.`."""
    if component.startswith("text_encoder") and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        return "text_model." + path
    return path


def without_text_model(component: str, path: str) -> str:
    """As transformers names the layers of `CLIPTextModel` since 5.6; the second encoder of SDXL is another class.

    >>> without_text_model("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    'encoder.layers.0.mlp.fc1'
    """
    return path.removeprefix("text_model.") if component == "text_encoder" else path


def in_transformers(component: str, path: str) -> str:
    """As the transformers that is installed names a layer."""
    return without_text_model(component, path) if is_newer() else with_text_model(component, path)


@lru_cache(maxsize=1)
def is_newer() -> bool:
    """Whether the transformers that is installed is one since 5.6; looking takes as long as a layer."""
    first, second = version("transformers").split(".")[:2]
    return (int(first), int(second)) >= (5, 6)
