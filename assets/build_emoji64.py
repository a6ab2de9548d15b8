"""Trains the embedded base model ``assets/emoji-64`` from scratch: a small, real Stable Diffusion.

    python -m visionlora.assets.build_pictures --all all.npz
    python -m visionlora.assets.build_emoji64 vae  --pictures all.npz --work build/
    python -m visionlora.assets.build_emoji64 unet --work build/
    python -m visionlora.assets.build_emoji64 refine --work build/

Every step draws its batch and noise from (seed, step) alone and the state is saved every few minutes: a build that
was killed goes on where it stopped and ends in the same weights. Two CPU cores need about two hours and a half in all.
Letters in shapes: b batch, c latent channels (24), h and w latent height and width (8).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 0
STYLES = ("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast", "fxemoji")
HERE = Path(__file__).parent


def to_tensor(pictures: np.ndarray[Any, Any]) -> Tensor:
    """uint8 (b, 64, 64, 3) -> float (b, 3, 64, 64) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_split(style: str, split: str) -> tuple[np.ndarray[Any, Any], list[str]]:
    """The pictures (n, 64, 64, 3) uint8 and captions of one committed imagefolder."""
    from PIL import Image

    folder = HERE / "styles" / style / split
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(folder / r["file_name"])) for r in rows]), [r["text"] for r in rows]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Atomic: a build killed while saving keeps the state before."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


# ---------------------------------------------------------------------------------------------------------------- VAE


def new_vae() -> Any:
    """f=8: 64 px -> 8x8 latents of 24 channels. Few channels where pixels are many: the CPU time is spent there."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=24,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the pictures and permutes the colour channels of a third: more shapes and colours to code."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    orders = torch.stack([torch.randperm(3, generator=generator) for _ in range(len(x))])
    keep = torch.rand(len(x), generator=generator) > 0.33
    orders[keep] = torch.arange(3)
    return x.gather(1, orders[:, :, None, None].expand_as(x))


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours along width and height."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Root mean square per picture (what PSNR measures, so that busy pictures do not drown the calm ones) and edges."""
    rms = (y - x).square().mean((1, 2, 3)).add(1e-6).sqrt().mean()
    return rms + 0.5 * sum((F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True)), start=torch.zeros(()))


@torch.no_grad()
def psnr(vae: Any, pictures: np.ndarray[Any, Any]) -> float:
    """Mean PSNR in dB over uint8 pictures, coded by the mean of the latent and rounded to 8 bits as a PNG would be."""
    values = []
    for i in range(0, len(pictures), 32):
        x = to_tensor(pictures[i : i + 32])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = (((y - x) * 127.5).round() / 255).square().mean((1, 2, 3)).clamp(min=1e-10)
        values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())


