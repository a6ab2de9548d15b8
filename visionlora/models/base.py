"""Opens a Stable Diffusion base model: the embedded one, a diffusers folder, a Hub id or a single-file checkpoint."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch

from visionlora.errors import ModelError, nearest
from visionlora.models.fingerprint import architecture_fingerprint, weights_fingerprint

EMBEDDED = "emoji-64"
DEFAULT_ON_GPU = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMALL_UNET = 50_000_000
"""Parameters below which a UNet learns at ten times the usual rate and takes small batches at no cost."""
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class BaseModel:
    """An opened base model, in evaluation mode and frozen."""

    id: str
    """As a user would name it again: `emoji-64`, a folder or a Hub id."""
    source: str
    """Where the weights were read from."""
    why: str
    """One line: which model was taken, why, and how to choose another."""
    pipe: Any
    """The `StableDiffusionPipeline`."""

    @property
    def resolution(self) -> int:
        """Native width and height of its pictures, px."""
        return int(self.pipe.unet.config.sample_size) * self.scale_factor

    @property
    def scale_factor(self) -> int:
        """Pixels per latent position along one side."""
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Width and height must be multiples of this, px: the VAE's factor times the UNet's downsamplings."""
        return int(self.scale_factor * 2 ** (len(self.pipe.unet.config.down_block_types) - 1))

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: `epsilon`, `v_prediction` or `sample`."""
        return str(self.pipe.scheduler.config.prediction_type)

    @property
    def suggested(self) -> dict[str, Any]:
        """Settings of train-sd that suit the size of the model, used where the user gives none."""
        if sum(p.numel() for p in self.pipe.unet.parameters()) < SMALL_UNET:
            return {"steps": 300, "learning_rate": 2e-3, "batch_size": 8, "guidance_scale": 2.0}
        return {"steps": 800, "learning_rate": 1e-4, "batch_size": 1, "guidance_scale": 7.5}

    def components(self) -> dict[str, torch.nn.Module]:
        """The parts that can carry adapters, under the names used in adapter files."""
        return {"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Architecture and weights fingerprint of each part."""
        return {
            name: {"architecture": architecture_fingerprint(part), "weights": weights_fingerprint(part)}
            for name, part in self.components().items()
        }

    def check_resolution(self, size: int) -> None:
        """Raises ModelError when pictures of `size` px do not fit the model's grid."""
        if size < self.multiple or size % self.multiple:
            low = max(self.multiple, size // self.multiple * self.multiple)
            raise ModelError(
                f"A resolution of {size} px does not fit {self.id}: it must be a multiple of {self.multiple}. "
                f"Use {low} or {low + self.multiple} (native: {self.resolution})."
            )


@contextlib.contextmanager
def embedded_folder() -> Iterator[Path]:
    """The folder of the embedded base model, wherever the package is installed."""
    with resources.as_file(resources.files("visionlora.assets") / EMBEDDED) as folder:
        yield folder


def choose(what: str, model: str, embedded: str, on_gpu: str, fetch: Callable[[], object]) -> tuple[str, str]:
    """Resolves `auto`: (model, one line that says which was taken, why, and how to choose).

    Args:
        what: is chosen, for the line.
        model: as the user gave it.
        embedded: the model that comes with visionlora.
        on_gpu: the one that is taken where there is a GPU.
        fetch: raises when `on_gpu` cannot be had.
    """
    if model != "auto":
        return model, f"{what}: {model} (chosen with --model)."
    if not torch.cuda.is_available():
        return embedded, f"{what}: {embedded}, the embedded one, as there is no GPU. Choose with --model."
    with contextlib.suppress(Exception):  # any failure means: cannot be had, take the embedded one
        fetch()
        return on_gpu, f"{what}: {on_gpu}, as there is a GPU. Choose with --model."
    why = f"{what}: {embedded}, the embedded one, as {on_gpu} is neither cached nor reachable."
    return embedded, why + " Choose with --model."


def fetch_default() -> None:
    """Raises when the default model for a GPU is neither cached nor reachable."""
    from huggingface_hub import snapshot_download

    snapshot_download(DEFAULT_ON_GPU, allow_patterns=["model_index.json"])


def open_base(model: str = "auto", dtype: torch.dtype = torch.float32) -> BaseModel:
    """Opens a base model for Stable Diffusion 1.x or 2.x, frozen, on the CPU.

    Args:
        model: `auto`, `emoji-64`, a diffusers folder, a single-file checkpoint or a Hub id.
        dtype: of the weights.

    Raises:
        ModelError: when there is no such model, or it is not a text-to-image Stable Diffusion with one text encoder.
    """
    chosen, why = choose("Base model", model, EMBEDDED, DEFAULT_ON_GPU, fetch_default)
    if chosen == EMBEDDED:
        with embedded_folder() as folder:
            if not (folder / "model_index.json").is_file():
                raise ModelError(
                    f"The embedded model is missing at {folder}. Build it with `make assets`, or pass --model."
                )
            return _opened(EMBEDDED, str(folder), why, load_folder(str(folder), dtype))
    path = Path(chosen).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SINGLE_FILE_SUFFIXES:
            raise ModelError(f"{path} is not a model: a single file ends in {' or '.join(SINGLE_FILE_SUFFIXES)}.")
        return _opened(str(path), str(path), why, load_single_file(path, dtype))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{path} is not a diffusers model: it has no model_index.json. "
                "Name the folder that holds model_index.json, unet, vae and text_encoder."
            )
        return _opened(str(path), str(path.resolve()), why, load_folder(str(path), dtype))
    if chosen.count("/") == 1 and not chosen.startswith((".", "/", "~")):
        return _opened(chosen, chosen, why, load_folder(chosen, dtype))
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ModelError(
        f"There is no model at {chosen}. {nearest(path.name, [*siblings, EMBEDDED])} Give a diffusers folder, "
        f"a .safetensors checkpoint, a Hub id such as {DEFAULT_ON_GPU}, or {EMBEDDED}."
    )


