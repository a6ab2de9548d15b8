"""Image folder -> checked pictures -> latents and text -> training -> adapter file -> sample grid -> run folder.

The whole of `visionlora train-sd`, one stage after the other; each stage hands a small frozen object to the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visionlora import __version__
from visionlora.config import TrainSDConfig, to_yaml
from visionlora.data.folder import ImageFolder, read_image_folder
from visionlora.diffusion.encode import Encoded, encode_dataset
from visionlora.diffusion.objective import denoising_losses
from visionlora.diffusion.sampling import SamplingConfig, draw
from visionlora.errors import DataError
from visionlora.formats import native
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import Handle, inject
from visionlora.models.base import BaseModel, open_base
from visionlora.report.card import model_card
from visionlora.report.curves import draw_curves
from visionlora.report.grid import draw_grid
from visionlora.report.runfolder import RunFolder, check_run_folder, default_run_folder, open_run_folder
from visionlora.training.loop import LoopConfig, Progress, resolve_precision, train
from visionlora.training.order import generator_at


class Listener:
    """Where a run says what it does; the command line draws it, a program may ignore it."""

    def say(self, line: str) -> None:
        """One line for a person."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """A stage is `done` of `total`."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    grid: Path
    first_loss: float
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class DenoisingTask:
    """The data and the objective, as the training loop wants them."""

    data: Encoded
    noise_scheduler: Any
    caption_dropout: float

    def __len__(self) -> int:
        return len(self.data)

    def losses(self, model: nn.Module, index: Tensor, generator: torch.Generator, part: slice) -> Tensor:
        """Random numbers are drawn for the whole step and cut to `part`, so that every process draws the same."""
        n, data = len(index), self.data
        shape = (n, *data.mean.shape[2:])
        draw_noise, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        timesteps = torch.randint(self.noise_scheduler.config.num_train_timesteps, (n,), generator=generator)
        variant = torch.randint(data.mean.shape[1], (n,), generator=generator)
        drop = torch.rand(n, generator=generator) < self.caption_dropout
        device = next(model.parameters()).device
        latents = data.latents(index[part], variant[part], draw_noise[part]).to(device)
        text = torch.where(drop[part, None, None], data.empty_text, data.text[index[part]]).to(device)
        return denoising_losses(
            model, self.noise_scheduler, latents, text, noise[part].to(device), timesteps[part].to(device)
        )


def train_sd(config: TrainSDConfig, listener: Listener | None = None) -> RunResult:
    """Trains one adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after the adapter as it is was saved under `checkpoints/`.
    """
    started = time.monotonic()
    tell = listener or Listener()
    target = Path(config.output) if config.output else default_run_folder("sd", Path(config.images).resolve().name)
    check_run_folder(target)
    folder = read_image_folder(
        Path(config.images), config.prompt, skip_broken=config.skip_broken,
        progress=lambda done, total: tell.progress("Checking pictures", done, total),
    )  # fmt: skip
    for note in folder.notes:
        tell.say(note)
    tell.say(folder.caption_source)
    base = open_base(config.model)
    tell.say(base.why)
    size = config.resolution or base.resolution
    base.check_resolution(size)
    from accelerate import Accelerator, PartialState

    accelerator = Accelerator(mixed_precision=resolve_precision(config.precision, PartialState().device))
    for part in (base.pipe.unet, base.pipe.vae, base.pipe.text_encoder):
        part.to(accelerator.device)
    fingerprints = base.fingerprints()
    handle = inject(base.pipe.unet, adapter_config(config), seed=config.seed)
    tell.say(f"Adapter: {handle.report}.")
    data = encode_dataset(base, folder.items, size, config.flip, progress=tell.progress)
    run = open_run_folder(target)
    run.write_text("config.yaml", to_yaml(dataclasses.replace(config, output=None)))

    def adapter_now(step: int) -> Adapter:
        return Adapter(handle.modules("unet"), header(config, base, fingerprints, folder, size, step))

    prompts = config.sample_prompts or default_prompts(folder)
    sampler = Sampler(base, handle, prompts, size, config, run, tell)
    history = fit(accelerator, handle, DenoisingTask(data, base.pipe.scheduler, config.caption_dropout), config, run,
                  sampler, adapter_now, tell)  # fmt: skip
    adapter_path = run.path / "adapter.safetensors"
    native.write(adapter_now(config.steps), adapter_path, public_metadata(config, base, folder, size, history))
    if accelerator.is_main_process:
        report(run, config, base, folder, handle, sampler, history, time.monotonic() - started)
    seconds = time.monotonic() - started
    return RunResult(run.path, adapter_path, run.path / "grid.png", history[0].loss, mean_loss(history[-50:]), seconds)


