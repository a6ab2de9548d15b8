"""Opens a vision backbone: the embedded one, a timm name or folder, a transformers classifier, or a torchvision model.

Whatever the library, a backbone is one module that ends in features: the place of its head holds `nn.Identity`, where
`VisionModel.new_head` puts a head for any number of classes. Base names stay as the library has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionlora.config.choices import may_be_on_hub, missing_beside
from visionlora.data.preprocess import INTERPOLATIONS, Preprocessing
from visionlora.errors import AdapterFileError, ModelError, first_line, nearest
from visionlora.lora.damage import damaged
from visionlora.models.base import choose, quiet
from visionlora.models.class_token import shorten
from visionlora.models.fingerprint import architecture_fingerprint, weights_fingerprint
from visionlora.models.heads import CHOOSE, LAST, FlatLinear, append_head, as_logits, fits, has, heads_in, run
from visionlora.models.input_size import set_input_size
from visionlora.models.loading import check_loaded, loaded, misfit, told_by_timm
from visionlora.models.processors import as_preprocessing
from visionlora.models.state_dicts import (
    as_spelled_now,
    classifiers,
    differences,
    head_names,
    of_backbone,
    renaming,
    weights_in,
)

EMBEDDED = "emoji-vit"
DEFAULT_ON_GPU = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
TORCHVISION = "torchvision/"
SMALL = 20_000_000
"""Parameters below which a backbone learns at a higher rate and full fine-tuning is cheap."""
HEAD_STD = 0.02
NO_PICTURES = {
    "imagegpt": "reads pictures as words for 512 colours, visionlora gives their values. Another model reads those: --model "
    "vit_small_patch16_224",
    "pp_lcnet": "reads pictures as BGR, visionlora gives RGB. timm has the same model for RGB: --model lcnet_100",
    "siglip2": "reads patches of pictures of any shape (NaFlex), visionlora gives square pictures. SigLIP 2 of one size is "
    "saved as siglip: --model google/siglip2-base-patch16-224",
}  # fmt: skip
"""Kinds of transformers that read something else than RGB squares, and what to take instead."""
IN_TIMM = {
    "clip_vision_model": "vit_base_patch32_clip_224.openai",
    "dinov3_convnext": "convnext_tiny.dinov3_lvd1689m",
    "dinov3_vit": "vit_small_patch16_dinov3.lvd1689m",
    "siglip_vision_model": "vit_base_patch16_siglip_224.webli",
    "vit_mae": "vit_base_patch16_224.mae",
}
"""Kinds of transformers that classify nothing, and one such model of timm."""

NO_CODE = {"trust_remote_code": False}
"""Without it transformers asks at the terminal whether it may run the code that a model brings with it."""
BLOCKS = ("blocks", "layers", "block", "layer")
"""What a stage of a model calls its blocks, by number."""
STEM = "stem"
"""What stands before the blocks of many models; its layers may be numbered too."""


@dataclass(frozen=True)
class VisionModel:
    """An opened backbone, in evaluation mode and frozen."""

    id: str
    """As a user would name it again."""
    library: str
    """timm, transformers or torchvision."""
    why: str
    """One line: which model was taken, why, and how to choose another."""
    model: nn.Module
    """(n, 3, size, size) -> features (n, d), or an output with `logits` that are the features."""
    head: str
    """Name of the module in the place of the head."""
    features: int
    """Width d of the features."""
    preprocessing: Preprocessing
    folder: Path | None = None
    """Where its config.json lies, of a model that was opened from a folder."""
    weights: str | None = None
    """The state dict that was read instead of the library's weights; `random` for none."""
    flat: bool = False
    """Whether the head must flatten what it reads, as it stands in the place of a convolution."""
    image_size: int | None = None
    """Side that its pictures have, px, where it is not the model's own."""
    at_own_size: Mapping[str, str] = field(default_factory=dict)
    """Its fingerprints before it was made to read another size: by them it is the same model."""

    @property
    def parameters(self) -> int:
        """Of the backbone, without a head."""
        return sum(p.numel() for n, p in self.model.named_parameters() if not n.startswith(self.head + "."))

    @property
    def small(self) -> bool:
        """Whether it is trained in full in no time."""
        return self.parameters < SMALL

    def fingerprints(self, older: bool = False) -> dict[str, dict[str, str]]:
        """Architecture and weights fingerprint, without the head; the same for every `image_size`.

        Args:
            older: as a version of transformers from before a renaming had it; where names are the same nothing.
        """
        if older and (self.library != "transformers" or self.at_own_size):
            return {}
        if self.at_own_size:
            return {"model": dict(self.at_own_size)}
        spell = renaming(self.model, backward=True) if older else str
        head = self.model.get_submodule(self.head)
        self.set_head(nn.Identity())
        found = {
            "architecture": architecture_fingerprint(self.model, spell),
            "weights": weights_fingerprint(self.model, spell),
        }
        self.set_head(head)
        return {"model": found}

    def set_head(self, head: nn.Module) -> None:
        """Puts a module in the place of the head."""
        self.model.set_submodule(self.head, head)

    def new_head(self, classes: int, seed: int) -> nn.Linear:
        """Puts a fresh linear head in its place: small random weights, so that no class is preferred at the start."""
        head = (FlatLinear if self.flat else nn.Linear)(self.features, classes)
        with torch.no_grad():
            head.weight.normal_(std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
            head.bias.zero_()
        self.set_head(head.to(next(self.model.parameters()).device))
        return head

    def depth_of(self, name: str) -> int | None:
        """The block that a parameter or layer belongs to, counted from 0 in the order of the model's modules.

        What comes after the last block counts with it; None for what stands before the blocks.
        """
        blocks, after = self._depths
        if (block := self.block_of(name)) is not None:
            return blocks.get(block)
        return (
            len(blocks) - 1 if any(f"{name}.".startswith(f"{n}.") or n.startswith(f"{name}.") for n in after) else None
        )

    def block_of(self, name: str) -> str | None:
        """The name of the block, up to its number (`layer4.1`, `stages.2.blocks.5`); None outside, as for head and stem."""
        parts = name.split(".")
        if name == self.head or name.startswith(self.head + "."):
            return None
        found = (i for i, part in enumerate(parts) if part.removeprefix("encoder_layer_").isdigit())  # torchvision's
        last = next(found, None)
        if last is None or STEM in parts[:last]:
            return None
        if is_number(parts, last + 1):  # the first was that of the stage
            last += 1
        elif is_number(parts, last + 2) and parts[last + 1] in BLOCKS:
            last += 2
        return ".".join(parts[: last + 1])

    @property
    def blocks(self) -> int:
        """How many there are; 0 where the names of the layers do not tell."""
        return len(self._depths[0])

    @cached_property
    def _depths(self) -> tuple[dict[str, int], list[str]]:
        """The number of each block, and the parameters after the last and their layers."""
        names = [n for n, _ in self.model.named_parameters() if n != self.head and not n.startswith(self.head + ".")]
        found = [self.block_of(n) for n in names]
        blocks = {block: i for i, block in enumerate(dict.fromkeys(block for block in found if block is not None))}
        last = max((i for i, block in enumerate(found) if block is not None), default=len(found))
        after = names[last + 1 :]
        return blocks, [*after, *{layer: None for n in after if (layer := n.rpartition(".")[0])}]


def is_number(parts: Sequence[str], i: int) -> bool:
    """Whether there is a part `i` and it is a number."""
    return i < len(parts) and parts[i].isdigit()


def fetch_default() -> None:
    """Raises when the default model for a GPU is neither cached nor reachable."""
    import timm

    timm.create_model(DEFAULT_ON_GPU, pretrained=True)


def open_backbone(
    model: str = "auto", weights: str | None = None, image_size: int | None = None, named_by: str | None = None
) -> VisionModel:
    """Opens a backbone, frozen, on the CPU.

    Args:
        model: `auto`, `emoji-vit`, a timm name, a timm or transformers folder, `torchvision/NAME`, or the Hub id of a
            timm or transformers model.
        weights: a state dict (.safetensors, .pt) to read instead of the library's weights, or `random` for none.
        image_size: side of the pictures that it is to read, px; by default its own.
        named_by: what names the model, where it is not the user.

    Raises:
        ModelError: when there is no such model, it cannot be had, the state dict does not fit, its weights hold NaN, or it
            cannot read pictures of that size.
    """
    chosen, why = choose("Backbone", model, EMBEDDED, DEFAULT_ON_GPU, fetch_default, named_by)
    with torch.random.fork_rng(devices=[]):  # so that `random` is the same model whenever it is opened
        torch.manual_seed(0)
        opened = named(chosen, weights)
    if weights not in (None, "random"):
        why += read_state(opened, Path(weights).expanduser())
        weights = str(Path(weights).expanduser().resolve())  # the adapter may be used from another folder
    opened.model.requires_grad_(False).eval()
    if weights != "random" and (
        error := damaged(f"The weights of {weights or opened.id}", {"the backbone": opened.model})
    ):
        raise error
    opened = replace(opened, why=why, weights=weights)
    return opened if image_size in (None, opened.preprocessing.size) else at_size(opened, image_size)


def at_size(opened: VisionModel, size: int) -> VisionModel:
    """The same model for pictures of `size` px, changed in place."""
    own = opened.preprocessing.size
    known = opened.fingerprints()["model"]
    with quiet():
        set_input_size(opened.id, opened.model, size, own)
    opened.model.requires_grad_(False)  # positions that were resampled are new parameters in timm before 1.0.31
    return replace(
        opened, why=f"{opened.why} It reads {size} px instead of its own {own}.", image_size=size, at_own_size=known,
        preprocessing=replace(opened.preprocessing, size=size),
    )  # fmt: skip


def named(chosen: str, weights: str | None) -> VisionModel:
    """A backbone by its name, with its own weights or, where others are named, with random ones."""
    if chosen == EMBEDDED:
        with resources.as_file(resources.files("visionlora.assets") / EMBEDDED) as folder:
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"The embedded backbone is missing at {folder}. Build it with `make assets`, or pass --model."
                )
            return replace(from_timm(EMBEDDED, f"local-dir:{folder}", weights), folder=folder)
    if chosen.startswith(TORCHVISION):
        return from_torchvision(chosen, weights)
    if (path := Path(chosen).expanduser()).is_dir():
        return from_folder(path.absolute(), weights)  # the adapter may be used from another folder
    if path.is_file():
        raise ModelError(
            f"{path} is a file, which does not say what backbone it is of. Give the weights of one with --weights, a finished "
            "adapter with start_from=, and with --model a timm name, a folder, torchvision/NAME or a Hub id."
        )
    return from_name(chosen, weights)