def load_folder(source: str, dtype: torch.dtype) -> Any:
    """A diffusers folder or Hub id as a pipeline."""
    try:
        with quiet("diffusers", "transformers"):
            from diffusers import StableDiffusionPipeline

            pipe = StableDiffusionPipeline.from_pretrained(
                source, safety_checker=None, requires_safety_checker=False, feature_extractor=None
            )
            return pipe.to(dtype)
    except Exception as e:  # the Hub client and diffusers raise many kinds; the user needs one sentence
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"The model {source} cannot be opened: {text} Check the name and the connection, or use --model {EMBEDDED}."
        ) from None


def load_single_file(path: Path, dtype: torch.dtype) -> Any:
    """A single-file checkpoint as a pipeline; the configuration of its family is fetched by diffusers."""
    try:
        with quiet("diffusers", "transformers"):
            from diffusers import StableDiffusionPipeline

            return StableDiffusionPipeline.from_single_file(str(path), safety_checker=None).to(dtype)
    except Exception as e:
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"The checkpoint {path} cannot be opened: {text}") from None


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keeps progress bars and advice of `diffusers` and `transformers` out of our output, and everyone's warnings."""
    logs = [import_module(f"{name}.utils").logging for name in libraries]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity(logging.ERROR)
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def _opened(id: str, source: str, why: str, pipe: Any) -> BaseModel:
    """Checks the parts and freezes them."""
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ModelError(f"{id} has two text encoders (SDXL). train-sd handles Stable Diffusion 1.x and 2.x so far.")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"{id} is an inpainting or depth model: its UNet takes {pipe.unet.config.in_channels} channels "
            f"where text-to-image takes {pipe.vae.config.latent_channels}. Use the base model it came from."
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return BaseModel(id, source, why, pipe)