def adapter_config(config: TrainSDConfig) -> AdapterConfig:
    """The adapter's share of the run configuration."""
    return AdapterConfig(rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout)


def loop_config(config: TrainSDConfig) -> LoopConfig:
    """The loop's share of the run configuration."""
    return LoopConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(LoopConfig)})


def fit(
    accelerator: Any,
    handle: Handle,
    task: DenoisingTask,
    config: TrainSDConfig,
    run: RunFolder,
    sampler: Sampler,
    adapter_now: Callable[[int], Adapter],
    tell: Listener,
) -> list[Progress]:
    """The training stage: metrics after each step, samples at the sample steps, and nothing lost on Ctrl-C."""
    history: list[Progress] = []
    sampler.draw_column("base", scale=0.0)

    def on_step(progress: Progress) -> None:
        history.append(progress)
        run.append_jsonl("metrics.jsonl", dataclasses.asdict(progress))
        recent = mean_loss(history[-50:])
        detail = f"loss {recent:.4f}  {progress.images_per_second:.1f} images/s"
        tell.progress("Training", progress.step, config.steps, detail)
        if progress.step in sampler.moments:
            sampler.draw_column(f"step {progress.step}", scale=1.0)
            native.write(adapter_now(progress.step), run.checkpoints / f"step-{progress.step:06d}.safetensors")

    try:
        train(accelerator, handle.model, handle.parameters(), task, loop_config(config), on_step)
    except KeyboardInterrupt:
        if history:
            kept = run.checkpoints / f"step-{history[-1].step:06d}.safetensors"
            native.write(adapter_now(history[-1].step), kept)
            tell.say(f"Interrupted at step {history[-1].step} of {config.steps}; the adapter so far is in {kept}.")
        raise
    return history


class Sampler:
    """Draws the columns of the sample grid: the same prompts and seed, the adapter at different moments."""

    def __init__(
        self, base: BaseModel, handle: Handle, prompts: tuple[str, ...], size: int, config: TrainSDConfig,
        run: RunFolder, tell: Listener,
    ) -> None:  # fmt: skip
        self.base, self.handle, self.prompts, self.size, self.run, self.tell = base, handle, prompts, size, run, tell
        self.settings = SamplingConfig(config.sample_steps, config.guidance_scale, config.seed)
        columns = min(config.sample_columns, config.steps)
        self.moments = {round(config.steps * (i + 1) / columns) for i in range(columns)}
        self.columns: list[tuple[str, list[Image.Image]]] = []

    def draw_column(self, label: str, scale: float) -> None:
        """One picture per prompt at the adapter's present state; also kept one by one under `samples/`."""
        self.handle.set_scale(scale)
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.tell.progress(f"Drawing samples ({label})", done, len(self.prompts))

        pictures = draw(self.base, self.prompts, self.size, self.settings, count)
        self.handle.set_scale(1.0)
        for i, picture in enumerate(pictures):
            picture.save(self.run.samples / f"{label.replace(' ', '-')}_{i:02d}.png")
        self.columns.append((label, pictures))

    def grid(self, title: str) -> Image.Image:
        """Rows: prompts; columns: base, then the adapter as it learned."""
        cells = [[column[row] for _, column in self.columns] for row in range(len(self.prompts))]
        caption = f"seed {self.settings.seed}, {self.settings.steps} steps, guidance {self.settings.guidance_scale:g}"
        return draw_grid(cells, self.prompts, [label for label, _ in self.columns], title=title, caption=caption)


def default_prompts(folder: ImageFolder) -> tuple[str, ...]:
    """Up to four different captions of the training pictures."""
    return tuple(dict.fromkeys(item.caption for item in folder.items))[:4]


def mean_loss(history: list[Progress]) -> float:
    """Mean loss over some steps."""
    if not history:
        raise DataError("There is no step to take a mean of.")
    return sum(p.loss for p in history) / len(history)


