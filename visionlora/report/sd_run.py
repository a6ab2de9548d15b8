"""What a train-sd run says about itself: in the adapter's header, for other tools, and in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visionlora import __version__
from visionlora.config import TrainSDConfig
from visionlora.config.choices import WHOLE, WITHOUT
from visionlora.data.folder import ImageFolder, ImageItem
from visionlora.data.learned import Learned, history
from visionlora.data.tags import tag_counts, whole_caption
from visionlora.diffusion.encode import Encoded
from visionlora.diffusion.prompts import too_long
from visionlora.diffusion.validation import Evaluation
from visionlora.formats import diffusers
from visionlora.formats.families import FAMILIES, family_of_unet
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.handle import Handle
from visionlora.models.base import EMBEDDED, BaseModel
from visionlora.report.card import model_card
from visionlora.report.curves import draw_curves
from visionlora.report.environment import environment
from visionlora.report.resume import LearnedFrom, changed
from visionlora.report.runfolder import RunFolder
from visionlora.report.samples import SampleSheet
from visionlora.training.loop import LoopConfig, Progress, process_state, recent_loss
from visionlora.training.settings import adapter_config

MOST_TAGS = 100
"""That an adapter names."""


def ranks_of(config: TrainSDConfig, handle: Handle) -> str:
    """The rank, or what rank auto came to, or what the run learned on from."""
    ranks = list(handle.report.ranks.values())
    if not ranks:
        return f"rank {config.rank}"
    if len(set(ranks)) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {min(ranks)} to {max(ranks)} on {len(ranks)} layers" + (" (auto)" if config.rank == "auto" else "")


def alpha_of(config: TrainSDConfig, adapter: AdapterConfig) -> str:
    """Alpha, in words where rank auto gives each layer one of its own."""
    if config.rank != "auto":
        return f"alpha {adapter.effective_alpha:g}"
    if adapter.alpha is None:
        return "alpha as the rank"
    return f"alpha {adapter.alpha:g} at rank {adapter.rank} and the same scaling at others"


def pictures_per_step(loop: LoopConfig) -> int:
    """On all processes together."""
    return int(loop.batch_size * loop.gradient_accumulation * process_state().num_processes)


def data_hash(folder: ImageFolder) -> str:
    """SHA-256 over the training pictures: their contents and masks, captions, and how often each counts."""
    lines = sorted(f"{item.content} {item.repeats} {item.caption}" for item in folder.items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def learned_from(folder: ImageFolder, apart: Sequence[ImageItem], base: str) -> LearnedFrom:
    """What a run learns from, and by which pictures it is judged."""
    sides = (("train", folder.items), ("val", apart))
    pictures = tuple(
        (item.sha256, side, f"{item.caption} {item.repeats} {item.mask_sha256 or ''}".rstrip())
        for side, items in sides
        for item in items
    )
    return LearnedFrom(data_hash(folder), pictures, base=base)


def header(
    config: TrainSDConfig,
    adapter: AdapterConfig,
    loop: LoopConfig,
    base: BaseModel,
    fingerprints: Mapping[str, Any],
    folder: ImageFolder,
    size: int,
    step: int,
    first: Adapter | None,
) -> dict[str, Any]:
    """What the adapter file says about itself; `first` is what it learned on from."""
    learned, before = Learned.of(item.sha256 for item in folder.items), None if first is None else first.info
    return {
        "version": __version__,
        "base": {"id": base.address, "fingerprints": dict(fingerprints)},
        "method": config.method,
        "config": adapter.to_dict(),
        "trigger": config.token or trigger(folder),
        "training": {
            "steps": step,
            "pictures": len(folder.items),
            "resolution": size,
            "batch": pictures_per_step(loop),
            "learning_rate": loop.learning_rate,
            "seed": config.seed,
            "data_sha256": data_hash(folder),
            **({} if base.clip_skip == 1 else {"clip_skip": base.clip_skip}),
            **({"zero_terminal_snr": True} if config.zero_terminal_snr else {}),
            **({} if config.windows == 1 else {"max_token_length": config.max_token_length}),
            **history(learned, config.start_from, before),
        },
    }


def trigger(folder: ImageFolder) -> str | None:
    """The caption, when all pictures share one; of choices in it, one that was learned."""
    captions = {item.caption for item in folder.items}
    return whole_caption(captions.pop()) if len(captions) == 1 else None


def shared_tags(folder: ImageFolder) -> dict[str, int]:
    """The most frequent tags, by which other programs find the words that call an adapter.

    Those of one picture alone are left out: they call nothing, and what a caption says of one is not for every reader.
    """
    counts = tag_counts(item.caption for item in folder.items)
    return {tag: count for tag, count in list(counts.items())[:MOST_TAGS] if count > 1}


def public_metadata(
    config: TrainSDConfig, adapter: AdapterConfig, loop: LoopConfig, base: BaseModel, folder: ImageFolder, size: int,
    step: int, started: float,
) -> dict[str, str]:  # fmt: skip
    """`ss_*` and `modelspec.*` entries that A1111, ComfyUI and Civitai show (modelspec 1.0.1)."""
    family, _ = family_of_unet(base.pipe.unet.config)
    family = family or FAMILIES[0]  # a model of its own kind, read as Stable Diffusion 1.x are
    architecture, second = family.architecture, family.name == "sd2"
    if second and base.prediction_type == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.effective_alpha),
        "ss_base_model_version": family.kohya_version,
        "ss_v2": str(second),
        "ss_sd_model_name": base.address,
        "ss_learning_rate": str(loop.learning_rate),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(folder.items)),
        "ss_resolution": f"({size}, {size})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "visionlora",
        "modelspec.title": config.title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.fromtimestamp(started, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(base.prediction_type, base.prediction_type),
        "ss_clip_skip": "None" if base.clip_skip == 1 else str(base.clip_skip),
        **({"ss_zero_terminal_snr": "True"} if config.zero_terminal_snr else {}),
        **({} if config.windows == 1 else {"ss_max_token_length": str(config.max_token_length)}),
        **({"modelspec.trigger_phrase": word} if (word := config.token or trigger(folder)) else {}),
        **({"ss_tag_frequency": json.dumps({config.title: tags})} if (tags := shared_tags(folder)) else {}),
    }


def method_of(config: TrainSDConfig, handle: Handle) -> str:
    """The method with those of its settings that it has."""
    if config.method in WHOLE:
        return config.method
    adapter, before = handle.config or adapter_config(config), config.start_from and Path(config.start_from).name
    words = {"rank": ranks_of(config, handle), "alpha": alpha_of(config, adapter)}
    own = [word for name, word in words.items() if name not in WITHOUT.get(config.method, ())]
    return ", ".join([config.method, *own, f"targets {f'of {before}' if before else config.targets}"])


def beside_unet(config: TrainSDConfig, loop: LoopConfig) -> dict[str, str]:
    """What learned with the UNet and what it was held to, for the model card."""
    found = {}
    if config.train_text_encoder:
        rate = config.text_encoder_learning_rate or loop.learning_rate / 2
        until = f", for {config.text_encoder_stop:.0%} of the steps" if config.text_encoder_stop < 1 else ""
        found["Text encoders"] = f"trained too, at {rate:g}{until}"
    if config.token is not None:
        rate = config.token_learning_rate or 5 * loop.learning_rate
        found["Learned word"] = f"{config.token}, {config.token_vectors} x, at {rate:g}"
    if config.prior_prompt is not None:
        how = "the base's predictions" if config.prior_images is None else "pictures"
        found["Class"] = f"{config.prior_prompt}, kept by {how}, weight {config.prior_weight:g}"
    return found


def facts(
    config: TrainSDConfig, loop: LoopConfig, base: BaseModel, folder: ImageFolder, handle: Handle, trained: int, step: int
) -> dict[str, str]:  # fmt: skip
    """How it was trained, for the model card; `trained` counts the parameters of all that learned, `step` its steps."""
    before = config.start_from and Path(config.start_from).name
    return {
        "Base model": base.id,
        "Pictures": str(len(folder.items)),
        "Method": method_of(config, handle),
        **beside_unet(config, loop),
        "Trained parameters": f"{trained:,}",
        "Steps": f"{step} of {pictures_per_step(loop)} pictures",
        **({"Learned on from": before} if before else {}),
        "Learning rate": f"{loop.learning_rate:g}",
        "Seed": str(config.seed),
        **({} if base.clip_skip == 1 else {"Clip skip": str(base.clip_skip)}),
        **({} if config.windows == 1 else {"Longest captions": f"{config.max_token_length} tokens"}),
        **({"Noise levels": "end at nothing but noise (zero_terminal_snr)"} if config.zero_terminal_snr else {}),
    }


def usage(base: BaseModel, adapter: Adapter, run: Path, prompt: str) -> str:
    """Python that draws a picture, for the model card: with diffusers where that alone draws the same.

    Args:
        base: the model that was trained on.
        adapter: of the file.
        run: its folder.
        prompt: what to draw.
    """
    name, source = run.resolve().name, base.address
    if why := beyond_diffusers(base, adapter, prompt):
        return (
            f"import visionlora as vl  # diffusers alone draws otherwise: {why}\n\n"
            f"drawn = vl.generate(vl.GenerateConfig([{prompt!r}], loras=[({name!r}, 1.0)], model={source!r}))\n"
            "drawn[0].path"
        )
    pipeline = type(base.pipe).__name__
    classes, levels = pipeline, ""
    if adapter.zero_terminal_snr:
        classes = f"DDPMScheduler, {pipeline}"
        levels = (
            "pipe.scheduler = DDPMScheduler.from_config(\n"
            '    pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"\n'
            ")\n"
        )
    variant = "" if base.variant is None else f", variant={base.variant!r}"
    return (
        f"import torch\nfrom diffusers import {classes}\n\n"
        'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)\n'
        f"pipe = {pipeline}.from_pretrained({source!r}, torch_dtype=dtype{variant}).to(device)\n"
        f'pipe.load_lora_weights({name!r}, weight_name="adapter.safetensors")\n'
        f"{levels}pipe({prompt!r}).images[0]"
    )


def beyond_diffusers(base: BaseModel, adapter: Adapter, prompt: str) -> str | None:
    """What a picture needs that diffusers does not do with the file and the base alone; None where there is nothing."""
    if base.id == EMBEDDED:
        return "the base comes with visionlora"
    if Path(base.source).is_file():
        return "it does not read what the base says of its noise"
    if base.clip_skip != 1:  # nor does it with every version of transformers when told to: no attribute 'text_model'
        return f"it does not read the text {base.clip_skip} layers from the end (clip_skip)"
    if base.windows > 1 and too_long(base.pipe, prompt):
        return "it cuts long prompts"
    if adapter.embeddings:
        return f"it does not read the word {', '.join(adapter.embeddings)} in the file"
    if not diffusers.reads(adapter):
        kinds = dict.fromkeys(m.kind for m in adapter.modules.values())
        return f"it does not take {' and '.join(kinds)} as they are here"
    return None


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
    changes: Sequence[Mapping[str, Any]],
    data: Encoded,
    written: Adapter,
    trained: int,
) -> None:
    """grid.png, loss.png, README.md and run.json."""
    name, steps = config.title, history[-1].step
    if sheet.columns:
        how = ranks_of(config, handle) if handle.report.ranks else config.method
        run.write_picture("grid.png", sheet.grid(f"{name}: {steps} steps, {how}"))
    draw_curves(
        run.path / "loss.png",
        {"training" if evaluations else "loss": [(p.step, p.loss) for p in history]}
        | ({"validation": [(e.step, e.loss) for e in evaluations]} if evaluations else {}),
        xlabel="step",
        ylabel="denoising loss",
        title=f"Training on {name}",
    )
    run.write_text(
        "README.md",
        model_card(
            title=name,
            base_model=base.id,
            trigger=config.token or trigger(folder),
            facts=facts(config, loop, base, folder, handle, trained, steps) | changed(changes),
            samples=sheet.last_samples() if sheet.columns else [],
            usage=usage(base, written, run.path, sheet.prompts[0]),
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
            "noise_scale": history[-1].noise_scale,
            "changes": list(changes),
            "images": [
                {
                    "file": item.name,
                    "sha256": item.sha256,
                    "size": list(framing.original[::-1]),
                    "trained_at": list(framing.bucket[::-1]),
                }
                for item, framing in zip(folder.items, data.framings, strict=False)
            ],
        },
    )
