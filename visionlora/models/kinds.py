"""Refuses models that are no text-to-image Stable Diffusion, or one that would be trained as something else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionlora.config.choices import EMBEDDED_SD
from visionlora.errors import ModelError, nearest
from visionlora.models.checkpoint_header import PREDICTION, WORDS, CheckpointHeader

DEFAULT_ON_GPU = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
OTHERS = {
    "Flux": "FLUX", "StableDiffusion3": "Stable Diffusion 3", "PixArt": "PixArt", "Sana": "Sana", "Kolors": "Kolors",
    "Kandinsky": "Kandinsky", "HunyuanDiT": "Hunyuan-DiT", "QwenImage": "Qwen-Image", "IF": "DeepFloyd IF",
    "StableCascade": "Stable Cascade", "Wuerstchen": "Wuerstchen", "AuraFlow": "AuraFlow", "Lumina": "Lumina",
    "StableVideo": "Stable Video Diffusion", "AnimateDiff": "AnimateDiff", "StableAudio": "Stable Audio",
}  # fmt: skip
"""Families that visionlora does not open, by what the names of their pipelines begin with."""
REFINER = "SDXL's refiner, which only finishes pictures"


def check_index(source: str, index: Mapping[str, Any]) -> None:
    """Raises ModelError for a model of another kind, by its model_index.json, before gigabytes are read."""
    kind = str(index.get("_class_name", "pipeline"))
    family = next((name for start, name in OTHERS.items() if kind.startswith(start)), None)
    if family is None and (index.get("unet") or [None])[0] is not None:
        return
    raise not_ours(source, f"{family or 'a model of another kind'} ({kind})")


def not_ours(id: str, what: str) -> ModelError:
    """For a model that is something else."""
    return ModelError(
        f"{id} is {what}; visionlora opens text-to-image models of Stable Diffusion 1.x, 2.x and XL. "
        f"Give one of these, or {EMBEDDED_SD}."
    )


def check_prediction(path: Path, header: CheckpointHeader) -> None:
    """Raises ModelError for a checkpoint that says to predict what nobody knows; it would be trained as if it were noise."""
    if (said := header.prediction_type) is None or said in PREDICTION_TYPES:
        return
    hint = nearest(said.lower(), WORDS)
    if "flow" in said.lower() or said.lower() == "rf":
        hint = f"That is flow matching; visionlora trains models that predict {', '.join(PREDICTION_TYPES)}."
    raise ModelError(
        f"The checkpoint {path} cannot be opened: it says in its header that it predicts {said!r} ({PREDICTION}). {hint} Use a "
        f"Stable Diffusion 1.x, 2.x or XL base such as {DEFAULT_ON_GPU}, or have its author's header corrected."
    )


def check_noise(id: str, pipe: Any) -> None:
    """Raises ModelError for noise levels, predictions or latents that training would replace by others."""
    config = pipe.scheduler.config
    has_betas = config.get("beta_schedule") is not None or config.get("trained_betas") is not None
    kind, predicts = type(pipe.scheduler).__name__, str(config.get("prediction_type"))
    flows = config.get("use_flow_sigmas") or "flow" in f"{kind} {predicts}".lower()
    if not has_betas or flows:
        noise = "EDM noise levels" if kind.startswith("EDM") else "flow matching" if flows else "other noise"
        raise ModelError(
            f"{id} has a {kind}, so it was trained with {noise}; visionlora trains models whose noise is given by betas and "
            f"that predict {', '.join(PREDICTION_TYPES)}. Use a Stable Diffusion 1.x, 2.x or XL base such as {DEFAULT_ON_GPU}."
        )
    if predicts not in PREDICTION_TYPES:
        raise ModelError(
            f"{id} has the prediction_type {predicts!r} in its scheduler_config.json, which nobody knows. "
            f"{nearest(WORDS.get(predicts.lower(), predicts), PREDICTION_TYPES)} Write it there as its author says."
        )
    for name in ("latents_mean", "shift_factor"):
        if pipe.vae.config.get(name):
            raise ModelError(
                f"The VAE of {id} shifts its latents ({name}), which visionlora's training does not. Use a Stable Diffusion "
                f"1.x, 2.x or XL base such as {DEFAULT_ON_GPU}."
            )


def check_kinds(id: str, pipe: Any) -> None:
    """Raises ModelError for a UNet that wants more than text, or a VAE that does not say how its latents are scaled."""
    config = pipe.unet.config
    added = {"text_time"} if hasattr(pipe, "text_encoder_2") else set()
    settings = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type")
    wants = {name: config.get(name) for name in settings if config.get(name) not in (None, *added)}
    if wants:
        said = ", ".join(f"{name} {value!r}" for name, value in wants.items())
        raise not_ours(id, f"a model whose UNet reads more than text ({said})")
    scale = pipe.vae.config.get("scaling_factor")
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ModelError(
            f"The VAE of {id} has the scaling_factor {scale!r} in its config.json, by which latents are multiplied. Write it "
            "there as its author says: 0.18215 for Stable Diffusion 1.x and 2.x, 0.13025 for XL."
        )


def check_trains(id: str, pipe: Any) -> None:
    """Raises ModelError for what draws and does not train.

    That is a VAE whose latents have no mean and spread, and a UNet that reads the guidance beside the text: training has
    none to give it.
    """
    unet = pipe.unet
    if (kind := type(pipe.vae).__name__) not in ("AutoencoderKL", "AsymmetricAutoencoderKL"):
        raise ModelError(
            f"The VAE of {id} is of the kind {kind}; visionlora trains on the latents of an AutoencoderKL. Put that of the "
            "base it came from into its folder, and its name into model_index.json."
        )
    if unet.config.get("time_cond_proj_dim") is None:
        return
    raise ModelError(
        f"{id} was made to draw in a few steps, as latent consistency models are: its UNet reads the guidance too "
        f"(time_cond_proj_dim {unet.config.time_cond_proj_dim}), and would unlearn that. Train on the base that it was made "
        "from; vl.attach puts that adapter on a pipeline of this model too."
    )
