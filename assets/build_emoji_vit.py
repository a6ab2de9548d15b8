"""Trains the embedded vision transformer ``assets/emoji-vit`` from scratch: a small, real timm ViT for 64 px pictures.

    python -m visionlora.assets.build_pictures --all build/pictures.npz
    python -m visionlora.assets.build_emoji_vit train --pictures build/pictures.npz --work build/
    python -m visionlora.assets.build_emoji_vit measure

The task is to find, among the pictures of a batch, the other one of the same emoji, drawn in another of four styles where
there is one, and turned, cut, recoloured or covered in another way (the contrastive loss of SimCLR, arXiv 2002.05709, with
positives by name as in SupCon, arXiv 2004.11362). Held-out concepts are never seen, in no style. Every step draws its batch
from (seed, step) alone and the state is saved every few minutes: a build that was killed goes on where it stopped and ends
in the same weights.
Letters in shapes: b batch, d width of the features (192).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from visionlora.assets.build_emoji64 import EMA_EVERY, SEED, STYLES, read_split, save_state, to_tensor
from visionlora.assets.build_pictures import is_held_out

HERE = Path(__file__).parent
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 64, "patch_size": 8, "depth": 6, "global_pool": "avg", "class_token": False}
TEMPERATURE = 0.1
"""Of the cosines between the pictures of a batch."""
PROJECTION = 128
"""Width in which they are compared; the layers that project to it are not kept."""
THUMBNAIL = 12
"""Side, px, of the upright, clean thumbnail that a linear layer draws from the features: what a small transformer learns
from first."""
THUMBNAIL_WEIGHT, PATCH_WEIGHT = 1.0, 1.0
PATCH = 8
"""Side of a patch, px. Every patch also draws itself as it was before it was recoloured and covered."""


def new_vit() -> Any:
    """ViT-Tiny's width with patches of 8 px and 6 blocks, the mean of the patches as its feature: 2.7M parameters."""
    import timm

    return timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, drop_path_rate=0.05, **MODEL_ARGS)


