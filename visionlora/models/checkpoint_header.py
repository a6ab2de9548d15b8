"""What a single-file checkpoint says of its model, read without its weights: the names of its tensors, and its metadata."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.formats.container import is_pickle, read_header
from visionlora.formats.read import CHECKPOINT, EMBEDDING, format_of

INPUTS = "input_blocks."
"""Begins the names of the layers that every UNet has."""
PARTS = {
    "UNet": ("down_blocks.", INPUTS),
    "VAE": ("decoder.",),
    "text encoder": ("text_model.", "embeddings.token_"),
}
"""What the names of a part's tensors begin with where nothing stands before them, as in diffusers' folders."""
UNET = "model.diffusion_model."
IN_CHECKPOINTS = {
    "UNet": (UNET,),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.", "conditioner.embedders."),
}
"""What the names of a part's tensors begin with in whole checkpoints."""
OLDEST_ENCODER = "cond_stage_model.transformer.embeddings."
"""Begins the names of a text encoder that diffusers does not read, as transformers had them before text_model."""
SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")
"""End the names of scales of weights in eight bits, without which these mean nothing."""
AVERAGED = "model_ema."
"""Begins the names of the averaged weights of a UNet, which stand beside the others and are not read."""
OTHER_BLOCKS = ("double_blocks.", "joint_blocks.", "single_blocks.", "transformer_blocks.", "double_layers.")
"""Begin those of FLUX, Stable Diffusion 3 and their like, which have none."""
NO_UNET = (
    "has no UNet: it is of another family, such as FLUX or Stable Diffusion 3; visionlora opens text-to-image models of "
    "Stable Diffusion 1.x, 2.x and XL."
)
SIZES_OF_XL = f"{UNET}label_emb."
"""Begins the names of the layers by which the UNet of SDXL reads sizes."""
ADAPTER = "is an adapter, not a base model: draw with it by --lora, learn on from it by start_from=."
"""What a model is not, as a sentence that continues a name."""
SECOND_ENCODER = "conditioner.embedders.1."
"""Begins the names of SDXL's second text encoder."""
FIRST_ENCODER = "conditioner.embedders.0."
"""Begins the names of its first."""
REFINERS_ENCODER = "conditioner.embedders.0.model."
"""Begins the names of the one that its refiner has: the same in the first place."""
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Tensors whose mere names say that a model predicts the velocity, and that its last noise level is nothing but noise."""
EDM = ("edm_vpred.", "edm_mean")
"""Begin the names of tensors that tell of EDM's noise levels (CosXL, Playground 2.5)."""
OTHER_NOISE = (
    "was trained with EDM noise levels; visionlora trains models whose noise is given by betas, Stable Diffusion 1.x, 2.x and "
    "XL."
)
GUIDANCE = ".cond_proj.weight"
"""Ends the name of the layer by which a UNet reads the guidance, which diffusers leaves out."""
FEW_STEPS = (
    "was made to draw in a few steps, as latent consistency models are, and the layer by which its UNet reads the guidance "
    "is not read from single files: take its diffusers folder."
)
PREDICTION = "modelspec.prediction_type"
"""Says in the metadata what a model predicts."""
ARCHITECTURE = "modelspec.architecture"
BY_ARCHITECTURE = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
"""What models predict whose metadata says their architecture so."""
WORDS = {
    **dict.fromkeys(("v", "v_pred", "velocity", "v_prediction"), "v_prediction"),
    **dict.fromkeys(("eps", "epsilon"), "epsilon"),
    "sample": "sample",
}
"""What is said of a prediction, in diffusers' words."""