def train_vae(pictures_file: Path, work: Path, steps: int, batch: int = 8, peak: float = 1.5e-3) -> None:
    """Writes ``work/vae``; every picture of the four sets except those of held-out concepts is seen."""
    torch.manual_seed(SEED)
    vae, pictures = new_vae(), np.unique(np.load(pictures_file)["pictures"], axis=0)
    held_out = {style: read_split(style, "heldout")[0] for style in STYLES}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, weight_decay=0.0, betas=(0.9, 0.99))
    state_file, first = work / "vae.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"]), optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start = time.monotonic()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        x = augment(to_tensor(pictures[torch.randint(len(pictures), (batch,), generator=generator).numpy()]), generator)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(x).latent_dist
            z = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=generator)
            y = vae.decode(z).sample
        loss = reconstruction_loss(y.float(), x) + 1e-6 * latent.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            rate = (time.monotonic() - start) / (step + 1 - first)
            print(f"vae {step + 1}/{steps} loss {loss.item():.4f} {rate:.3f} s/step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(state_file, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            sample = 64 if step + 1 < steps else 1000
            print("held-out PSNR", {s: round(psnr(vae, p[:sample]), 2) for s, p in held_out.items()}, flush=True)
    vae.eval()
    with torch.no_grad():
        x = to_tensor(read_split("noto", "train")[0])
        z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    vae.save_pretrained(work / "vae")


# --------------------------------------------------------------------------------------------------------- text + UNet

TEMPLATES = ("{}", "{}", "{}", "a {}", "a picture of a {}", "an icon of a {}", "{} emoji")
"""How a caption may be worded while training: prompts of users are rarely just the name."""
MAX_TOKENS = 24
EMA_EVERY = 10
"""Steps between updates of the averaged weights: each update reads them all, which a small model feels."""
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def train_tokenizer(captions: list[str], folder: Path) -> Any:
    """A byte-pair tokenizer in CLIP's format, learned on the captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([t.format(c) for c in captions for t in TEMPLATES], trainer)
    model = json.loads(bpe.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: Any) -> Any:
    """A CLIP text model of under one million parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(latent_channels: int) -> Any:
    """8x8, 4x4 and 2x2 positions with 64, 128 and 192 channels, cross-attention in every block."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )


def base_set() -> tuple[np.ndarray[Any, Any], list[str]]:
    """Every picture and caption of the base style, both splits: held-out concepts are held out of styles, not of it."""
    parts = [read_split("noto", split) for split in ("train", "heldout")]
    return np.concatenate([p for p, _ in parts]), [c for _, captions in parts for c in captions]


@dataclass(frozen=True)
class Batch:
    """What one step sees. Letters: b pictures."""

    clean: Tensor
    """(b, c, h, w), scaled latents."""
    noise: Tensor
    """(b, c, h, w), standard normal."""
    timesteps: Tensor
    """(b,)."""
    tokens: Tensor
    """(b, tokens)."""


@dataclass(frozen=True)
class Pace:
    """How fast a stage learns."""

    steps: int
    peak: float
    """Learning rate after the warm-up; a cosine takes it to zero."""
    warmup: int
    ema_limit: float
    """Largest share that the averaged weights keep at an update."""


def fit(unet: Any, text_encoder: Any, batch_at: Callable[[int], Batch], pace: Pace, state_file: Path) -> None:
    """Trains both parts together, resumable from `state_file`, and leaves the averaged weights in them."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(clip_sample=False, prediction_type="v_prediction", **NOISE)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    ema = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=pace.peak, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for p, saved, e, saved_ema in zip(trained, state["weights"], ema, state["ema"], strict=True):
            p.data.copy_(saved), e.copy_(saved_ema)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start, recent = time.monotonic(), 0.0
    for step in range(first, pace.steps):
        b = batch_at(step)
        for group in optimizer.param_groups:
            falling = 0.5 + 0.5 * math.cos(math.pi * step / pace.steps)
            group["lr"] = pace.peak * min(1.0, (step + 1) / pace.warmup) * falling
        noisy = schedule.add_noise(b.clean, b.noise, b.timesteps)
        predicted = unet(noisy, b.timesteps, text_encoder(b.tokens)[0]).sample
        loss = F.mse_loss(predicted, schedule.get_velocity(b.clean, b.noise, b.timesteps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EMA_EVERY == 0:
            kept = min(pace.ema_limit, (1 + step) / (100 + step))
            with torch.no_grad():
                torch._foreach_lerp_(ema, [p.detach() for p in trained], 1 - kept)
        recent += loss.item()
        if (step + 1) % 100 == 0:
            rate = (time.monotonic() - start) / (step + 1 - first)
            print(f"{state_file.stem} {step + 1}/{pace.steps} loss {recent / 100:.4f} {rate:.3f} s/step", flush=True)
            recent = 0.0
        if (step + 1) % 500 == 0 or step + 1 == pace.steps:
            weights = [p.detach() for p in trained]
            state = {"weights": weights, "ema": ema, "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state(state_file, state)
    with torch.no_grad():
        for p, e in zip(trained, ema, strict=True):
            p.copy_(e)


def tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """(texts, MAX_TOKENS)."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def latents_of(vae: Any, x: Tensor) -> Tensor:
    """(b, c, h, w), scaled."""
    with torch.no_grad():
        coded = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    scaled: Tensor = coded * vae.config.scaling_factor
    return scaled


def train_unet(work: Path, output: Path, steps: int, size: int = 32) -> None:
    """Writes the whole pipeline to `output` in fp16, from `work/vae`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    pictures, captions = base_set()
    tokenizer = train_tokenizer(captions, work / "tokenizer")
    text_encoder, vae = new_text_encoder(tokenizer), AutoencoderKL.from_pretrained(work / "vae").eval()
    unet = new_unet(vae.config.latent_channels)
    z = latents_of(vae, to_tensor(pictures))
    ids = torch.stack([tokens(tokenizer, [t.format(c) for c in captions]) for t in TEMPLATES])
    null = tokens(tokenizer, [""])

    def batch_at(step: int) -> Batch:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        epoch, offset = divmod(step * size, len(z) // size * size)
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(SEED + epoch))
        i = order[offset : offset + size]
        c = ids[torch.randint(len(TEMPLATES), (size,), generator=generator), i]
        c = torch.where(torch.rand(size, 1, generator=generator) < 0.1, null, c)
        noise = torch.randn(z[i].shape, generator=generator)
        # Denser where a picture takes shape, at high noise, than where only its grain is left to guess.
        t = ((1 - torch.rand(size, generator=generator) ** 1.5) * 1000).long().clamp(0, 999)
        return Batch(z[i], noise, t, c)

    fit(unet, text_encoder, batch_at, Pace(steps, 1.2e-3, 300, 0.99), work / "unet.pt")
    save_pipeline(vae, text_encoder, tokenizer, unet, output)


# ------------------------------------------------------------------------------------------------------------- refine

INK, PALE = 0.72, 0.9
"""Luminance below which a pixel is ink in `black and white`, and above which it is paper in every variant."""


def luminance(x: Tensor) -> Tensor:
    """(b, 3, h, w) in -1..1 -> (b, 1, h, w) in 0..1."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return ((x + 1) / 2 * weights).sum(1, keepdim=True)


def in_black_and_white(x: Tensor) -> Tensor:
    """Ink where the picture is dark, paper elsewhere."""
    return torch.where(luminance(x) < INK, -1.0, 1.0).expand_as(x)


def in_flat_colors(x: Tensor) -> Tensor:
    """Neighbouring shades become one: smoothed, then four levels a channel."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    return ((soft + 1) * 1.5).round() / 1.5 - 1


def as_an_outline(x: Tensor) -> Tensor:
    """Dark lines where neighbours differ, paper elsewhere."""
    grey = luminance(x)
    dx, dy = (F.pad(e.abs(), p) for e, p in zip(edges(grey), ((0, 1), (0, 0, 0, 1)), strict=True))
    return (1 - 2 * ((dx + dy) * 4).clamp(0, 1)).expand_as(x)


VARIANTS: dict[str, Any] = {
    "": lambda x: x,
    " in gray": lambda x: (luminance(x) * 2 - 1).expand_as(x),
    " in black and white": in_black_and_white,
    " in flat colors": in_flat_colors,
    " in other colors": lambda x: x[:, [2, 0, 1]],
    " as an outline": as_an_outline,
}
"""Ways to draw the base pictures, by the words that ask for them. Learning that a concept can be drawn in several ways
keeps what it is apart from how it looks, which is what a style adapter builds on."""
PLAIN_SHARE = 0.6
"""Share of pictures seen as they are."""


def refine(work: Path, output: Path, steps: int, size: int = 32) -> None:
    """Goes on from the pipeline in `output` with the base pictures drawn in several ways, at a falling rate."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(SEED)
    pipe = StableDiffusionPipeline.from_pretrained(output, safety_checker=None, requires_safety_checker=False)
    pipe.to(torch.float32)
    unet, text_encoder, vae, tokenizer = pipe.unet.train(), pipe.text_encoder.train(), pipe.vae, pipe.tokenizer
    pictures, captions = base_set()
    z = torch.stack([latents_of(vae, change(to_tensor(pictures))) for change in VARIANTS.values()])
    ids = torch.stack(
        [
            torch.stack([tokens(tokenizer, [t.format(c) + words for c in captions]) for t in TEMPLATES])
            for words in VARIANTS
        ]
    )
    null = tokens(tokenizer, [""])

    def batch_at(step: int) -> Batch:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + 500_000 + step)
        i = torch.randint(len(captions), (size,), generator=generator)
        v = torch.randint(1, len(VARIANTS), (size,), generator=generator)
        v = torch.where(torch.rand(size, generator=generator) < PLAIN_SHARE, 0, v)
        c = ids[v, torch.randint(len(TEMPLATES), (size,), generator=generator), i]
        c = torch.where(torch.rand(size, 1, generator=generator) < 0.1, null, c)
        noise = torch.randn(z[0, i].shape, generator=generator)
        return Batch(z[v, i], noise, torch.randint(1000, (size,), generator=generator), c)

    fit(unet, text_encoder, batch_at, Pace(steps, 6e-4, 200, 0.98), work / "refine.pt")
    save_pipeline(vae, text_encoder, tokenizer, unet, output)


def save_pipeline(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, output: Path) -> None:
    """Diffusers' folder layout, fp16 safetensors."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction", **NOISE
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(output)
    for part in ("unet", "vae", "text_encoder"):  # where the parts were built says nothing to others
        file = output / part / "config.json"
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def export(work: Path, output: Path) -> None:
    """Writes the pipeline from the state of an unfinished build, to look at."""
    from diffusers import AutoencoderKL

    _, captions = base_set()
    tokenizer = train_tokenizer(captions, work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    unet, text_encoder = new_unet(vae.config.latent_channels), new_text_encoder(tokenizer)
    state = torch.load(work / "unet.pt", weights_only=True)
    with torch.no_grad():
        for p, e in zip([*unet.parameters(), *text_encoder.parameters()], state["ema"], strict=True):
            p.copy_(e)
    print(f"state of step {state['step']}")
    save_pipeline(vae, text_encoder, tokenizer, unet, output)


def main() -> None:
    """One stage of the build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "unet", "refine", "export"))
    parser.add_argument("--pictures", type=Path, help="the .npz of build_pictures --all (stage vae)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--output", type=Path, default=HERE / "emoji-64", help="the pipeline folder (unet, export)")
    parser.add_argument("--vae-steps", type=int, default=7500)
    parser.add_argument("--unet-steps", type=int, default=9500)
    parser.add_argument("--refine-steps", type=int, default=6000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        if args.pictures is None:
            parser.error("stage vae needs --pictures")
        train_vae(args.pictures, args.work, args.vae_steps)
    elif args.stage == "unet":
        train_unet(args.work, args.output, args.unet_steps)
    elif args.stage == "refine":
        refine(args.work, args.output, args.refine_steps)
    else:
        export(args.work, args.output)


if __name__ == "__main__":
    main()
