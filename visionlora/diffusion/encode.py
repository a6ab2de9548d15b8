"""Pictures to latents and captions to text embeddings, once, by the frozen VAE and text encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visionlora.data.augment import Made, Variant, made_of
from visionlora.data.buckets import Framing, Size, bucket_of, framing
from visionlora.data.cache import Entries, Share, TensorCache, cut, default_cache_folder, key_of
from visionlora.data.folder import ImageItem
from visionlora.data.groups import Group, grouped
from visionlora.data.images import decode
from visionlora.data.sources import Told
from visionlora.diffusion.conditioning import (
    Conditioning,
    all_ids,
    as_long,
    empty_is_zero,
    ids_of,
    summary_of,
    text_states,
    token_ids,
    windows_of,
)
from visionlora.errors import ConfigError, ModelError
from visionlora.lora.damage import damaged
from visionlora.models.base import BaseModel
from visionlora.models.fingerprint import content_fingerprint, settings_fingerprint

PIXELS_AT_ONCE = {"cuda": 8 * 512 * 512, "cpu": 512 * 512}
"""By device: a processor is no faster with more, and needs less memory with fewer."""
PICTURES_AT_ONCE = 32
CAPTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Plan:
    """How pictures become training pictures."""

    resolution: int
    """Side of a square of the wanted area, px."""
    step: int | None = None
    """Sides of the buckets are multiples of this, px; None for squares alone."""
    upscale: bool = False
    """Whether pictures are enlarged to reach the area."""
    variants: tuple[Variant, ...] = (Variant(),)
    """What is made of each picture, one of which is drawn each time."""

    def framing(self, item: ImageItem) -> Framing:
        """Of one picture."""
        return self.framing_of(item.size or decode(item.path).size[::-1])

    def framing_of(self, size: Size) -> Framing:
        """Of a picture of this size."""
        if self.step is None:
            return framing(size, (self.resolution, self.resolution))
        return framing(size, bucket_of(size, self.resolution, self.step, self.upscale))


@dataclass(frozen=True)
class Encoded:
    """The training data as the UNet sees it. Letters: n pictures, v variants, c h w channels and size of the latents."""

    items: tuple[ImageItem, ...]
    framings: tuple[Framing, ...]
    latents: Entries
    """Of each picture `mean` and `std` (v, c, h, w), raw, not scaled; `corner` (v, 2); with a mask also `mask` (v, h, w)."""
    captions: tuple[str, ...]
    """Distinct, the empty one first."""
    caption_of: tuple[tuple[int, ...], ...]
    """Of each picture the positions of its captions, one of which is drawn each time; a likelier one is there more often."""
    texts: Entries
    """Of each caption `text` (tokens, width), longer where it has several windows, and `pooled` (width) where that is read."""
    scaling_factor: float
    zero_when_empty: bool
    """Whether the empty caption is all zeros."""
    computed: int
    """How many latents and captions were not in the cache."""
    sides: tuple[int, ...]
    """0 for a picture to learn from, 1 for one of the class it belongs to."""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Pictures that may share a forward pass."""
        return grouped([f.bucket for f in self.framings], [item.repeats for item in self.items], self.sides)

    def latent(self, i: int, variant: int, noise: Tensor | None = None) -> Tensor:
        """Of one picture, (c, h, w), scaled as the UNet wants them.

        Args:
            i: the picture.
            variant: of it.
            noise: standard normal, for a fresh draw; the mean when None.
        """
        entry = self.latents[i]
        mean = entry["mean"][variant].float()
        drawn = mean if noise is None else mean + entry["std"][variant].float() * noise
        return drawn * self.scaling_factor

    def mask(self, i: int, variant: int) -> Tensor | None:
        """How much each latent position counts, (h, w) in 0 … 1; None without a mask."""
        found = self.latents[i].get("mask")
        return None if found is None else found[variant]

    def masks(self, pictures: Sequence[int], variants: Sequence[int], unmasked_weight: float) -> Tensor | None:
        """How much each position counts, (b, h, w); None when no picture has a mask.

        Args:
            pictures: of one size.
            variants: of the pictures.
            unmasked_weight: how much what lies outside of the masks counts.
        """
        masks = [self.mask(i, v) for i, v in zip(pictures, variants, strict=True)]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones(self.shape(pictures[0])[1:])
        return torch.stack([whole if m is None else m * (1 - unmasked_weight) + unmasked_weight for m in masks])

    def shape(self, i: int) -> tuple[int, int, int]:
        """(c, h, w) of a picture's latents."""
        c, h, w = self.latents[i]["mean"].shape[1:]
        return c, h, w

    def variants(self, i: int) -> int:
        """How many there are of a picture."""
        return len(self.latents[i]["mean"])

    def conditioning(self, pictures: Sequence[int], captions: Sequence[int], variants: Sequence[int]) -> Conditioning:
        """What the UNet is told.

        Args:
            pictures: which, for their sizes.
            captions: positions in `captions`; 0 is the empty one.
            variants: of the pictures.
        """
        entries = [self.texts[c] for c in captions]
        text = torch.stack(as_long([e["text"].float() for e in entries]))
        if "pooled" not in entries[0]:
            return Conditioning(text)
        pooled = torch.stack([e["pooled"].float() for e in entries])
        if self.zero_when_empty:
            there = torch.tensor([c != 0 for c in captions], dtype=text.dtype)
            text, pooled = text * there[:, None, None], pooled * there[:, None]
        return Conditioning(text, pooled, self.sizes(pictures, variants))

    def sizes(self, pictures: Sequence[int], variants: Sequence[int]) -> Tensor:
        """Original size, corner of the cut and size in px, (b, 6)."""
        rows = []
        for i, v in zip(pictures, variants, strict=True):
            top, left = self.latents[i]["corner"][v].tolist()
            rows.append(self.framings[i].conditions((top, left)))
        return torch.tensor(rows, dtype=torch.float32)