def from_folder(path: Path, weights: str | None) -> VisionModel:
    """A folder of timm's or transformers', told by its config.json."""
    try:
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ModelError(
            f"{path} is no model folder: its config.json cannot be read ({e}). Name a folder that timm or transformers saved."
        ) from None
    if "architecture" in config and "model_type" in config and not config.get("pretrained_cfg"):
        raise ModelError(
            f"{path}/config.json has no pretrained_cfg, by which a model of timm says what pictures it reads. Give its weights "
            f"to timm's own: --model {config['architecture']} --weights {path}/model.safetensors"
        )
    if "architecture" in config:
        return replace(from_timm(str(path), f"local-dir:{path}", weights), folder=path)
    if "model_type" in config:
        return from_transformers(str(path), weights)
    raise ModelError(f"{path}/config.json names neither timm's `architecture` nor transformers' `model_type`.")


def from_name(name: str, weights: str | None) -> VisionModel:
    """A timm name, or a Hub id of either library."""
    import timm

    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if timm.is_model(name.split(".")[0]):
        return from_timm(name, name, weights)
    if may_be_on_hub(plain):
        return (
            from_timm(name, f"hf-hub:{plain}", weights)
            if plain.startswith("timm/")
            else from_transformers(plain, weights)
        )
    siblings = [*timm.list_models(), EMBEDDED]
    raise ModelError(
        f"There is no backbone {name!r}. {nearest(name, siblings) if close(name, siblings) else ''} Give a timm name such as "
        f"vit_small_patch16_224, a folder, torchvision/vit_b_16, a Hub id, or {EMBEDDED}.".replace("  ", " ")
    )


