"""What a train-sd run says about itself: in the adapter's header, for other tools, and in the run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visionlora import __version__
from visionlora.config import TrainSDConfig
from visionlora.data.folder import ImageFolder
from visionlora.diffusion.validation import Evaluation
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import Handle
from visionlora.models.base import EMBEDDED, BaseModel
from visionlora.report.card import model_card
from visionlora.report.curves import draw_curves
from visionlora.report.environment import environment
from visionlora.report.runfolder import RunFolder
from visionlora.report.samples import SampleSheet
from visionlora.training.loop import LoopConfig, Progress, recent_loss
from visionlora.training.settings import adapter_config


def ranks_of(config: TrainSDConfig, handle: Handle) -> str:
    """The rank, or what rank auto came to."""
    if config.rank != "auto" or not handle.report.ranks:
        return f"rank {config.rank}"
    ranks = list(handle.report.ranks.values())
    return f"ranks {min(ranks)} to {max(ranks)} on {len(ranks)} layers (auto)"


def data_hash(folder: ImageFolder) -> str:
    """SHA-256 over the content hashes and captions of the training pictures."""
    lines = sorted(f"{item.sha256} {item.caption}" for item in folder.items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def header(
    config: TrainSDConfig,
    adapter: AdapterConfig,
    loop: LoopConfig,
    base: BaseModel,
    fingerprints: Mapping[str, Any],
    folder: ImageFolder,
    size: int,
    step: int,
) -> dict[str, Any]:
    """What the adapter file says about itself."""
    return {
        "version": __version__,
        "base": {"id": base.id, "fingerprints": dict(fingerprints)},
        "method": config.method,
        "config": adapter.to_dict(),
        "trigger": trigger(folder),
        "training": {
            "steps": step,
            "pictures": len(folder.items),
            "resolution": size,
            "batch": loop.batch_size * loop.gradient_accumulation,
            "learning_rate": loop.learning_rate,
            "seed": config.seed,
            "data_sha256": data_hash(folder),
        },
    }


def trigger(folder: ImageFolder) -> str | None:
    """The caption, when all pictures share one."""
    captions = {item.caption for item in folder.items}
    return captions.pop() if len(captions) == 1 else None


def public_metadata(
    config: TrainSDConfig, adapter: AdapterConfig, loop: LoopConfig, base: BaseModel, folder: ImageFolder, size: int,
    started: float,
) -> dict[str, str]:  # fmt: skip
    """`ss_*` and `modelspec.*` entries that A1111, ComfyUI and Civitai show (modelspec 1.0.1)."""
    family = "stable-diffusion-v2-512" if base.pipe.unet.config.cross_attention_dim == 1024 else "stable-diffusion-v1"
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.effective_alpha),
        "ss_base_model_version": "sd_v2" if "v2" in family else "sd_v1",
        "ss_v2": str("v2" in family),
        "ss_sd_model_name": base.id,
        "ss_learning_rate": str(loop.learning_rate),
        "ss_steps": str(loop.steps),
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(folder.items)),
        "ss_resolution": f"({size}, {size})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "visionlora",
        "modelspec.title": Path(config.images).resolve().name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.fromtimestamp(started, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(base.prediction_type, base.prediction_type),
        **({"modelspec.trigger_phrase": word} if (word := trigger(folder)) else {}),
    }


def report(
    run: RunFolder,
    config: TrainSDConfig,
    loop: LoopConfig,
    base: BaseModel,
    folder: ImageFolder,
    handle: Handle,
    sheet: SampleSheet,
    history: list[Progress],
    evaluations: Sequence[Evaluation],
    seconds: float,
) -> None:
    """grid.png, loss.png, README.md and run.json."""
    name = Path(config.images).resolve().name
    run.write_picture("grid.png", sheet.grid(f"{name}: {loop.steps} steps, rank {config.rank}"))
    draw_curves(
        run.path / "loss.png",
        {"training" if evaluations else "loss": [(p.step, p.loss) for p in history]}
        | ({"validation": [(e.step, e.loss) for e in evaluations]} if evaluations else {}),
        xlabel="step",
        ylabel="denoising loss",
        title=f"Training on {name}",
    )
    adapter, source = handle.config or adapter_config(config), "assets/emoji-64" if base.id == EMBEDDED else base.source
    facts = {
        "Base model": base.id,
        "Pictures": str(len(folder.items)),
        "Method": f"{config.method}, {ranks_of(config, handle)}, alpha {adapter.effective_alpha:g}, targets {config.targets}",
        "Trained parameters": f"{handle.report.trained_parameters:,}",
        "Steps": f"{loop.steps} of {loop.batch_size * loop.gradient_accumulation} pictures",
        "Learning rate": f"{loop.learning_rate:g}",
        "Seed": str(config.seed),
    }
    usage = (
        "from diffusers import StableDiffusionPipeline\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{source}")\n'
        f'pipe.load_lora_weights("{run.path.name}", weight_name="adapter.safetensors")\n'
        f"pipe({sheet.prompts[0]!r}).images[0]"
    )
    run.write_text(
        "README.md",
        model_card(
            title=name,
            base_model=base.id,
            trigger=trigger(folder),
            facts=facts,
            samples=sheet.last_samples(),
            usage=usage,
            images_note=f"{len(folder.items)} pictures; {folder.caption_source}",
            license=None,
        ),
    )
    run.write_json(
        "run.json",
        {
            **environment(("diffusers", "transformers", "accelerate")),
            "seed": config.seed,
            "data_sha256": data_hash(folder),
            "base": base.id,
            "seconds": round(seconds, 1),
            "first_loss": history[0].loss,
            "last_loss": recent_loss(history),
            "images": [{"file": str(i.path.relative_to(folder.root)), "sha256": i.sha256} for i in folder.items],
        },
    )