def cut_captions(base: BaseModel, captions: Sequence[str]) -> list[tuple[str, str]]:
    """Captions that are longer than the text encoder reads, each with the words that it never sees."""
    tokenizer = base.pipe.tokenizer
    cut = []
    for caption in dict.fromkeys(captions):
        if base.windows > 1:
            if lost := windows_of(base.pipe, tokenizer, caption, base.windows)[1]:
                cut.append((caption, str(tokenizer.decode(lost)).strip()))
            continue
        ids = all_ids(base.pipe, tokenizer, caption)
        if len(ids) > tokenizer.model_max_length:
            cut.append((caption, str(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])).strip()))
    return cut


def unread_letters(base: BaseModel, captions: Sequence[str]) -> list[str]:
    """Letters and digits of captions for which a model has no token, as small ones may: they read alike."""
    tokenizer = base.pipe.tokenizer

    def unread(text: str) -> bool:
        return tokenizer.unk_token_id in all_ids(base.pipe, tokenizer, text)[1:-1]

    letters = {letter for caption in dict.fromkeys(captions) if unread(caption) for letter in caption.lower()}
    return sorted(letter for letter in letters if letter.isalnum() and unread(letter))


@torch.no_grad()
def encode_text(base: BaseModel, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """Of each caption `text` (tokens, width) and for SDXL `pooled` (width), as the pipeline computes them.

    Raises:
        ModelError: when they are not finite, as the weights of a text encoder are not.
    """
    encoders = {name: encoder for name, _, encoder in base.text_parts()}
    read = encode_long if base.windows > 1 else encode_short
    rows = read(base, list(encoders.values()), captions)
    finite = all(bool(torch.isfinite(t).all()) for row in rows for t in row.values())
    if not finite and (error := damaged(f"The weights of {base.id}", encoders)) is not None:
        raise error
    return rows


def encode_short(base: BaseModel, encoders: Sequence[Any], captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """Of captions of one window; see `encode_text`."""
    ids = token_ids(base, captions)
    text, pooled = text_states(encoders, [i.to(e.device) for i, e in zip(ids, encoders, strict=True)], base.clip_skip)
    rows = [{"text": t} for t in text.cpu()]
    return rows if pooled is None else [{**row, "pooled": p} for row, p in zip(rows, pooled.cpu(), strict=True)]


def encode_long(base: BaseModel, encoders: Sequence[Any], captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """Of captions of one or several windows; see `encode_text`."""
    parts = base.text_parts()
    ids = [[windows_of(base.pipe, t, caption, base.windows)[0] for caption in captions] for _, t, _ in parts]
    read = [torch.cat(own).to(e.device) for own, e in zip(ids, encoders, strict=True)]
    text = text_states(encoders, read, base.clip_skip)[0].cpu()
    rows = [{"text": windows.flatten(0, 1)} for windows in text.split([len(windows) for windows in ids[0]])]
    if not base.is_xl:
        return rows
    pooled = summary_of(encoders[-1], ids_of(base.pipe, parts[-1][1], captions)).cpu()
    return [{**row, "pooled": p} for row, p in zip(rows, pooled, strict=True)]


def window_count(base: BaseModel, captions: Sequence[str]) -> int:
    """How many windows the text encoder reads of all captions."""
    if base.windows == 1:
        return len(captions)
    return sum(len(windows_of(base.pipe, base.pipe.tokenizer, caption, base.windows)[0]) for caption in captions)


@torch.no_grad()
def encode_pictures(base: BaseModel, pictures: npt.NDArray[np.uint8], in_bf16: bool = False) -> tuple[Tensor, Tensor]:
    """uint8 (b, h, w, 3) -> mean and standard deviation of the latents, raw, (b, c, h/f, w/f) in fp32.

    A VAE that gives NaN in half precision (SDXL's does in fp16) works in fp32 from then on.

    Args:
        base: whose VAE is used.
        pictures: of one size.
        in_bf16: multiply in bf16 what is stored in fp32. Of the embedded VAE it moves the latents by less than 1 % of their
            spread, and far less than the standard deviation that the VAE itself gives them.

    Raises:
        ModelError: when it gives NaN or infinite latents in fp32 too.
    """
    vae = base.pipe.vae
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=in_bf16):
        latent = vae.encode(x).latent_dist
    mean, std = latent.mean.float().cpu(), latent.std.float().cpu()
    if torch.isfinite(mean).all() and torch.isfinite(std).all():
        return mean, std
    if vae.dtype == torch.float32 and not in_bf16:
        raise damaged(f"The weights of {base.id}", {"vae": vae}) or ModelError(
            f"The VAE of {base.id} gives NaN or infinite latents: its weights are damaged."
        )
    vae.to(torch.float32)
    return encode_pictures(base, pictures)


def encode_variants(
    base: BaseModel, pictures: Sequence[Sequence[Made]], pixels: int, in_bf16: bool
) -> list[dict[str, Tensor]]:
    """Pictures of one size, each with its variants -> what `Encoded.latents` holds of each.

    Args:
        base: see `encode_pictures`.
        pictures: so many variants of each.
        pixels: no more go through the VAE at once, but for those of one variant.
        in_bf16: see `encode_pictures`.
    """
    # A picture that fills its bucket is the same however it is cut: it is encoded once.
    place: dict[bytes, int] = {}
    rows: list[npt.NDArray[np.uint8]] = []
    of_row: list[int] = []
    for made in (v.pixels for variants in pictures for v in variants):
        of_row.append(place.setdefault(hashlib.sha256(made.data).digest(), len(rows)))
        if of_row[-1] == len(rows):
            rows.append(made)
    h, w, _ = rows[0].shape
    parts = [
        encode_pictures(base, np.stack([rows[i] for i in part]), in_bf16)
        for part in cut(range(len(rows)), max(1, pixels // (h * w)))
    ]
    mean, std = (torch.cat(each)[of_row] for each in zip(*parts, strict=True))
    count, entries = len(pictures[0]), []
    for variants, own_mean, own_std in zip(pictures, mean.split(count), std.split(count), strict=True):
        corner = torch.tensor([v.corner for v in variants], dtype=torch.int32)
        entry = {"mean": own_mean, "std": own_std, "corner": corner}
        if masks := [v.mask for v in variants if v.mask is not None]:
            whole = torch.from_numpy(np.stack(masks))[:, None]
            entry["mask"] = torch.nn.functional.interpolate(whole, size=mean.shape[-2:], mode="area")[:, 0]
        entries.append(entry)
    return entries


def cache_bytes(base: BaseModel, framings: Sequence[Framing], variants: int, captions: int) -> tuple[int, int]:
    """About how much room latents and text take in a cache.

    Args:
        base: which computes them; it encodes one caption to see.
        framings: of the pictures.
        variants: of each picture.
        captions: different ones, each as often as the text encoder reads it; see `window_count`.
    """
    positions = sum(f.bucket[0] * f.bucket[1] for f in framings) // base.scale_factor**2
    latents = 2 * int(base.pipe.vae.config.latent_channels) * positions * variants * torch.float32.itemsize
    text = sum(tensor.nbytes for tensor in encode_text(base, [""])[0].values()) if captions else 0
    return latents, text * captions


def check_room(base: BaseModel, cache: TensorCache, framings: Sequence[Framing], variants: int, captions: int) -> None:
    """Raises ConfigError when neither disk nor memory has room for what the cache lacks; see `cache_bytes`."""
    latents, text = cache_bytes(base, framings, variants, captions)
    if cache.has_room(latents + text):
        return
    raise ConfigError(
        f"The cache needs {(latents + text) / 2**30:.2f} GiB more (latents of {len(framings):,} pictures "
        f"{latents / 2**30:.2f}, text of {captions:,} captions {text / 2**30:.2f}), but the disk of {cache.folder} has "
        f"{cache.free / 2**30:.2f} GiB free. Lower caption_variants or picture_variants, make room, or name a folder on "
        "another disk in the environment variable VISIONLORA_CACHE."
    )


def of_one_size(positions: Sequence[int], framings: Sequence[Framing], pixels: int) -> Iterable[list[int]]:
    """Positions cut into those that are encoded at once: of one size, and of no more pixels together."""
    by_bucket: dict[Size, list[int]] = {}
    for i in positions:
        by_bucket.setdefault(framings[i].bucket, []).append(i)
    for (h, w), own in by_bucket.items():
        yield from cut(own, max(1, min(PICTURES_AT_ONCE, pixels // (h * w))))


def encode_dataset(
    base: BaseModel,
    items: Sequence[ImageItem],
    plan: Plan | int,
    cache: TensorCache | None = None,
    progress: Told | None = None,
    *,
    captions: Sequence[Sequence[str]] | None = None,
    class_items: Sequence[ImageItem] = (),
    more_captions: Sequence[str] = (),
    share: Share | None = None,
    salt: str = "",
    in_bf16: bool = False,
) -> Encoded:
    """All pictures and captions, from the cache where it has them. Memory is bounded by what is computed at once.

    Args:
        base: whose VAE and text encoders are used.
        items: the pictures.
        plan: their sizes and variants; a number for squares of so many px.
        cache: by default the user's cache folder.
        progress: called with (what is done, done, total).
        captions: of each picture those that are drawn from; its own when not given.
        class_items: pictures of the class that the subject belongs to, put behind the others.
        more_captions: of no picture; they come right behind the empty one.
        share: of the work, where several processes do it.
        salt: what the captions mean beside the model's weights: a new word's vectors stand in for its rows of the table.
        in_bf16: see `encode_pictures`; the cache keeps such latents apart.

    Raises:
        ConfigError: when the cache has no room for them; nothing has been computed then.
    """
    plan = Plan(plan) if isinstance(plan, int) else plan
    cache = cache or TensorCache(default_cache_folder())
    everything = (*items, *class_items)
    framings = tuple(plan.framing(item) for item in everything)

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    pixels = PIXELS_AT_ONCE.get(base.pipe.vae.device.type, PIXELS_AT_ONCE["cuda"])
    keys = latent_keys(base, everything, framings, plan.variants, in_bf16)
    own_captions = [tuple(c) for c in captions] if captions is not None else [(item.caption,) for item in items]
    own_captions += [(item.caption,) for item in class_items]
    distinct = list(dict.fromkeys(["", *more_captions, *(c for each in own_captions for c in each)]))
    place, of_texts = {c: i for i, c in enumerate(distinct)}, text_keys(base, distinct, salt)
    lacking = [f for key, f in zip(keys, framings, strict=True) if not cache.holds(key)]
    unread = [caption for key, caption in zip(of_texts, distinct, strict=True) if not cache.holds(key)]
    check_room(base, cache, lacking, len(plan.variants), window_count(base, unread))
    latents, new_latents = cache.fill(
        keys,
        lambda part: encode_variants(
            base, [made_of(everything[i], framings[i], plan.variants) for i in part], pixels, in_bf16
        ),
        lambda missing: of_one_size(missing, framings, pixels // len(plan.variants)),
        told("Encoding pictures"),
        share,
    )
    texts, new_texts = cache.fill(
        of_texts,
        lambda part: encode_text(base, [distinct[i] for i in part]),
        CAPTIONS_AT_ONCE,
        told("Encoding captions"),
        share,
    )
    return Encoded(
        items=everything,
        framings=framings,
        latents=latents,
        captions=tuple(distinct),
        caption_of=tuple(tuple(place[c] for c in each) for each in own_captions),
        texts=texts,
        scaling_factor=float(base.pipe.vae.config.scaling_factor),
        zero_when_empty=empty_is_zero(base),
        computed=new_latents + new_texts,
        sides=(0,) * len(items) + (1,) * len(class_items),
    )


def latent_keys(
    base: BaseModel, items: Sequence[ImageItem], framings: Sequence[Framing], variants: Sequence[Variant], in_bf16: bool
) -> list[str]:
    """Where the cache keeps the latents of pictures."""
    vae, made = base.pipe.vae, [variant.key for variant in variants]
    content = content_fingerprint(vae.encoder, vae.quant_conv)
    vae_id = (content, settings_fingerprint(vae.config), f"{vae.dtype}{' bf16' if in_bf16 else ''}")
    return [key_of("latents 4", *vae_id, i.content, repr(f), *made) for i, f in zip(items, framings, strict=True)]


def text_keys(base: BaseModel, captions: Sequence[str], salt: str = "") -> list[str]:
    """Where the cache keeps the embeddings of captions: by what the encoders compute, and in what, from which tokens.

    Of the table of words the rows that a caption reads are in its key, so that a word that was taught later changes no other.
    """
    parts = base.text_parts()
    contents = [content_fingerprint(e, without=e.get_input_embeddings()) for _, _, e in parts]
    settings = [f"{settings_fingerprint(e.config)} {e.dtype}" for _, _, e in parts]
    fixed = ("text 4", *contents, *settings, f"clip_skip {base.clip_skip}", salt)
    read = [_tokens_of(base, t, e, captions) for _, t, e in parts]
    return [key_of(*fixed, *own) for own in zip(*read, strict=True)]


def _tokens_of(base: BaseModel, tokenizer: Any, encoder: Any, captions: Sequence[str]) -> list[str]:
    """What an encoder reads of each caption: the tokens of each window, and what its table holds for them."""
    if base.windows == 1:
        ids = [[row] for row in ids_of(base.pipe, tokenizer, captions).tolist()] if captions else []
    else:
        ids = [windows_of(base.pipe, tokenizer, caption, base.windows)[0].tolist() for caption in captions]
    table = encoder.get_input_embeddings().weight.detach()
    used = sorted({i for windows in ids for row in windows for i in row})
    rows = table[torch.tensor(used, dtype=torch.long, device=table.device)].float().cpu().numpy()
    named = {i: f"{i}:{hashlib.sha256(row.tobytes()).hexdigest()[:16]}" for i, row in zip(used, rows, strict=True)}
    return [" / ".join(" ".join(map(named.__getitem__, row)) for row in windows) for windows in ids]