def close(name: str, names: list[str]) -> bool:
    """Whether a name is near enough to another to be meant."""
    return nearest(name, names).startswith("Did you mean")


def cannot_be_had(name: str, error: Exception) -> ModelError:
    """One sentence of the many kinds that the libraries and the Hub client raise."""
    text = " ".join(filter(None, (missing_beside(name), first_line(error)[:300])))
    return ModelError(
        f"The backbone {name} cannot be opened: {text} Check the name and the connection, give its weights with "
        f"--weights FILE, or use --model {EMBEDDED}."
    )


def its_weights(id: str) -> str:
    """Begins what is said of weights that do not fit."""
    return f"The backbone {id} cannot be opened: its weights"


def from_timm(id: str, name: str, weights: str | None) -> VisionModel:
    """A model of timm."""
    import timm

    def create(**more: Any) -> Any:
        try:
            with quiet(), told_by_timm() as told:
                model: Any = timm.create_model(name, pretrained=weights is None, **more)
        except Exception as e:
            raise misfit(its_weights(id), e) or cannot_be_had(id, e) from None
        check_loaded(its_weights(id), model, told, tuple(f"{n}." for n in classifiers(model)))
        return model

    model = create(num_classes=0)
    head = dict(model.pretrained_cfg).get("classifier")
    if isinstance(head, str) and not has(model, head):  # timm takes off more than the last layer
        whole = create()
        if has(whole, head) and isinstance(whole.get_classifier(), nn.Module):
            model = whole
    data = cast(Any, timm.data).resolve_model_data_config(model)
    interpolation = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    preprocessing = Preprocessing(
        int(data["input_size"][-1]), tuple(data["mean"]), tuple(data["std"]), interpolation, float(data["crop_pct"]),
        "squash" if data.get("crop_mode") == "squash" else "center",
    )  # fmt: skip
    return measured(id, "timm", model, head if isinstance(head, str) and has(model, head) else LAST, preprocessing)


