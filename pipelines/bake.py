"""Base model + adapter files -> a full model with the adapters in its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from visionlora.atomic import check_new
from visionlora.config.choices import dtype_name
from visionlora.config.generate import use_from
from visionlora.data.wording import first_names
from visionlora.diffusion.uses import check_once
from visionlora.errors import ConfigError, ModelError
from visionlora.formats.embeddings import files_beside, write_beside
from visionlora.formats.header import hashed, write_file
from visionlora.loaders import apply, check_draws, follow_noise, load_adapter, open_for, words_elsewhere
from visionlora.lora.handle import Handle
from visionlora.lora.merge import bake as bake_handles
from visionlora.mixing.scales import Scale, block_factors, scale_in_file
from visionlora.models.base import BaseModel, quiet
from visionlora.models.single_file import single_file

INDEX = "model_index.json"
BESIDE = ("README.md", ".gitattributes")
"""What lies beside the parts of a model in diffusers' layout."""


def bake(
    model: str, adapters: Sequence[tuple[Any, ...]], output: str | Path, dtype: str = "float32",
    force: bool = False, overwrite: bool = False, say: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Writes a model in which the adapters are merged for good; it needs nothing of visionlora to be used.

    Args:
        model: the base; `auto` takes the one that the first adapter names.
        adapters: each (path, scale) or (path, scale, factors by block), as in `GenerateConfig.loras`.
        output: the folder to write, in diffusers' layout; or a name ending in .safetensors, for one checkpoint in the
            layout of the original Stable Diffusion 1.x code, which has no place for added words: each is in a file beside it.
        dtype: of the weights written, `float32`, `float16` or `bfloat16`, or `fp32`, `fp16`, `bf16`; merging itself is in fp32.
        force: accept a fine-tune of the adapters' base.
        overwrite: replace what is there.
        say: called with what the model cannot say of itself.

    Raises:
        AdapterFileError: when an adapter cannot be read or was made for another base.
        ModelError: when the base cannot be opened or the folder cannot be written.
        ConfigError: when the output exists, an adapter is given twice, or a merged weight would not be finite.
    """
    import torch

    dtype_name(dtype)
    output = Path(output).expanduser()
    check_new(output, overwrite)
    if output.is_dir():
        check_model_alone(output)
    uses = [use_from(given) for given in adapters]
    check_once(uses)
    loaded = [(load_adapter(path), scale_in_file(path, scale, blocks)) for path, scale, blocks in uses]
    for (path, _, _), (adapter, _) in zip(uses, loaded, strict=True):
        check_draws(adapter, path)
    words = {token: parts for adapter, _ in loaded for token, parts in adapter.embeddings.items()}
    beside = files_beside(output, words) if output.suffix == ".safetensors" else {}
    for file in beside.values():
        check_new(file, overwrite)
    base = open_for([adapter for adapter, _ in loaded], model)
    if follow_noise(base, [adapter for adapter, _ in loaded]):
        say("The noise levels of the model end at nothing but noise, as an adapter was trained (zero_terminal_snr).")
    if not base.is_xl and (skips := sorted({a.clip_skip for a, _ in loaded} - {1})):
        say(
            f"An adapter was trained with clip_skip {skips[-1]}, which a model cannot say of itself: set it where you draw "
            f"(visionlora: --clip-skip {skips[-1]}; diffusers, which counts from 0: clip_skip={skips[-1] - 1})."
        )
    for path, word in words_elsewhere({path: a for (path, _, _), (a, _) in zip(uses, loaded, strict=True)}, base.pipe):
        say(
            f"{path} was trained with the word {word}, whose vectors are not in it: the model does not know it. Bake the file "
            "that has them too, as one adapter more."
        )
    # All are put on before any is merged: each adapter's effect is that on the untouched base.
    handles = [(apply(base, a, f"baked{i}", scale.strength, force), scale) for i, (a, scale) in enumerate(loaded)]
    for own, scale in handles:
        scale_blocks(base, own, scale)
    bake_handles([h for own, _ in handles for h in own])
    with quiet("diffusers"):  # it warns of modules to keep in fp32 where there are none
        base.pipe.to(getattr(torch, dtype_name(dtype)))
    if output.suffix == ".safetensors":
        write_file(output, hashed(single_file(base.pipe), {"format": "pt"}))
        write_beside(output, words)
        for token, file in beside.items():
            say(f"The word {token} is in a file beside it, for the folder of embeddings: {file}")
        return output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            with quiet("diffusers", "transformers"):
                base.pipe.save_pretrained(Path(temporary) / "model")
            if overwrite and output.exists():
                output.rename(Path(temporary) / "before")
            (Path(temporary) / "model").rename(output)
    except (OSError, SafetensorError) as e:  # of a full disk; safetensors raises its own
        raise ModelError(
            f"The model cannot be written to {output}: {getattr(e, 'strerror', None) or e}. Choose another folder."
        ) from None
    return output


def check_model_alone(folder: Path) -> None:
    """Raises ConfigError for a folder that cannot be replaced by a model: it holds something else, which would be lost."""
    try:
        parts = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))) if (folder / INDEX).is_file() else set()
    except (ValueError, OSError):
        parts = set()
    there = sorted(path.name for path in folder.iterdir())
    if others := [name for name in there if name not in {INDEX, *parts, *BESIDE}]:
        raise ConfigError(
            f"{folder} holds more than a model ({first_names(others)}), which would be lost: name another output, or empty it "
            "yourself."
        )


def scale_blocks(base: BaseModel, handles: Sequence[Handle], scale: Scale) -> None:
    """Sets the scale of every layer of one adapter, as it would be when drawn with.

    Raises:
        ConfigError: when a word reaches none of its layers.
    """
    component = {id(part): name for name, part in base.components().items()}
    layers = [(component[id(h.model)], layer) for h in handles for layer in (*h.methods, *h.in_full)]
    factors = block_factors(scale, layers)
    for h in handles:
        for layer, m in h.methods.items():
            m.scale = scale.strength * factors[component[id(h.model)], layer]
        for layer, changed in h.in_full.items():
            changed.set_scale(scale.strength * factors[component[id(h.model)], layer])
