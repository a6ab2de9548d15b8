"""The peer of `benchmarks/train_sd.py`: a LoRA trained with diffusers, PEFT and accelerate alone.

    python benchmarks/diffusers_lora.py --model FOLDER --images FOLDER --output FOLDER --steps 40 --resolution 256

The loop that the documentation of diffusers describes for its example `train_text_to_image_lora`, written anew on their
public interfaces: pictures are decoded, and pictures and captions encoded, in every step; the frozen parts are kept in
the precision of the run; rank-8 factors on q, k, v and out of every attention; AdamW; gradients clipped to 1. Left out is
all that the comparison does not need: sample pictures, logging, checkpoints, resuming, the Hub.

In bf16 the factors are kept in fp32, as the example does in fp16 and as visionlora does; the example itself leaves them in
bf16 there, where small updates are rounded away.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that `save_lora_weights` leaves in its folder."""


class Captioned(Dataset[tuple[Tensor, Tensor]]):
    """Pictures of a folder with a metadata.jsonl: ((3, h, w) in -1..1, token ids)."""

    def __init__(self, folder: Path, size: int, tokenizer: Any) -> None:
        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        self.ids = tokenizer(
            [row["text"] for row in self.rows], padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt",
        ).input_ids  # fmt: skip
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.folder / self.rows[i]["file_name"]) as picture:
            return self.transform(picture.convert("RGB")), self.ids[i]


def endless(loader: Any) -> Iterator[Any]:
    """One pass over the data after the other."""
    while True:
        yield from loader


def main() -> None:
    """Trains and saves."""
    args = arguments()
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(args.precision, args.precision))
    set_seed(args.seed)

    # Frozen parts in the precision of the run, the adapter in fp32
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet")
    for part in (text_encoder, vae, unet):
        part.requires_grad_(False).to(accelerator.device, dtype=dtype)
    unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=ATTENTION)
    )
    cast_training_params(unet, dtype=torch.float32)
    trained = [p for p in unet.parameters() if p.requires_grad]

    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=1e-2)
    rates = get_scheduler(args.schedule, optimizer, num_warmup_steps=0, num_training_steps=args.steps)
    data = Captioned(args.images, args.resolution, tokenizer)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)

    unet.train()
    batches = endless(loader)
    for _ in range(args.steps):
        pictures, ids = next(batches)
        with torch.no_grad():
            latents = vae.encode(pictures.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
            text = text_encoder(ids, return_dict=False)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, text, return_dict=False)[0]
        accelerator.backward(F.mse_loss(predicted.float(), target.float()))
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()

    factors = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
    StableDiffusionPipeline.save_lora_weights(args.output, unet_lora_layers=factors)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of diffusers")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures with a metadata.jsonl")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("--resolution", required=True, type=int, help="px")
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--rank", default=8, type=int)
    parser.add_argument("--learning-rate", default=1e-4, type=float)
    parser.add_argument("--schedule", default="constant", choices=("constant", "cosine"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