def from_transformers(id: str, weights: str | None) -> VisionModel:
    """An image classifier of transformers."""
    try:
        with quiet("transformers"):
            from transformers import (
                MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
                AutoConfig,
                AutoImageProcessor,
                AutoModelForImageClassification,
            )

            config: Any = AutoConfig.from_pretrained(id, **NO_CODE)
            if (kind := config.model_type) in NO_PICTURES:
                raise ModelError(f"{id} is a {kind}, which {NO_PICTURES[kind]}.")
            if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                other = f"timm has such a model: --model {IN_TIMM[kind]}." if kind in IN_TIMM else CHOOSE
                raise ModelError(f"{id} is a {kind}, of which transformers has no image classifier. {other}")
            if weights is None:
                model, info = loaded(its_weights(id), "transformers", AutoModelForImageClassification, id, **NO_CODE)
                check_loaded(its_weights(id), model, info, tuple(f"{name.split('.')[0]}." for name in heads_in(model)))
            else:
                model = AutoModelForImageClassification.from_config(config, **NO_CODE)
            try:
                processor = dict(AutoImageProcessor.from_pretrained(id, **NO_CODE).to_dict())
            except (OSError, ValueError):  # a folder without one: the values that most of its models use
                processor = {}
    except ModelError:
        raise
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise ModelError(
                f"{id} is a model of its own kind, which brings its code with it; visionlora runs no code of models. {CHOOSE}"
            ) from None
        raise cannot_be_had(id, e) from None
    sees = getattr(config, "vision_config", config)  # of CLIP and SigLIP, which have another for texts
    preprocessing = as_preprocessing(id, processor, getattr(sees, "image_size", None))
    heads = heads_in(model)
    if len(heads) > 1:
        for name in heads:
            model.set_submodule(name, nn.Identity())
    head = LAST if len(heads) > 1 else heads[0] if heads else "classifier"
    return measured(id, "transformers", model, head, preprocessing)


