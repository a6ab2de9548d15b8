"""Opens a Stable Diffusion base model: the embedded one, a diffusers folder, a Hub id or a single-file checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visionlora.config.choices import EMBEDDED_SD, may_be_on_hub, missing_beside
from visionlora.errors import AdapterFileError, ModelError, first_line, nearest
from visionlora.formats.container import is_pickle, pickled
from visionlora.formats.families import by_context, family_of_unet
from visionlora.formats.read import FOLDER_FILES
from visionlora.lora.adapter import Adapter
from visionlora.models.checkpoint_header import ADAPTER, read_checkpoint_header
from visionlora.models.devices import usable_device
from visionlora.models.fingerprint import architecture_fingerprint, respelled, weights_fingerprint
from visionlora.models.kinds import (
    DEFAULT_ON_GPU,
    REFINER,
    check_index,
    check_kinds,
    check_noise,
    check_prediction,
    not_ours,
)
from visionlora.models.loading import check_loaded, misfit
from visionlora.models.parts import (
    AGAIN,
    PARTS,
    VARIANT,
    check_files,
    check_words,
    has_all_weights,
    read_part,
    read_parts,
)

EMBEDDED = EMBEDDED_SD
SMALL_UNET = 50_000_000
"""Parameters below which a UNet learns at ten times the usual rate, takes larger batches, and has memory to spare."""
SD2 = by_context(1024)
SPREADS, WIDE = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias", 0.09
"""See `prediction_by_weights`."""
SIDE_OF_SD2_BASE = 64
"""Of the latents of Stable Diffusion 2.x that predicts the noise; those of the others have 96."""
NOT_OURS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
"""Parts of a folder that are left out."""
INDEX = "model_index.json"
"""Is in every diffusers folder."""
MOST_NAMED = 10
"""Models that a message names."""
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class BaseModel:
    """An opened base model, in evaluation mode and frozen."""

    id: str
    """As a user would name it again: `emoji-64`, a folder or a Hub id."""
    source: str
    """Where the weights were read from; absolute where that is a path."""
    why: str
    """One line: which model was taken, why, and how to choose another."""
    pipe: Any
    """A `StableDiffusionPipeline` or `StableDiffusionXLPipeline`."""
    clip_skip: int = 1
    """How many layers from the end the text is read, of Stable Diffusion 1.x and 2.x: 1 after the last, 2 before it, as models
    of anime are often trained."""
    windows: int = 1
    """Windows of the text encoder that captions may fill; what is longer is cut."""
    variant: str | None = None
    """Which files of a folder or Hub id were read, where they are not the plain ones: fp16."""

    @property
    def address(self) -> str:
        """How an adapter names it, which may be used from another folder: `emoji-64`, an absolute path or a Hub id."""
        return self.id if self.id == EMBEDDED else self.source

    def reading(self, clip_skip: int, windows: int = 1) -> BaseModel:
        """The same model, its text read so many layers from the end, in so many windows at most.

        Raises:
            ModelError: when layers are to be skipped, and it is SDXL, or has fewer.
        """
        if windows != self.windows:
            return replace(self, windows=windows).reading(clip_skip, windows)
        if clip_skip == self.clip_skip:
            return self
        if self.is_xl:
            raise ModelError(
                f"clip_skip is {clip_skip}, but {self.id} is an SDXL, whose text is always read before the last layer: leave "
                "clip_skip out."
            )
        layers = int(self.pipe.text_encoder.config.num_hidden_layers)
        if not 1 <= clip_skip <= layers:
            raise ModelError(
                f"clip_skip is {clip_skip}; the text encoder of {self.id} has {layers} layers: give 1 (the last) to {layers}."
            )
        return replace(self, clip_skip=clip_skip)

    @property
    def is_xl(self) -> bool:
        """Whether it is Stable Diffusion XL: two text encoders, and a UNet that is told sizes."""
        return getattr(self.pipe, "text_encoder_2", None) is not None

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
    def noise_scheduler(self) -> Any:
        """The model's noise levels as training needs them, (b,) timesteps in 0 … num_train_timesteps - 1.

        The pipeline's own scheduler will not do: that of SDXL scales noisy latents otherwise than the UNet was trained with.
        """
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @property
    def suggested(self) -> dict[str, Any]:
        """Settings of train-sd that suit the size of the model, used where the user gives none."""
        if sum(p.numel() for p in self.pipe.unet.parameters()) < SMALL_UNET:
            small = {"steps": 300, "learning_rate": 2e-3, "batch_size": 8, "guidance_scale": 2.0}
            return {**small, "save_memory": False}
        guidance = 5.0 if self.is_xl else 7.5
        large = {"steps": 800, "learning_rate": 1e-4, "batch_size": 1, "guidance_scale": guidance}
        return {**large, "save_memory": True}

    def components(self) -> dict[str, torch.nn.Module]:
        """The parts that can carry adapters, under the names used in adapter files."""
        return {"unet": self.pipe.unet, **{name: encoder for name, _, encoder in self.text_parts()}}

    def text_parts(self) -> list[tuple[str, Any, Any]]:
        """Name, tokenizer and encoder of each text encoder, in the order in which the UNet reads them."""
        own = [("text_encoder", self.pipe.tokenizer, self.pipe.text_encoder)]
        return own + ([("text_encoder_2", self.pipe.tokenizer_2, self.pipe.text_encoder_2)] if self.is_xl else [])

    def unread_layers(self, name: str) -> tuple[str, ...]:
        """Patterns of the layers at the end of a text encoder that the UNet does not read: no gradient reaches them."""
        count = int(name == "text_encoder") if self.is_xl else self.clip_skip - 1
        layers = int(getattr(self.pipe, name).config.num_hidden_layers)
        return tuple(rf"re:.*layers\.{layers - 1 - k}\..*" for k in range(count))

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Architecture and weights fingerprint of each part, as it was when first asked: before adapters, casts and packing."""
        return {part: dict(found) for part, found in self._fingerprints.items()}

    def fingerprints_for(self, adapter: Adapter) -> dict[str, dict[str, str]]:
        """The same, in the names of the transformers with which an adapter was made, where these tell a text encoder's."""
        found, parts = self.fingerprints(), self.components()
        for name, given in dict((adapter.info.get("base") or {}).get("fingerprints") or {}).items():
            if not name.startswith("text_encoder") or name not in found:
                continue
            if given["architecture"] == found[name]["architecture"]:
                continue
            other = architecture_fingerprint(parts[name], respelled)
            if given["architecture"] == other:
                found[name] = {"architecture": other, "weights": weights_fingerprint(parts[name], respelled)}
        return found

    @cached_property
    def _fingerprints(self) -> dict[str, dict[str, str]]:
        return {
            name: {"architecture": architecture_fingerprint(part), "weights": weights_fingerprint(part)}
            for name, part in self.components().items()
        }

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits that tell the weights of all parts apart from others, the VAE's too, as they were when first asked."""
        parts = {part: found["weights"] for part, found in self._fingerprints.items()}
        whole = {**parts, "vae": weights_fingerprint(self.pipe.vae)}
        return hashlib.sha256(repr(sorted(whole.items())).encode()).hexdigest()[:16]

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


