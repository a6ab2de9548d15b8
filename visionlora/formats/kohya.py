"""Writes the flat files of kohya's sd-scripts and of LyCORIS, which A1111, Forge and ComfyUI load.

``lora_unet_<path with _>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``; text encoders under ``lora_te_`` (SD 1.x, 2.x)
or ``lora_te1_`` and ``lora_te2_`` (SDXL), always with ``text_model_``. An SDXL UNet has the names of the original code
(``input_blocks_4_1_…``), all others diffusers'. DoRA adds ``dora_scale``; LoHa, LoKr, differences, (IA)³ and OFT have the
tensors of LyCORIS. The scale is alpha / rank; files of plain LoRA alone have one alpha for all layers, the most common, as
diffusers (0.42) gives a UNet's attention no other: what is missing is multiplied into ``lora_up``. Beside a
``text_projection`` all layers of its text encoder have one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.formats.families import family_of, flat_shapes
from visionlora.formats.header import hashed, most_common, network_metadata, write_file
from visionlora.formats.names import flattened, to_sgm, with_text_model
from visionlora.formats.whole import pipeline_layers
from visionlora.lora.adapter import PRODUCT_KINDS, Adapter, AdapterModule
from visionlora.lora.arithmetic import weight_shape

PROJECTION = "text_projection"
PLAIN = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


def write(adapter: Adapter, path: Path) -> None:
    """Writes atomically.

    Raises:
        AdapterFileError: when the format cannot hold the adapter, saying what and which one can, or the path cannot be
            written.
    """
    write_file(path, to_bytes(adapter))


def to_bytes(adapter: Adapter) -> bytes:
    """The whole file."""
    family = family_of(flat_shapes(adapter))
    there = {*adapter.components, *(c for own in adapter.embeddings.values() for c in own)}
    xl = "text_encoder_2" in there or (family is not None and family.name == "sdxl")
    tensors: dict[str, Tensor] = {}
    for component, path, module in with_one_alpha(with_one_rank(list(pipeline_layers(adapter, "kohya")))):
        tensors |= keyed(component, path, module, xl)
    for token, parts in adapter.embeddings.items():
        for component, vectors in parts.items():
            what = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component] if xl else "string_to_param.*"
            tensors[f"bundle_emb.{token}.{what}"] = vectors
    return hashed(tensors, {"format": "pt", **network_metadata(adapter)})


def with_one_rank(layers: list[tuple[str, str, AdapterModule]]) -> list[tuple[str, str, AdapterModule]]:
    """The layers, those of a text encoder with `text_projection` as wide as the widest of them.

    diffusers (0.42) takes its rank to be the most common of the others, and refuses the file where it is not. Other layers,
    and all where some are no LoRA, which it does not read anyway, stay as they are.
    """
    if not all(is_plain(m) for _, _, m in layers):
        return layers
    ranks: dict[str, int] = {}
    for component in {c for c, path, _ in layers if path == PROJECTION}:
        ranks[component] = max(m.rank for c, _, m in layers if c == component)
    return [(c, path, m.widened(ranks[c])) if m.rank < ranks.get(c, 0) else (c, path, m) for c, path, m in layers]


def is_plain(module: AdapterModule) -> bool:
    """Whether it is a LoRA and nothing else."""
    return module.kind == "lora" and not module.options


def with_one_alpha(layers: list[tuple[str, str, AdapterModule]]) -> list[tuple[str, str, AdapterModule]]:
    """The layers with the alpha of most of them, and the same ΔW to the rounding of fp32; as they are when some are no LoRA.

    A factor keeps its dtype where that holds the product exactly, and is fp32 elsewhere.
    """
    if not all(is_plain(m) for _, _, m in layers) or len({m.alpha for _, _, m in layers}) < 2:
        return layers
    alpha = most_common(m.alpha for _, _, m in layers if m.alpha)  # a layer of alpha 0 has ΔW 0 by any other
    found = []
    for component, path, m in layers:
        if m.alpha != alpha:
            up = m.tensors["lora_B"]
            product = up.double() * (m.alpha / alpha)
            wide = product.to(torch.promote_types(up.dtype, torch.float32))
            if not bool(torch.isfinite(wide).all()):
                return layers
            own = product.to(up.dtype)
            m = AdapterModule.lora(m.tensors["lora_A"], own if torch.equal(own.double(), product) else wide, alpha)
        found.append((component, path, m))
    return found


def flat_name(component: str, path: str, xl: bool) -> str:
    """The name of a layer in the file.

    >>> flat_name("unet", "up_blocks.0.upsamplers.0.conv", xl=True)
    'lora_unet_output_blocks_2_2_conv'
    >>> flat_name("text_encoder", "encoder.layers.0.mlp.fc1", xl=False)
    'lora_te_text_model_encoder_layers_0_mlp_fc1'
    """
    if component == "unet":
        flat = flattened(path)
        return "lora_unet_" + (to_sgm(flat) if xl else flat)
    prefix = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + flattened(with_text_model(component, path))


def keyed(component: str, path: str, module: AdapterModule, xl: bool) -> dict[str, Tensor]:
    """The tensors of one module under their names in the file.

    Raises:
        AdapterFileError: for kinds that the format has no way to hold.
    """
    if module.kind == "shift":
        layer, _, parameter = path.rpartition(".")
        value = module.tensors["shift"]
        norm = value.dim() == 1 and "norm" in layer.rpartition(".")[2]
        what = {"weight": "w_norm", "bias": "b_norm"} if norm else {"weight": "diff", "bias": "diff_b"}
        return {f"{flat_name(component, layer, xl)}.{what[parameter]}": value}
    start = flat_name(component, path, xl) + "."
    if module.kind == "oft":
        return {start + n: t for n, t in module.tensors.items()} | {
            start + "alpha": scalar(module.options["constraint"])
        }
    if module.kind == "ia3" and not module.options.get("bias", True):
        vector = module.tensors["vector"]
        change = vector if module.options.get("relative") else vector.double().sub(1).to(vector.dtype)
        return {start + "weight": change, start + "on_input": torch.tensor(int(bool(module.options.get("on_input"))))}
    if module.product not in PRODUCT_KINDS:
        why = "its (IA)³ scales biases too" if module.kind == "ia3" else f"a module of kind {module.kind}"
        raise AdapterFileError(
            f"A kohya file cannot hold {component}.{path}: {why}. Format visionlora keeps it; `visionlora extract` from a "
            "baked model gives a LoRA."
        )
    if "columns" in module.options:
        raise AdapterFileError(
            f"The width of {component}.{path} is not known: PEFT's VeRA shares one matrix for all. Format visionlora keeps it."
        )
    found = {start + PLAIN.get(n, n): t for n, t in module.product_tensors.items()}
    if module.product != "diff":
        found[start + "alpha"] = scalar(module.alpha)
    if module.kind == "dora":
        found[start + "dora_scale"] = column(module, weight_shape(f"{component}.{path}", [module]))
    return found


def scalar(value: float) -> Tensor:
    """A 0-dim fp32 tensor; fp64 where fp32 would change the value, as files are read with float()."""
    single = torch.tensor(float(value), dtype=torch.float32)
    return single if float(single) == float(value) else torch.tensor(float(value), dtype=torch.float64)


def column(module: AdapterModule, shape: Sequence[int] | None) -> Tensor:
    """The magnitudes as (o, 1, ...) or (1, i, ...), with as many dimensions as the weight, where its shape is known."""
    magnitude = module.tensors["magnitude"]
    ones = (1,) * ((len(shape) if shape else 2) - 2)
    return magnitude.view(1, -1, *ones) if module.options.get("axis") == "in" else magnitude.view(-1, 1, *ones)
