"""Vectors of tokens that textual inversion added: files of their own, or bundled with a LoRA.

bundle_emb.<token>.string_to_param.*      LyCORIS
bundle_emb.<token>.clip_l, .clip_g        OneTrainer
emb_params; clip_l, clip_g                webui's and kohya's own files, the token being the file's name
string_to_param.*                         webui's .pt
<token>                                   diffusers' and cloneofsimo's: the name of the only tensor is the token
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from visionlora.formats.header import unshared, write_file
from visionlora.formats.parts import not_finite

BUNDLED = re.compile(r"bundle_emb\.(?P<token>.+)\.(?P<what>string_to_param\.[^.]+|clip_l|clip_g|emb_params)")
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
SECOND_ENCODER_WIDTH = 1280
"""Of SDXL's second text encoder; the first ones of all families are 768 or 1024 wide."""

Embeddings = dict[str, dict[str, Tensor]]


def component_of(what: str, vectors: Tensor) -> str:
    """Which text encoder vectors belong to."""
    return PARTS.get(what, "text_encoder_2" if vectors.shape[-1] == SECOND_ENCODER_WIDTH else "text_encoder")


def usable(tensor: Tensor) -> bool:
    """Whether a tensor can be the vectors of a token."""
    return tensor.dim() in (1, 2) and tensor.is_floating_point() and tensor.shape[-1] > 1


def take_embeddings(path: Path, tensors: dict[str, Tensor]) -> Embeddings:
    """The embeddings of a file; their tensors are taken out of `tensors`.

    Raises:
        AdapterFileError: when a value is NaN or infinite.
    """
    found: Embeddings = {}

    def keep(token: str, what: str, key: str) -> None:
        vectors = tensors.pop(key)
        found.setdefault(token, {})[component_of(what, vectors)] = vectors.reshape(-1, vectors.shape[-1])
        check_vectors(path, found)

    for key in [k for k in tensors if k.startswith("bundle_emb.")]:
        if (match := BUNDLED.fullmatch(key)) and usable(tensors[key]):
            keep(match["token"], match["what"], key)
    for key in [k for k in tensors if re.fullmatch(r"<[^<>]+>", k)]:
        if usable(tensors[key]):
            keep(key, key, key)
    if found or not tensors or len(tensors) > 4:
        return found
    alone = [k for k in tensors if k in ("emb_params", "clip_l", "clip_g") or k.startswith("string_to_param.")]
    named = len(tensors) == 1 and "." not in next(iter(tensors))
    for key in alone or (list(tensors) if named else []):
        if usable(tensors[key]):
            keep(path.stem if alone else key, key, key)
    if alone:  # the rest of webui's file says how it was trained
        for key in [k for k in tensors if k in ("step", "sd_checkpoint", "string_to_token.*")]:
            tensors.pop(key)
    return found


def files_beside(path: Path, tokens: Iterable[str]) -> dict[str, Path]:
    """Where each token goes that a file cannot hold: `dog-rex.safetensors` beside `dog.safetensors`, for `<rex>`."""
    found: dict[str, Path] = {}
    taken: set[str] = set()  # on many disks names are the same that differ in case alone
    for token in tokens:
        stem = name = path.stem + "-" + re.sub(r"[^\w-]+", "", token)
        number = 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        found[token] = path.with_name(f"{name}.safetensors")
    return found


def write_beside(path: Path, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes each token to a file of its own, as diffusers' `load_textual_inversion` and A1111 take them."""
    files = files_beside(path, embeddings)
    for token, parts in embeddings.items():
        names = (
            {component: what for what, component in PARTS.items()} if len(parts) > 1 else dict.fromkeys(parts, token)
        )
        write_file(
            files[token], save_tensors(unshared({names[c]: vectors for c, vectors in parts.items()}), {"format": "pt"})
        )


def check_vectors(path: Path, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises AdapterFileError when some value of a token is NaN or infinite."""
    for token, parts in embeddings.items():
        if not all(bool(torch.isfinite(vectors).all()) for vectors in parts.values()):
            raise not_finite(path, token)
