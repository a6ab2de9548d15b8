"""Everything that decides one picture, kept in the picture itself: enough to draw the same bytes again.

A PNG carries two text entries: `parameters`, as A1111 and ComfyUI write and read it, and `visionlora`, the whole recipe as
JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from visionlora import __version__
from visionlora.data.images import IMAGE_SUFFIXES
from visionlora.data.wording import missing
from visionlora.errors import ConfigError, DataError, nearest

ENTRY = "visionlora"


class Sampler(NamedTuple):
    """One way to draw."""

    kind: str
    """Class of diffusers."""
    label: str
    """In A1111."""
    options: Mapping[str, Any] = {}
    """Of the class, beside what the model's own scheduler has."""


SCHEDULERS = {
    "dpm++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
    # PLMS starts without Runge-Kutta steps, which also need a longer run than some ask for.
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
}
"""By the word of --scheduler."""
MOST_STEPS = 1000
"""Noise levels that models are trained at; no scheduler takes more steps."""
LATER = (
    "region_hashes",
    "precision",
    "model_hash",
    "controlnet_hash",
    "clip_skip",
    "zero_terminal_snr",
    "force",
    "allow_partial",
    "batch_size",
)
"""Fields that are written only where they are not as usual, so that recipes from before keep their keys."""
TAG = re.compile(r"<(?i:lora|lyco):([^:<>]+)(?::([^:<>]+))?>")


def exact(value: float) -> str:
    """A number in as few digits as give it again.

    >>> exact(1.0), exact(0.1234567890123)
    ('1', '0.1234567890123')
    """
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else repr(value)


@dataclass(frozen=True)
class LoraUse:
    """One adapter as a recipe names it."""

    name: str
    path: str
    scale: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Factors by block, and over the steps; see `visionlora.mixing.scales.scale_from`."""
    hash: str = ""
    """AutoV3 of the file, as other tools show it: SHA-256 of its tensors."""
    file_hash: str = ""
    """SHA-256 of the whole file, whose header may hold the scale, and of PEFT's config beside it, which does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "blocks", {block: float(factor) for block, factor in self.blocks.items()})

    def word(self) -> str:
        """As `--lora` takes it."""
        blocks = ",".join(f"{b}={exact(v)}" for b, v in self.blocks.items())
        return f"{self.path}:{exact(self.scale)}" + (f"@{blocks}" if blocks else "")