def choose(
    what: str, model: str, embedded: str, on_gpu: str, fetch: Callable[[], object], named_by: str | None = None
) -> tuple[str, str]:
    """Resolves `auto`: (model, one line that says which was taken, why, and how to choose).

    Args:
        what: is chosen, for the line.
        model: as the user gave it.
        embedded: the model that comes with visionlora.
        on_gpu: the one that is taken where there is a CUDA GPU.
        fetch: raises when `on_gpu` cannot be had.
        named_by: what names the model, where it is not the user.

    Raises:
        ModelError: when the path that something else names is not there.
    """
    if named_by is not None and (path := Path(model)).is_absolute() and not path.exists():
        raise ModelError(
            f"The {what.lower()} that {named_by} names, {path}, is not there: say with --model where it is now."
        )
    if model != "auto" and named_by is not None:
        return model, f"{what}: {model}, which {named_by} names. Choose with --model."
    if model != "auto":
        return model, f"{what}: {model} (chosen with --model)."
    if not torch.cuda.is_available():
        other = usable_device().type
        why = "there is no GPU" if other == "cpu" else f"{other} is no CUDA GPU, where it would be {on_gpu}"
        return embedded, f"{what}: {embedded}, the embedded one, as {why}. Choose with --model."
    with contextlib.suppress(Exception):  # any failure means: cannot be had, take the embedded one
        fetch()
        return on_gpu, f"{what}: {on_gpu}, as there is a GPU. Choose with --model."
    why = f"{what}: {embedded}, the embedded one, as {on_gpu} is neither cached nor reachable."
    return embedded, why + " Choose with --model."


