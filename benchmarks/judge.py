"""What the benchmarks judge drawn pictures by: which style a classifier sees, and whether the concept is found again.

A picture's concept is found by its nearest real pictures, by the cosine of the features of the embedded `emoji-vit`, which was
trained to find names across styles. Its style is told by a small classifier that is trained here on real pictures: features
made to be alike across styles tell styles no better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from visionlora.assets.build_emoji64 import STYLES, read_split, to_tensor

from visionlora.models.base import open_base
from visionlora.models.heads import as_logits
from visionlora.models.vision import VisionModel, open_backbone


class StyleClassifier(nn.Sequential):
    """A small CNN: (b, 3, 64, 64) in -1..1 -> (b, styles)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for i, o in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, len(STYLES)))


def pictures_of(split: str) -> tuple[Tensor, Tensor]:
    """Real pictures of all styles and their style's position in STYLES."""
    parts = [to_tensor(read_split(style, split)[0]) for style in STYLES]
    return torch.cat(parts), torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])


@torch.no_grad()
def through_vae(x: Tensor) -> Tensor:
    """Real pictures as the VAE codes them."""
    vae = open_base("emoji-64").pipe.vae
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(64)])


def train_classifier(epochs: int = 25) -> tuple[StyleClassifier, dict[str, dict[str, float]]]:
    """Trained on real pictures; returns it and what it sees in real held-out pictures of each style."""
    torch.manual_seed(0)
    model, (x, y) = StyleClassifier(), pictures_of("train")
    soft, weight = through_vae(x), len(y) / torch.bincount(y).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(x) // 64))
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, x[index], soft[index])
            batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(-1), batch)
            dx, dy = torch.randint(-4, 5, (2,)).tolist()
            batch = torch.roll(batch, (dx, dy), (2, 3))
            if torch.rand(()) < 0.3:
                batch = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), "replicate"), 3, 1)
            out = model(batch + 0.05 * torch.randn_like(batch))
            loss = F.cross_entropy(out, y[index], weight=weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    x, y = pictures_of("heldout")
    seen = predict(model, x)
    return model.eval(), {s: shares(seen[y == i]) for i, s in enumerate(STYLES)}


def shares(seen: Tensor) -> dict[str, float]:
    """Share of each style among predictions."""
    return {s: float((seen == i).float().mean()) for i, s in enumerate(STYLES)}


@torch.no_grad()
def predict(model: StyleClassifier, x: Tensor) -> Tensor:
    """Positions in STYLES."""
    return torch.cat([model.eval()(part).argmax(1) for part in x.split(128)])


@cache
def backbone() -> VisionModel:
    """The embedded vision transformer."""
    return open_backbone("emoji-vit")


@torch.no_grad()
def features(pictures: Sequence[Image.Image]) -> np.ndarray[Any, Any]:
    """Unit features of RGB pictures, (n, d)."""
    vit = backbone()
    stored = np.stack([vit.preprocessing.stored(p) for p in pictures])
    found = [
        as_logits(vit.model(vit.preprocessing.batch(part))) for part in np.array_split(stored, -(-len(stored) // 128))
    ]
    unit: np.ndarray[Any, Any] = F.normalize(torch.cat(found), dim=1).numpy()
    return unit


def nearest(
    drawn: np.ndarray[Any, Any], real: np.ndarray[Any, Any], real_captions: list[str], captions: list[str]
) -> np.ndarray[Any, Any]:
    """Whether each of the 5 nearest real pictures has the right caption, (pictures, 5)."""
    order = np.argsort(-drawn @ real.T, axis=1)[:, :5]
    return np.array([[real_captions[j] == c for j in row] for row, c in zip(order, captions, strict=True)])