def from_torchvision(id: str, weights: str | None) -> VisionModel:
    """A classifier of torchvision, named `torchvision/NAME`."""
    from torchvision import models

    name = id.removeprefix(TORCHVISION)
    known = list(models.list_models(module=models))
    if name not in known:
        raise ModelError(f"torchvision has no classifier {name!r}. {nearest(name, known)}")
    try:
        model = models.get_model(name, weights="DEFAULT" if weights is None else None)
        transforms = cast(Any, models.get_model_weights(name)).DEFAULT.transforms()
    except Exception as e:
        raise cannot_be_had(id, e) from None
    size, short = int(transforms.crop_size[0]), int(transforms.resize_size[0])
    preprocessing = Preprocessing(
        size, tuple(transforms.mean), tuple(transforms.std), str(transforms.interpolation.value), size / short
    )
    head = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    return measured(id, "torchvision", model, head, preprocessing)


def measured(id: str, library: str, model: nn.Module, head: str, preprocessing: Preprocessing) -> VisionModel:
    """Takes the head off, looks how wide the features are, and leaves out what does not reach them."""
    if head == LAST:
        append_head(model)
    if not has(model, head):
        names = [n for n, _ in model.named_children()]
        raise ModelError(f"{id} has no head named {head!r} (there: {', '.join(names)}), so it cannot classify.")
    place = nn.Identity()
    model.set_submodule(head, place)
    picture = torch.randn(1, 3, preprocessing.size, preprocessing.size, generator=torch.Generator().manual_seed(0))
    output, passed = run(id, model, place, picture)
    features = as_logits(output)
    if features.dim() != 2:
        raise ModelError(f"{id} gives features of shape {tuple(features.shape)} where one row per picture is needed.")
    # other layers may follow there, or other heads stand beside it
    if features is output and not fits(model, head, picture, features, passed):
        append_head(model)
        head = LAST
    flat = head != LAST and passed[0].dim() == 4
    shorten(model, picture, features)
    return VisionModel(id, library, "", model, head, int(features.shape[-1]), preprocessing, flat=flat)


def read_state(opened: VisionModel, path: Path) -> str:
    """Loads a state dict; heads in it are left out, and anything else that does not fit is an error.

    Returns:
        A sentence on what was taken of several, and left out; empty for nothing.

    Raises:
        ModelError: when the file cannot be read or its names or shapes are not the model's.
    """
    from visionlora.formats.container import open_file

    if not path.is_file():
        raise ModelError(f"There is no file {path} with weights. Name a state dict (.safetensors or .pt), or `random`.")
    try:
        tensors = open_file(path, mapped=True).tensors
    except AdapterFileError as e:
        raise ModelError(str(e)) from None
    own = opened.model.state_dict()
    found, note = weights_in(tensors, own)
    found, more = of_backbone(opened.model, found, own)
    found = as_spelled_now(opened.model, found, own)
    heads = head_names(opened.model, opened.head)
    found = {n: t for n, t in found.items() if n in own or not n.startswith(heads)}
    check_state(opened.id, path, own, found)
    opened.model.load_state_dict(found)
    return note + more


def check_state(id: str, path: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ModelError for names or shapes that are not the model's."""
    missing, extra = own.keys() - given.keys(), given.keys() - own.keys()
    wrong = {
        n: (str(tuple(given[n].shape)), str(tuple(own[n].shape)))
        for n in own.keys() & given.keys()
        if own[n].shape != given[n].shape
    }
    if missing or extra or wrong:
        said = differences(missing, extra, wrong)
        raise ModelError(f"The weights in {path} are not those of {id}: the file {said}. Check --model.")