def fetch_default() -> None:
    """Raises when the default model for a GPU is neither cached nor reachable."""
    from huggingface_hub import snapshot_download

    snapshot_download(DEFAULT_ON_GPU, allow_patterns=["model_index.json"])


def open_base(model: str = "auto", dtype: torch.dtype = torch.float32, named_by: str | None = None) -> BaseModel:
    """Opens a base model, Stable Diffusion 1.x, 2.x or XL, frozen, on the CPU.

    Args:
        model: `auto`, `emoji-64`, a diffusers folder, a single-file checkpoint or a Hub id.
        dtype: of the weights.
        named_by: what names the model, where it is not the user.

    Raises:
        ModelError: when there is no such model, or it is not a text-to-image Stable Diffusion.
    """
    chosen, why = choose("Base model", model, EMBEDDED, DEFAULT_ON_GPU, fetch_default, named_by)
    if chosen == EMBEDDED:
        with embedded_folder() as folder:
            if not (folder / "model_index.json").is_file():
                raise ModelError(
                    f"The embedded model is missing at {folder}. Build it with `make assets`, or pass --model."
                )
            return _opened(EMBEDDED, str(folder), why, *load_folder(str(folder), dtype))
    path = Path(chosen).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SINGLE_FILE_SUFFIXES:
            raise ModelError(f"{path} is not a model: a single file ends in {' or '.join(SINGLE_FILE_SUFFIXES)}.")
        pipe, said = load_single_file(path, dtype)
        return _opened(str(path), str(path.absolute()), why + said, pipe)
    if path.is_dir():
        if not (path / INDEX).is_file():
            if any((path / name).is_file() for name in FOLDER_FILES):
                raise ModelError(f"{path} {ADAPTER}")
            raise ModelError(
                f"{path} is not a diffusers model: it has no model_index.json. "
                "Name the folder that holds model_index.json, unet, vae and text_encoder."
            )
        return _opened(str(path), str(path.absolute()), why, *load_folder(str(path), dtype))
    if may_be_on_hub(chosen):
        return _opened(chosen, chosen, why, *load_folder(chosen, dtype))
    named = f", which {named_by} names" if named_by else ""
    hint = nearest(path.name, [*models_beside(path), EMBEDDED], MOST_NAMED)
    raise ModelError(
        f"There is no model at {chosen}{named}. {hint} Give a diffusers folder, "
        f"a .safetensors checkpoint, a Hub id such as {DEFAULT_ON_GPU}, or {EMBEDDED}."
    )


def models_beside(path: Path) -> list[str]:
    """The names of folders and checkpoints in the folder of a path that may be opened."""

    def is_model(entry: Path) -> bool:
        if entry.is_dir():
            return (entry / INDEX).is_file()
        with contextlib.suppress(Exception):  # a broken file, of which there are many kinds, is none
            return entry.suffix.lower() in SINGLE_FILE_SUFFIXES and read_checkpoint_header(entry).other is None
        return False

    with contextlib.suppress(OSError):
        return [entry.name for entry in path.parent.iterdir() if is_model(entry)]
    return []


