"""Pictures to latents and captions to text embeddings, once, by the frozen VAE and text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visionlora.data.cache import TensorCache, default_cache_folder, key_of
from visionlora.data.folder import ImageItem
from visionlora.data.images import decode, fit
from visionlora.errors import ModelError
from visionlora.models.base import BaseModel
from visionlora.models.fingerprint import weights_fingerprint

PICTURES_AT_ONCE = 8
CAPTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Encoded:
    """The training data as the UNet sees it. Letters: n pictures, v variants (1, or 2 with the mirrored one)."""

    mean: Tensor
    """(n, v, c, h, w), raw, not scaled."""
    std: Tensor
    """(n, v, c, h, w)."""
    text: Tensor
    """(n, tokens, width)."""
    empty_text: Tensor
    """(tokens, width), of the empty caption."""
    scaling_factor: float
    computed: int
    """How many latents and captions were not in the cache."""

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, index: Tensor, variant: Tensor, noise: Tensor) -> Tensor:
        """A fresh draw of the latents, (b, c, h, w), scaled as the UNet wants them; noise is standard normal."""
        return (self.mean[index, variant] + self.std[index, variant] * noise) * self.scaling_factor


def cut_captions(base: BaseModel, captions: Sequence[str]) -> list[tuple[str, str]]:
    """Captions that are longer than the text encoder reads, each with the words that it never sees."""
    tokenizer = base.pipe.tokenizer
    cut = []
    for caption in dict.fromkeys(captions):
        ids = tokenizer(caption, truncation=False, verbose=False).input_ids
        if len(ids) > tokenizer.model_max_length:
            cut.append((caption, str(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])).strip()))
    return cut


def encode_text(base: BaseModel, captions: Sequence[str]) -> Tensor:
    """Last hidden states, (captions, tokens, width), as `StableDiffusionPipeline` computes them."""
    tokenizer, encoder = base.pipe.tokenizer, base.pipe.text_encoder
    ids = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        states: Tensor = encoder(ids.to(encoder.device))[0]
    return states.cpu()


def encode_pictures(base: BaseModel, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (b, h, w, 3) -> mean and standard deviation of the latents, raw, (b, c, h/f, w/f) in fp32.

    Raises:
        ModelError: when the VAE gives NaN or infinite latents.
    """
    vae = base.pipe.vae
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    with torch.no_grad():
        latent = vae.encode(x).latent_dist
    mean, std = latent.mean.float().cpu(), latent.std.float().cpu()
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise ModelError(f"The VAE of {base.id} gives NaN or infinite latents in {vae.dtype}. Use --precision fp32.")
    return mean, std


def encode_dataset(
    base: BaseModel,
    items: Sequence[ImageItem],
    size: int,
    flip: bool = False,
    cache: TensorCache | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Encoded:
    """All pictures and captions, from the cache where it has them.

    Args:
        base: whose VAE and text encoder are used.
        items: the pictures.
        size: width and height in px.
        flip: also encode each picture mirrored.
        cache: by default the user's cache folder.
        progress: called with (what, done, total).
    """
    cache = cache or TensorCache(default_cache_folder())
    vae_id, text_id = weights_fingerprint(base.pipe.vae), weights_fingerprint(base.pipe.text_encoder)
    variants = ("upright", "mirrored") if flip else ("upright",)
    wanted = [(item, variant) for item in items for variant in variants]

    def latents_of(positions: list[int]) -> list[dict[str, Tensor]]:
        pictures = []
        for i in positions:
            item, variant = wanted[i]
            picture = fit(decode(item.path), size)
            pictures.append(picture[:, ::-1] if variant == "mirrored" else picture)
        mean, std = encode_pictures(base, np.ascontiguousarray(np.stack(pictures)))
        return [{"mean": m, "std": s} for m, s in zip(mean, std, strict=True)]

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    keys = [key_of("latents", vae_id, item.sha256, f"centre-crop lanczos {size} {variant}") for item, variant in wanted]
    latents, new_latents = cache.fill(keys, latents_of, PICTURES_AT_ONCE, told("Encoding pictures"))
    captions = ["", *dict.fromkeys(item.caption for item in items)]
    texts, new_texts = cache.fill(
        [key_of("text", text_id, str(base.pipe.tokenizer.model_max_length), c) for c in captions],
        lambda part: [{"text": t} for t in encode_text(base, [captions[i] for i in part])],
        CAPTIONS_AT_ONCE,
        told("Encoding captions"),
    )
    by_caption = {c: entry["text"].float() for c, entry in zip(captions, texts, strict=True)}

    def stacked(name: str) -> Tensor:
        stack = torch.stack([entry[name] for entry in latents])
        return stack.view(len(items), len(variants), *stack.shape[1:])

    return Encoded(
        mean=stacked("mean"),
        std=stacked("std"),
        text=torch.stack([by_caption[item.caption] for item in items]),
        empty_text=by_caption[""],
        scaling_factor=float(base.pipe.vae.config.scaling_factor),
        computed=new_latents + new_texts,
    )