def data_hash(folder: ImageFolder) -> str:
    """SHA-256 over the content hashes and captions of the training pictures."""
    lines = sorted(f"{item.sha256} {item.caption}" for item in folder.items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def header(
    config: TrainSDConfig, base: BaseModel, fingerprints: Mapping[str, Any], folder: ImageFolder, size: int, step: int
) -> dict[str, Any]:
    """What the adapter file says about itself."""
    return {
        "version": __version__,
        "base": {"id": base.id, "fingerprints": dict(fingerprints)},
        "method": "lora",
        "config": adapter_config(config).to_dict(),
        "trigger": trigger(folder),
        "training": {
            "steps": step,
            "pictures": len(folder.items),
            "resolution": size,
            "batch": config.batch_size * config.gradient_accumulation,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "data_sha256": data_hash(folder),
        },
    }


def trigger(folder: ImageFolder) -> str | None:
    """The caption, when all pictures share one."""
    captions = {item.caption for item in folder.items}
    return captions.pop() if len(captions) == 1 else None


def public_metadata(
    config: TrainSDConfig, base: BaseModel, folder: ImageFolder, size: int, history: list[Progress]
) -> dict[str, str]:
    """`ss_*` and `modelspec.*` entries that A1111, ComfyUI and Civitai show (modelspec 1.0.1)."""
    family = "stable-diffusion-v2-512" if base.pipe.unet.config.cross_attention_dim == 1024 else "stable-diffusion-v1"
    adapter = adapter_config(config)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.effective_alpha),
        "ss_base_model_version": "sd_v2" if "v2" in family else "sd_v1",
        "ss_v2": str("v2" in family),
        "ss_sd_model_name": base.id,
        "ss_learning_rate": str(config.learning_rate),
        "ss_steps": str(config.steps),
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(folder.items)),
        "ss_resolution": f"({size}, {size})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family}/lora",
        "modelspec.implementation": "visionlora",
        "modelspec.title": Path(config.images).resolve().name,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(base.prediction_type, base.prediction_type),
        **({"modelspec.trigger_phrase": word} if (word := trigger(folder)) else {}),
    }


def report(
    run: RunFolder, config: TrainSDConfig, base: BaseModel, folder: ImageFolder, handle: Handle, sampler: Sampler,
    history: list[Progress], seconds: float,
) -> None:  # fmt: skip
    """grid.png, loss.png, README.md and run.json."""
    name = Path(config.images).resolve().name
    sampler.grid(f"{name}: {config.steps} steps, rank {config.rank}").save(run.path / "grid.png")
    draw_curves(run.path / "loss.png", {"loss": [(p.step, p.loss) for p in history]}, xlabel="step",
                ylabel="denoising loss", title=f"Training on {name}")  # fmt: skip
    samples = [(p, f"samples/step-{max(sampler.moments)}_{i:02d}.png") for i, p in enumerate(sampler.prompts)]
    facts = {
        "Base model": base.id,
        "Pictures": str(len(folder.items)),
        "Method": f"LoRA, rank {config.rank}, alpha {adapter_config(config).effective_alpha:g}, targets {config.targets}",
        "Trained parameters": f"{handle.report.trained_parameters:,}",
        "Steps": f"{config.steps} of {config.batch_size * config.gradient_accumulation} pictures",
        "Learning rate": f"{config.learning_rate:g}",
        "Seed": str(config.seed),
    }
    usage = (
        "from diffusers import StableDiffusionPipeline\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{base.source if base.id != "emoji-64" else "assets/emoji-64"}")\n'
        f'pipe.load_lora_weights("{run.path.name}", weight_name="adapter.safetensors")\n'
        f"pipe({sampler.prompts[0]!r}).images[0]"
    )
    run.write_text("README.md", model_card(title=name, base_model=base.id, trigger=trigger(folder), facts=facts,
                                           samples=samples, usage=usage, images_note="grid.png", license=None))  # fmt: skip
    import accelerate
    import diffusers
    import transformers

    run.write_json("run.json", {
        "visionlora": __version__,
        "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__,
        "accelerate": accelerate.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "seed": config.seed, "data_sha256": data_hash(folder), "base": base.id, "seconds": round(seconds, 1),
        "first_loss": history[0].loss, "last_loss": mean_loss(history[-50:]),
        "images": [{"file": str(i.path.relative_to(folder.root)), "sha256": i.sha256} for i in folder.items],
    })  # fmt: skip