def load_folder(source: str, dtype: torch.dtype) -> tuple[Any, str | None]:
    """A diffusers folder or Hub id as a pipeline, and the variant of its files."""
    try:
        with quiet("diffusers", "transformers"):
            from diffusers import DiffusionPipeline

            index = DiffusionPipeline.load_config(source)
            check_index(source, index)
            folder, variant = with_variant(source, index)
            check_files(source, folder, index)
            parts = read_parts(source, folder, index, variant)
            pipe = DiffusionPipeline.from_pretrained(str(folder), **NOT_OURS, **parts)
            return pipe.to(dtype), variant
    except ModelError:
        raise
    except Exception as e:  # the Hub client and diffusers raise many kinds; the user needs one sentence
        text = first_line(e)
        hint = AGAIN if Path(source).is_dir() else f"Check the name and the connection, or use --model {EMBEDDED}."
        said = " ".join(filter(None, (missing_beside(source), text, hint)))
        raise ModelError(f"The model {source} cannot be opened: {said}") from None


def with_variant(source: str, index: Mapping[str, Any]) -> tuple[Path, str | None]:
    """The folder of a model, and the variant of its files: fp16 where a part has no plain ones."""
    from diffusers import DiffusionPipeline

    if (folder := Path(source)).is_dir():
        return folder, None if has_all_weights(folder, index) else VARIANT
    folder = Path(DiffusionPipeline.download(source, **NOT_OURS))
    if has_all_weights(folder, index):
        return folder, None
    return Path(DiffusionPipeline.download(source, variant=VARIANT, **NOT_OURS)), VARIANT


def load_single_file(path: Path, dtype: torch.dtype) -> tuple[Any, str]:
    """A single-file checkpoint as a pipeline, and what its header says beyond its family, for the line that says which model.

    The configuration of its family is fetched by diffusers.
    """
    start = f"The checkpoint {path} cannot be opened:"
    try:
        header = read_checkpoint_header(path)
        if header.is_refiner:
            raise not_ours(str(path), REFINER)
        if header.other is not None:
            raise ModelError(f"{path} {header.other}")
        check_prediction(path, header)
        with quiet("diffusers", "transformers"):
            from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

            if header.is_xl:
                pipe = StableDiffusionXLPipeline.from_single_file(str(path))
            else:
                pipe = StableDiffusionPipeline.from_single_file(str(path), safety_checker=None)
            for part in (p for p in PARTS if getattr(pipe, p, None) is not None):
                check_loaded(f"{start} the weights of its {part}", getattr(pipe, part))
            said = header.words
            if header.prediction_type is None and (seen := prediction_by_weights(pipe.unet)) is not None:
                header = replace(header, prediction_type=seen)
                what = {"epsilon": "the noise (epsilon)", "v_prediction": "the velocity (v_prediction)"}[seen]
                said = f" It predicts {what}, by the look of its weights; its header does not say."
            if header.prediction_type == "epsilon" and family_of_unet(pipe.unet.config)[0] is SD2:
                pipe.unet.register_to_config(sample_size=SIDE_OF_SD2_BASE)  # diffusers has that of the other kind
            pipe.scheduler = header.scheduler(pipe.scheduler)
            return pipe.to(dtype), said
    except ModelError:
        raise
    except Exception as e:
        text = f"it lacks the tensor {e}." if isinstance(e, KeyError) else first_line(e)
        if isinstance(e, NotImplementedError) and "meta tensor" in text:  # diffusers moves them before we can look
            text = "it lacks tensors of its UNet or VAE. Copy or download it again."
        if isinstance(e, AttributeError) and "text_model" in text:  # which CLIP has lost in transformers 5.6
            found = {name: version(name) for name in ("diffusers", "transformers")}
            text = (
                f"diffusers {found['diffusers']} is too old for transformers {found['transformers']}: update diffusers."
            )
        if isinstance(e, OSError) and path.is_file():
            text = why_unread(path) or text
        raise misfit(f"{start} its weights", e) or ModelError(f"{start} {text}") from None