@dataclass(frozen=True)
class CheckpointHeader:
    """What is known of a checkpoint by its header."""

    is_xl: bool
    """Whether it has the second text encoder of SDXL."""
    is_refiner: bool
    """Whether it is that of SDXL, which has the second text encoder alone."""
    prediction_type: str | None
    """In diffusers' words; as the metadata has it where nobody knows that word, and None when it says nothing."""
    zero_snr: bool
    """Whether the last noise level is nothing but noise, for a model that predicts the velocity."""
    other: str | None = None
    """What it is where it is surely no whole model, and what to do with it: a sentence that continues its name."""

    @classmethod
    def of(cls, names: Iterable[str], metadata: Mapping[str, Any]) -> CheckpointHeader:
        """From the names of the tensors and the metadata."""
        known = set(names)
        said = str(metadata.get(PREDICTION) or BY_ARCHITECTURE.get(str(metadata.get(ARCHITECTURE)), "")).strip()
        prediction = (
            "v_prediction" if V_PREDICTION in known else WORDS.get(said.lower().replace("-", "_"), said) or None
        )
        return cls(
            any(name.startswith(SECOND_ENCODER) for name in known),
            any(name.startswith(REFINERS_ENCODER) for name in known), prediction,
            prediction == "v_prediction" and ZERO_SNR in known, other_kind(known, metadata),
        )  # fmt: skip

    @property
    def words(self) -> str:
        """What differs from its family, as a sentence that continues a line; empty for nothing."""
        if self.prediction_type != "v_prediction":
            return ""
        more = ", with a last noise level of nothing but noise (ztsnr)" if self.zero_snr else ""
        return f" It predicts the velocity (v_prediction){more}, says its header."

    def scheduler(self, given: Any) -> Any:
        """A pipeline's scheduler with what the checkpoint says, that of its family elsewhere."""
        if self.zero_snr:
            from diffusers import DDPMScheduler  # not every scheduler has such a level

            more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            return DDPMScheduler.from_config({**given.config, **more})
        if self.prediction_type is None:
            return given
        return type(given).from_config({**given.config, "prediction_type": self.prediction_type})


def other_kind(names: Collection[str], metadata: Mapping[str, Any]) -> str | None:
    """`CheckpointHeader.other`, by the names of the tensors."""
    if any(name.startswith((*CHECKPOINT, AVERAGED)) for name in names):
        return lacking(names)
    if "visionlora" in metadata or format_of(names) != EMBEDDING:
        return ADAPTER
    if any(name.startswith(OTHER_BLOCKS) for name in names):
        return NO_UNET
    part = next((part for part, starts in PARTS.items() if any(name.startswith(starts) for name in names)), None)
    return part and (
        f"is a {part} alone: name the folder of the whole model, which holds model_index.json, unet, vae and text_encoder."
    )


def lacking(names: Collection[str]) -> str | None:
    """The parts that a checkpoint has not, as `CheckpointHeader.other`; None for a whole one."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if has(UNET) and not has(UNET + INPUTS):
        return NO_UNET
    if has(*EDM):
        return OTHER_NOISE
    if any(name.startswith(UNET) and name.endswith(GUIDANCE) for name in names):
        return FEW_STEPS
    if any(name.endswith(SCALES) for name in names):
        return "holds weights in eight bits with scales beside them, which only some programs read: take it in fp16."
    missing = [part for part, starts in IN_CHECKPOINTS.items() if not has(*starts)]
    if has(SECOND_ENCODER, SIZES_OF_XL) and "text encoder" not in missing:
        encoders = {"first text encoder": FIRST_ENCODER, "second text encoder": SECOND_ENCODER}
        missing += [part for part, start in encoders.items() if not has(start)]
    if not missing:
        return None
    there = " (it has its averaged weights alone, model_ema)" if "UNet" in missing and has(AVERAGED) else ""
    there += " (it has one in the oldest layout, without text_model)" if has(OLDEST_ENCODER) else ""
    return (
        f"has no {', no '.join(missing)}{there}, so it is no whole model: take the full checkpoint, or a diffusers folder "
        "that holds model_index.json, unet, vae and text_encoder."
    )


def read_checkpoint_header(path: Path) -> CheckpointHeader:
    """Reads it.

    Raises:
        OSError: when the file cannot be read.
        AdapterFileError: when it is not whole.
    """
    if is_pickle(path):
        return CheckpointHeader.of(pickled_names(path), {})
    header = read_header(path)
    return CheckpointHeader.of(header.tensors, header.metadata)


def pickled_names(path: Path) -> set[str]:
    """Every string in the index of a .ckpt that torch wrote, unpickling nothing; none of one from before torch 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            data = archive.read(index) if index else b""
        return {given for _, given, _ in pickletools.genops(data) if isinstance(given, str)} if data else set()
    except (zipfile.BadZipFile, ValueError):
        return set()
