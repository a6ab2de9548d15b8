"""Pictures -> checked items -> latents and text -> training -> adapter file -> sample grid -> run folder.

The whole of `visionlora train-sd`, one stage after the other; each stage hands a small frozen object to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visionlora.pipelines.further import keep_first
from visionlora.pipelines.sd_learning import batch_in_memory, encode, new_adapter
from visionlora.pipelines.sd_ready import prepare

from visionlora.config import TrainSDConfig, check_kind
from visionlora.data.folder import ImageFolder
from visionlora.diffusion.sampling import sampling_of
from visionlora.diffusion.settings import (
    attention_kernel,
    release,
    whole_captions,
)
from visionlora.diffusion.validation import verdict
from visionlora.report.listener import Listener
from visionlora.report.resume import base_digest, begin, holding
from visionlora.report.runfolder import RunFolder
from visionlora.report.samples import SampleSheet
from visionlora.report.sd_fitting import Fitting
from visionlora.report.sd_run import header, learned_from, public_metadata, report
from visionlora.training.loop import process_state, recent_loss
from visionlora.training.settings import (
    loop_config,
    ranks_state,
)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    grid: Path | None
    """None when no samples were asked for."""
    first_loss: float
    last_loss: float
    """Mean of the last steps."""
    seconds: float
    """Of the run, also before it was resumed."""


@holding
def train_sd(config: TrainSDConfig, listener: Listener | None = None) -> RunResult:
    """Trains one adapter and leaves a run folder. Everything is checked before anything is written.

    Raises:
        VisionLoRAError: any of its kinds, each with a message for the user.
        KeyboardInterrupt: after adapter and state were saved under `checkpoints/`, from which `resume` goes on.
    """
    check_kind(config, TrainSDConfig, "train_sd", "images='./dog'")
    tell = (listener or Listener()) if process_state().is_main_process else Listener()
    start = begin(config, "sd", tell)
    ready = prepare(start, tell)
    config, base, accelerator = ready.config, ready.base, ready.accelerator

    # Latents and text, adapter; from here on the run leaves files
    material = encode(ready, tell)
    if not config.sample_columns and accelerator.num_processes == 1:  # others' latents may have to be made here
        release(base, material.encoded, text_is_cached=material.tokens is None)
    learning = new_adapter(ready, material, tell, start.state)
    if config.auto_batch and start.state is None:
        config = batch_in_memory(ready, material, learning, tell)
    loop = loop_config(config)
    run = start.open(config) if accelerator.is_main_process else RunFolder(start.folder)
    if accelerator.is_main_process:
        keep_first(ready.first, run, start)
    accelerator.wait_for_everyone()

    # Training
    prompts = config.sample_prompts or default_prompts(config, ready.folder)
    settings = sampling_of(config, loop.batch_size)
    sheet = SampleSheet(base, learning.learner, prompts, ready.size, settings, run, tell)
    fitting = Fitting(
        config,
        learning.learner,
        learning.export,
        accelerator,
        run,
        sheet,
        tell,
        lambda step: header(
            config, learning.config, loop, base, ready.fingerprints, ready.folder, ready.size, step, ready.first
        ),
        lambda step, began: public_metadata(config, learning.config, loop, base, ready.folder, ready.size, step, began),
        learned_from(ready.folder, ready.apart, base_digest(ready.fingerprints)),
        start,
        material.validation,
        ranks_state(learning.config, learning.text_rank),
    )
    if start.state is not None:
        fitting.restore(start.state)
    if config.compile:
        base.pipe.unet.compile()
    with attention_kernel(config.attention):
        history = fitting.train(material.task(learning.learner))

    # Adapter, grid and report
    adapter_path = run.path / "adapter.safetensors"
    if accelerator.is_main_process:
        with fitting.fit.averaged():
            adapter = fitting.write(history[-1].step, adapter_path)
        report(
            run, config, loop, base, ready.folder, learning.handle, sheet, history, fitting.evaluations, fitting.log.seconds,
            fitting.log.changes, material.data, adapter, sum(p.numel() for p in fitting.fit.trained),
        )  # fmt: skip
        if fitting.evaluations:
            tell.say(verdict(fitting.evaluations))
    grid = run.path / "grid.png" if config.sample_columns else None
    return RunResult(run.path, adapter_path, grid, history[0].loss, recent_loss(history), fitting.log.seconds)


def default_prompts(config: TrainSDConfig, folder: ImageFolder) -> tuple[str, ...]:
    """Up to four different captions of the training pictures, as the model sees them."""
    different = list({item.caption: item for item in folder.items}.values())[:4]
    return tuple(variants[0] for variants in whole_captions(config, different))