def why_unread(path: Path) -> str:
    """Why diffusers cannot read a file, which it does by the ending of its name; empty where that is not seen."""
    pickle = is_pickle(path)
    if pickle == (path.suffix == SINGLE_FILE_SUFFIXES[0]):
        kind, end = ("a pickle of torch's", ".ckpt") if pickle else ("a safetensors file", ".safetensors")
        return f"it is {kind}: rename it to end in {end}."
    try:
        if pickle:
            next(pickled(path))
    except AdapterFileError as e:
        return str(e)
    return ""


def prediction_by_weights(unet: Any) -> str | None:
    """What a UNet of Stable Diffusion 2.x predicts, which its layers do not tell; None for another family.

    This bias spreads wider in those that learned the velocity: by that ComfyUI tells them apart.
    """
    if family_of_unet(unet.config)[0] is not SD2:
        return None
    bias = dict(unet.named_parameters()).get(SPREADS)
    return None if bias is None else "v_prediction" if float(bias.float().std(correction=0)) > WIDE else "epsilon"


def open_controlnet(source: str, base: BaseModel) -> Any:
    """A `diffusers.ControlNetModel` for a base, frozen.

    Args:
        source: a diffusers folder or a Hub id.
        base: whose UNet it is to steer.

    Raises:
        ModelError: when it cannot be opened, or was made for another family.
    """
    try:
        with quiet("diffusers"):
            from diffusers import ControlNetModel

            what = f"The ControlNet {source} cannot be opened: its weights"
            net: Any = read_part(what, "diffusers", ControlNetModel, source, dtype=base.pipe.unet.dtype)
    except ModelError:
        raise
    except Exception as e:
        text = first_line(e)
        raise ModelError(
            f"The ControlNet {source} cannot be opened: {text} Give a diffusers folder or a Hub id."
        ) from None
    own, wanted = (part.config.cross_attention_dim for part in (net, base.pipe.unet))
    if own != wanted:
        raise ModelError(
            f"The ControlNet {source} reads text {own} wide, the UNet of {base.id} {wanted}: it was made for another family of "
            "Stable Diffusion. Take one for this base."
        )
    return net.to(base.pipe.unet.device).requires_grad_(False).eval()


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keeps progress bars and advice of `diffusers` and `transformers` out of our output, and everyone's warnings.

    What they log as an error they raise too, or go on without: another file will do.
    """
    logs = [import_module(f"{name}.utils").logging for name in libraries]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def _opened(id: str, source: str, why: str, pipe: Any, variant: str | None = None) -> BaseModel:
    """Checks the parts and freezes them."""
    kind = type(pipe).__name__
    if any(getattr(pipe, part, None) is None for part in ("unet", "vae", "text_encoder", "tokenizer")):
        raise not_ours(id, REFINER if hasattr(pipe, "text_encoder_2") else f"a {kind}")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"{id} is an inpainting or depth model: its UNet takes {pipe.unet.config.in_channels} channels "
            f"where text-to-image takes {pipe.vae.config.latent_channels}. Use the base model it came from."
        )
    check_noise(id, pipe)
    check_kinds(id, pipe)
    pipe = as_text_to_image(pipe)
    pipe.set_progress_bar_config(disable=True)
    base = BaseModel(id, source, why, pipe, variant=variant)
    for name, tokenizer, encoder in base.text_parts():
        check_words(id, name.replace("text_encoder", "tokenizer"), tokenizer, encoder)
    for part in (pipe.vae, *base.components().values()):
        part.requires_grad_(False).eval()
    return base


def as_text_to_image(pipe: Any) -> Any:
    """The plain pipeline of the same parts, where a folder was saved as another (img2img, say)."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    plain = StableDiffusionXLPipeline if hasattr(pipe, "text_encoder_2") else StableDiffusionPipeline
    if isinstance(pipe, plain):
        return pipe
    parts = {name: part for name, part in pipe.components.items() if name in plain._get_signature_keys(plain)[0]}
    return plain(**parts, **({} if plain is StableDiffusionXLPipeline else {"requires_safety_checker": False}))