# ------------------------------------------------------------------------------------------------------- augmentation


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of its generator alone."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture scaled, stretched, rotated, sheared, moved and perhaps mirrored; white comes in from outside."""
    b = len(x)
    angle = uniform(-0.3, 0.3, (b,), generator)
    zoom = torch.exp(uniform(math.log(0.75), math.log(1.35), (b,), generator))
    stretch = torch.exp(uniform(-0.15, 0.15, (b,), generator))
    shear = uniform(-0.15, 0.15, (b,), generator)
    flip = 1 - 2 * (torch.rand(b, generator=generator) < 0.5).float()
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([flip * cos * zoom * stretch, (shear - sin) * zoom, uniform(-0.2, 0.2, (b,), generator)], 1),
        torch.stack([flip * sin * zoom * stretch, cos * zoom, uniform(-0.2, 0.2, (b,), generator)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1  # zero outside is white


def recoloured(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and brightness; for some pictures also other colours, gray, negative, or a coloured ground."""
    b = len(x)

    def chance(share: float) -> Tensor:
        return torch.rand(b, 1, 1, 1, generator=generator) < share

    orders = torch.stack([torch.randperm(3, generator=generator) for _ in range(b)])
    mixed = x.gather(1, orders[:, :, None, None].expand_as(x))
    x = torch.where(chance(0.2), mixed, x)
    x = torch.where(chance(0.25), x.mean(1, keepdim=True).expand_as(x), x)
    x = torch.where(chance(0.1), -x, x)
    ground = uniform(-1, 1, (b, 3, 1, 1), generator)
    light = ((x + 1) / 2).clamp(0, 1).min(1, keepdim=True).values
    x = torch.where(chance(0.15), x * (1 - light) + ground * light, x)
    return x * uniform(0.7, 1.2, (b, 1, 1, 1), generator) + uniform(-0.2, 0.2, (b, 1, 1, 1), generator)


def covered(x: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the pictures lose a rectangle; a quarter are seen at half the resolution; a little noise on all."""
    b, _, height, width = x.shape
    noise = torch.randn(x.shape, generator=generator) * uniform(0, 0.1, (b, 1, 1, 1), generator)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    x = torch.where(torch.rand(b, 1, 1, 1, generator=generator) < 0.25, coarse, x) + noise
    top, left = uniform(0, 1, (b, 1, 1, 1), generator), uniform(0, 1, (b, 1, 1, 1), generator)
    tall, wide = uniform(0.1, 0.4, (b, 1, 1, 1), generator), uniform(0.1, 0.4, (b, 1, 1, 1), generator)
    rows = (torch.arange(height) / height).view(1, 1, -1, 1)
    columns = (torch.arange(width) / width).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    some = torch.rand(b, 1, 1, 1, generator=generator) < 0.33
    return torch.where(inside & some, uniform(-1, 1, (b, 3, 1, 1), generator), x)


def augment(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(b, 3, 64, 64) in -1..1 -> what the model sees, and the same view before it was recoloured and covered."""
    view = turned(x, generator)
    return covered(recoloured(view, generator), generator).clamp(-1.5, 1.5), view


def patches(x: Tensor) -> Tensor:
    """(b, 3, 64, 64) -> (b, 64, 192): the pixels of each patch, in the order of the model's tokens."""
    return F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------- training


class Pairs:
    """Draws names and two pictures of each, of different styles where there are any."""

    def __init__(self, names: np.ndarray[Any, Any]) -> None:
        order = np.argsort(names, kind="stable")
        self.groups = [g.tolist() for g in np.split(order, np.unique(names[order], return_index=True)[1][1:])]
        # A name drawn in several styles teaches more than one drawn in a single style.
        self.weights = torch.tensor([1.0 if len(g) > 1 else 0.3 for g in self.groups])

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Indices of the first and of the second pictures."""
        first, second = [], []
        for name in torch.multinomial(self.weights, count, generator=generator).tolist():
            group = self.groups[name]
            order = torch.randperm(len(group), generator=generator).tolist()
            first.append(group[order[0]])
            second.append(group[order[1 % len(group)]])
        return first, second


def contrastive(features: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the share of pictures whose nearest of the batch is its partner; rows k and k + b/2 are partners."""
    b = len(features)
    unit = F.normalize(features.float())
    cosines = unit @ unit.t() / TEMPERATURE
    cosines = cosines.masked_fill(torch.eye(b, dtype=torch.bool), float("-inf"))
    partners = torch.arange(b).roll(b // 2)
    return F.cross_entropy(cosines, partners), (cosines.argmax(1) == partners).float().mean()


def train(pictures_file: Path, work: Path, output: Path, steps: int, pairs: int = 64, peak: float = 1e-3) -> None:
    """Writes the model folder; its weights are the average over the last part of the training."""
    torch.manual_seed(SEED)
    data = np.load(pictures_file)
    chosen = np.array([not is_held_out(n) for n in data["names"]])
    pictures, names = data["pictures"][chosen], Pairs(data["names"][chosen])
    vit = new_vit()
    width = vit.num_features
    heads = nn.ModuleDict(
        {
            "project": nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, PROJECTION)),
            "draw": nn.Linear(width, 3 * THUMBNAIL**2),
            "restore": nn.Linear(width, 3 * PATCH**2),
        }
    )
    trained = [*vit.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=peak,
        betas=(0.9, 0.98),
    )
    ema, state_file, first = [p.detach().clone() for p in vit.parameters()], work / "emoji-vit.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vit.load_state_dict(state["vit"]), heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
    start, right = time.monotonic(), 0.0
    for step in range(first, steps):
        torch.manual_seed(SEED * 1_000_003 + step)  # of drop path
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        one, two = names.draw(pairs, generator)
        clean = to_tensor(pictures[one + two])
        x, view = augment(clean, generator)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 300) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit.train().forward_features(x)
            features = vit.forward_head(tokens)
            projected, drawn, restored = heads["project"](features), heads["draw"](features), heads["restore"](tokens)
        loss, found = contrastive(projected)
        loss = loss + THUMBNAIL_WEIGHT * F.mse_loss(drawn.float(), F.adaptive_avg_pool2d(clean, THUMBNAIL).flatten(1))
        loss = loss + PATCH_WEIGHT * F.mse_loss(restored.float(), patches(view))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EMA_EVERY == 0:
            keep = min(0.998, (step + 1) / (step + 100)) ** EMA_EVERY
            torch._foreach_lerp_(ema, [p.detach() for p in vit.parameters()], 1 - keep)
        right += float(found)
        if (step + 1) % 100 == 0:
            rate = (time.monotonic() - start) / (step + 1 - first)
            print(
                f"vit {step + 1}/{steps} loss {loss.item():.3f} found {right / 100:.3f} {rate:.3f} s/step", flush=True
            )
            right = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"vit": vit.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(state_file, {**state, "ema": ema, "step": step + 1})
    with torch.no_grad():
        for p, e in zip(vit.parameters(), ema, strict=True):
            p.copy_(e)
    save(vit, output)


def save(vit: Any, output: Path) -> None:
    """timm's folder: ``timm.create_model("local-dir:assets/emoji-vit")`` opens it. fp16."""
    from safetensors.torch import save as save_tensors

    output.mkdir(parents=True, exist_ok=True)
    weights = save_tensors({n: p.detach().half().contiguous() for n, p in vit.state_dict().items()}, {"format": "pt"})
    (output / "model.safetensors").write_bytes(weights)
    preprocessing = {
        "input_size": [3, 64, 64],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": vit.num_features,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": preprocessing,
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def features_of(vit: Any, pictures: np.ndarray[Any, Any]) -> Tensor:
    """Unit features (b, d) of uint8 pictures (b, 64, 64, 3)."""
    return torch.cat([F.normalize(vit.eval()(part)) for part in to_tensor(pictures).split(128)])


def retrieval(vit: Any, style: str) -> float:
    """Share of held-out pictures of `style` whose nearest base picture, of all held-out ones, has the same name."""
    base, captions = read_split("noto", "heldout")
    pictures, own = read_split(style, "heldout")
    nearest = (features_of(vit, pictures) @ features_of(vit, base).t()).argmax(1)
    return float(np.mean([captions[i] == name for i, name in zip(nearest.tolist(), own, strict=True)]))


def measure(folder: Path) -> dict[str, float]:
    """What the README says of the model: all on concepts it never saw."""
    import timm

    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.manual_seed(SEED)
    found = {}
    for style in STYLES[1:]:
        found[style] = retrieval(vit, style)
        found[style + ", random weights"] = retrieval(new_vit(), style)
    return found


def size_of(folder: Path) -> int:
    """Number of parameters."""
    import timm

    return sum(p.numel() for p in timm.create_model(f"local-dir:{folder}", pretrained=True).parameters())


def main() -> None:
    """One stage of the build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "measure"))
    parser.add_argument("--pictures", type=Path, help="the .npz of build_pictures --all (train)")
    parser.add_argument("--work", type=Path, default=Path("build"), help="folder for the resumable state")
    parser.add_argument("--output", type=Path, default=HERE / "emoji-vit", help="the model folder")
    parser.add_argument("--steps", type=int, default=8500)
    args = parser.parse_args()
    if args.stage == "train":
        if args.pictures is None:
            parser.error("stage train needs --pictures")
        args.work.mkdir(parents=True, exist_ok=True)
        train(args.pictures, args.work, args.output, args.steps)
    for name, share in measure(args.output).items():
        print(f"{name}: {share:.3f}")


if __name__ == "__main__":
    main()