@dataclass(frozen=True)
class Recipe:
    """One picture.

    Raises:
        ConfigError: when a number is out of range or the scheduler unknown.
    """

    prompt: str
    model: str
    width: int
    height: int
    negative_prompt: str = ""
    loras: tuple[LoraUse, ...] = ()
    compose: str = "sum"
    compose_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str = "dpm++"
    init_image: str = ""
    init_hash: str = ""
    """SHA-256 of the picture that it starts from."""
    strength: float = 0.6
    mask: str = ""
    """Picture of what is drawn anew of `init_image`, white where."""
    mask_hash: str = ""
    controlnet: str = ""
    control: str = ""
    """Picture that the ControlNet follows."""
    control_hash: str = ""
    control_scale: float = 1.0
    region_hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the masks among the regions, by adapter."""
    precision: str = "fp32"
    """That the model computes in."""
    model_hash: str = ""
    """Tells the weights at the place of the model apart from others; empty for the model that comes with visionlora."""
    controlnet_hash: str = ""
    """Likewise."""
    clip_skip: int = 1
    """How many layers from the end the text was read; see `BaseModel.clip_skip`."""
    zero_terminal_snr: bool = False
    """Whether the noise levels end at nothing but noise, as an adapter was trained."""
    force: bool = False
    """Whether adapters made for other weights were let through."""
    allow_partial: bool = False
    """Whether parts of adapters that do not fit were left out."""
    batch_size: int = 1
    """Pictures that were drawn with it in one forward pass, itself too: their number may change how its values round."""
    version: str = __version__

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "strength", "control_scale"):  # 3 and 3.0 are one
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "compose_options", written(self.compose_options))
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"steps is {self.steps}; it must be between 1 and {MOST_STEPS}.")
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"scheduler is {self.scheduler!r}. {nearest(self.scheduler, SCHEDULERS)}")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength:g}; it must be above 0 and at most 1.")
        if self.init_image and int(self.steps * self.strength) < 1:
            enough = next((n for n in range(self.steps, MOST_STEPS + 1) if int(n * self.strength) >= 1), None)
            raise ConfigError(
                f"{self.steps} steps at strength {self.strength:g} leave the picture as it is: take "
                + (f"at least {enough} steps, or " if enough else "")
                + f"a strength of at least {math.ceil(1000 / self.steps) / 1000:g}."
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ConfigError(
                f"guidance_scale is {self.guidance_scale:g}; it must be 0 or more (up to 1 is no guidance)."
            )
        for name in ("width", "height"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1 px.")
        if not (math.isfinite(self.control_scale) and self.control_scale >= 0):
            raise ConfigError(f"control_scale is {self.control_scale}; it must be 0 or more.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be between 0 and 2^63 - 1.")

    @property
    def digest(self) -> str:
        """64 digits that differ when anything differs but the size of the batch and what was let through."""
        same = replace(self, batch_size=1, force=False, allow_partial=False)
        return hashlib.sha256(same.to_json().encode()).hexdigest()

    @property
    def key(self) -> str:
        """The first eight digits of it."""
        return self.digest[:8]

    @property
    def file_name(self) -> str:
        """Of the picture: words of the prompt, the seed and the key."""
        return self.named(8)

    def named(self, digits: int) -> str:
        """The name of its file with a key of so many digits."""
        words = re.sub(r"[^\w]+", "-", TAG.sub("", self.prompt)).strip("-").lower()[:40].strip("-")
        return f"{words or 'picture'}-{self.seed}-{self.digest[:digits]}.png"

    def to_json(self) -> str:
        """Keys in order, so that equal recipes are equal texts; what came later is there only where it is used."""
        unused = {} if self.mask else dict.fromkeys(("mask", "mask_hash"))
        unused |= {} if self.controlnet else dict.fromkeys(("controlnet", "control", "control_hash", "control_scale"))
        usual = {f.name: f.default for f in fields(self) if f.name in LATER} | {"region_hashes": {}}
        unused |= {name: value for name, value in usual.items() if getattr(self, name) == value}
        return json.dumps({k: v for k, v in asdict(self).items() if k not in unused}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe in a picture.

        Raises:
            DataError: when the text is no recipe.
        """
        try:
            found = dict(json.loads(text))
            loras = tuple(LoraUse(**use) for use in found.pop("loras", ()))
            known = {f.name for f in fields(cls)}
            return cls(**{k: v for k, v in found.items() if k in known}, loras=loras)
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"The recipe in this picture is broken ({type(e).__name__}: {e}).") from None

    def described(self) -> str:
        """The settings, and the command that draws it again, each a paragraph."""
        parts = [self.parameters()]
        if self.batch_size > 1:
            parts.append(
                f"Drawn in a batch of {self.batch_size}; alone, as by this command, values may round otherwise."
            )
        return "\n\n".join([*parts, self.command()])

    def command(self, output: str = "pictures") -> str:
        """The command that draws the same bytes again, but for how values round in a batch."""
        words = ["visionlora", "generate", "--prompt", self.prompt, "--model", self.model]
        for use in self.loras:
            words += ["--lora", use.word()]
        if self.negative_prompt:
            words += ["--negative-prompt", self.negative_prompt]
        for name, region in self.compose_options.get("regions", {}).items():
            words += [
                "--region",
                f"{name}=" + (region if isinstance(region, str) else ",".join(map(exact, region))),
            ]
        if self.compose != "sum":
            options = ",".join(f"{k}={v}" for k, v in self.compose_options.items() if k != "regions")
            words += ["--compose", self.compose + (f":{options}" if options else "")]
        if self.init_image:
            words += ["--init-image", self.init_image, "--strength", exact(self.strength)]
        if self.mask:
            words += ["--mask", self.mask]
        if self.controlnet:
            words += ["--controlnet", self.controlnet, "--control", self.control]
            words += ["--control-scale", exact(self.control_scale)]
        words += ["--seed", str(self.seed), "--steps", str(self.steps), "--guidance-scale", exact(self.guidance_scale)]
        words += ["--precision", self.precision]  # what auto would be depends on the machine
        words += ["--scheduler", self.scheduler, "--width", str(self.width), "--height", str(self.height)]
        if self.clip_skip != 1 or self.loras:  # without it what the adapters say would count
            words += ["--clip-skip", str(self.clip_skip)]
        words += ["--force"] * self.force + ["--allow-partial"] * self.allow_partial
        return shlex.join([*words, "--output", output])

    def parameters(self) -> str:
        """As A1111 writes it: prompt, negative prompt, one line of settings."""
        tags = "".join(
            f" <lora:{use.name}:{use.scale:g}>" for use in self.loras if f"<lora:{use.name}" not in self.prompt
        )
        lines = [self.prompt + tags]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        settings = {
            "Steps": self.steps,
            "Sampler": SCHEDULERS[self.scheduler].label,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": Path(self.model).name,
        }
        if self.clip_skip != 1:
            settings["Clip skip"] = self.clip_skip
        if self.init_image:
            settings["Denoising strength"] = f"{self.strength:g}"
        if self.controlnet:
            settings["ControlNet 0"] = f"Model: {Path(self.controlnet).name}, Weight: {self.control_scale:g}"
        if self.loras:
            names = [re.sub("[:,]", "", use.name) for use in self.loras]  # which part the list
            settings["Lora hashes"] = ", ".join(f"{n}: {u.hash[:12]}" for n, u in zip(names, self.loras, strict=True))
        settings["Version"] = f"visionlora {self.version}"
        return "\n".join([*lines, ", ".join(f"{k}: {quoted(str(v))}" for k, v in settings.items())])


def quoted(value: str) -> str:
    """A value of A1111's line of settings: in quotes where what is in it would part the line.

    >>> quoted("Euler a"), quoted("my, model: v2")
    ('Euler a', '"my, model: v2"')
    """
    return json.dumps(value, ensure_ascii=False) if re.search('[,:\n"]', value) else value


def written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a composition as JSON has them and the command line gives them.

    Raises:
        ConfigError: when a region is neither a box nor a file.
    """
    numbers = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in options.items()}
    if "regions" not in options:
        return numbers
    return numbers | {"regions": {name: written_region(name, region) for name, region in options["regions"].items()}}


def written_region(name: str, region: Any) -> str | list[float]:
    """A box as a list, a file as a text."""
    if isinstance(region, (str, Path)):
        return str(region)
    if isinstance(region, (list, tuple)):
        return [float(side) for side in region]
    raise ConfigError(
        f"The region of {name!r} is a {type(region).__name__}; to be in the recipe of a picture it must be a box (left, top, "
        "right, bottom) or the file of a mask: save it as one."
    )


def png_bytes(picture: Image.Image, recipe: Recipe) -> bytes:
    """The picture with its recipe."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", recipe.parameters())
    info.add_text(ENTRY, recipe.to_json())
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def read_recipe(path: Path) -> Recipe:
    """The recipe of a picture.

    Raises:
        DataError: when there is no picture, or it has no recipe of ours.
    """
    if not path.exists():
        raise DataError(missing(path, "picture", IMAGE_SUFFIXES))
    try:
        with Image.open(path) as picture:
            # What stands before the pixels is there without decoding them.
            text = dict(picture.info if ENTRY in picture.info else getattr(picture, "text", {}))
    except (OSError, SyntaxError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is broken, or no picture"
        raise DataError(f"{path} cannot be opened as a picture: {reason}.") from None
    if ENTRY in text:
        return Recipe.from_json(text[ENTRY])
    if "parameters" in text:
        raise DataError(f"{path} was not drawn by visionlora; its own parameters are:\n{text['parameters']}")
    raise DataError(f"{path} carries no recipe: it was not drawn by visionlora, or another program rewrote it.")


def take_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without `<lora:name:scale>` tags, and the tags; `<lyco:…>` is the same in A1111 and here.

    Raises:
        ConfigError: when a scale is not a finite number, a tag is none of these, or two are of one adapter.

    >>> take_tags("a dog <lora:ink:0.8> running <lora:old>")
    ('a dog running', [('ink', 0.8), ('old', 1.0)])
    """
    found: list[tuple[str, float]] = []
    for match in TAG.finditer(prompt):
        try:
            scale = float(match[2] or 1.0)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ConfigError(f"{match[0]}: {match[2]!r} is not a finite number; write <lora:name:scale>.")
        if match[1].strip() in (name for name, _ in found):
            raise ConfigError(
                f"{match[0]}: the prompt has a tag of {match[1].strip()!r} already; leave one of them out."
            )
        found.append((match[1].strip(), scale))
    if strange := re.search(r"(?i)<(?:lora|lyco|hypernet):[^<>]*>?", TAG.sub(" ", prompt)):
        raise ConfigError(
            f"{strange[0]} is not understood: a tag is <lora:name:scale>. Factors of parts and blocks go to the command: "
            "--lora name:0.8@up=1.2,mid=0."
        )
    return re.sub(r"\s{2,}", " ", TAG.sub(" ", prompt)).strip() if found else prompt, found
