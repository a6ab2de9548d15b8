"""Settings of every test: no network, no display, the same Hypothesis examples each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
if (
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1"
):  # the workers share the cores, also those of what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("visionlora", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("visionlora")

MOST_THREADS = 4
MOST_WORKERS = 4
"""Processes that share the tests; each takes about a gigabyte."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` starts."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--regenerate-golden"))


def pytest_collection_finish() -> None:
    """Small models are slower on many threads; torch is left alone unless a test module imported it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(min(MOST_THREADS, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("VISIONLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


def save_tiny_model(folder: Path, family: str) -> Path:
    """A diffusers folder with the parts of a family of Stable Diffusion, small and random: 32 px pictures, 8x8 latents.

    Args:
        folder: an empty one.
        family: sd1; sd2 (predicts the velocity, linear projections); or sdxl (two text encoders, told sizes).
    """
    import json
    import warnings

    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import (
            AutoencoderKL,
            DDIMScheduler,
            EulerDiscreteScheduler,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )

        letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
        words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")

        def tokenizer() -> CLIPTokenizer:
            return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)

        def text(width: int) -> CLIPTextConfig:
            return CLIPTextConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
            )  # fmt: skip

        torch.manual_seed(0)
        added = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (2, 1),
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        } if family == "sdxl" else {}  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=40 if family == "sdxl" else 16, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            use_linear_projection=family != "sd1", **added,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=32, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        if family == "sdxl":
            pipe = StableDiffusionXLPipeline(
                vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(**noise), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
                text_encoder=CLIPTextModel(text(16)), text_encoder_2=CLIPTextModelWithProjection(text(24)),
                add_watermarker=False,
            )  # fmt: skip
        else:
            kind = "v_prediction" if family == "sd2" else "epsilon"
            schedule = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, prediction_type=kind, **noise)
            pipe = StableDiffusionPipeline(
                vae=vae, text_encoder=CLIPTextModel(text(16)), tokenizer=tokenizer(), unet=unet, scheduler=schedule,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x, small and random."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x, small and random."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny2"), "sd2")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL, small and random."""
    return save_tiny_model(tmp_path_factory.mktemp("tinyxl"), "sdxl")


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    """A folder `dog` with three small pictures and no captions."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "dog"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm folder with a small random vision transformer for 32 px pictures: two blocks, 24 wide."""
    import json

    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("vit")
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    for p in model.parameters():  # timm's small random weights hardly move with the picture
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
    save_file(model.state_dict(), folder / "model.safetensors")
    preprocessing = {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
        "classifier": "head", "num_classes": 7, "first_conv": "patch_embed.proj",
    }  # fmt: skip
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": preprocessing}))
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders `circle`, `cross` and `square` with twenty pictures of 32 px each, in any place and colour."""
    import numpy as np
    from PIL import Image, ImageDraw

    root, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for name in ("circle", "cross", "square"):
        (root / name).mkdir()
        for i in range(20):
            ground, ink = (tuple(int(v) for v in random.integers(low, low + 90, 3)) for low in (160, 0))
            picture = Image.new("RGB", (32, 32), ground)
            x, y, r = (*random.integers(10, 22, 2), random.integers(5, 10))
            draw, box = ImageDraw.Draw(picture), [int(v) for v in (x - r, y - r, x + r, y + r)]
            if name == "circle":
                draw.ellipse(box, fill=ink)
            elif name == "square":
                draw.rectangle(box, fill=ink)
            else:
                draw.line(box, fill=ink, width=3)
                draw.line([box[0], box[3], box[2], box[1]], fill=ink, width=3)
            picture.save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def cli(tmp_path: Path):
    """Runs the real command in its own process and gives its exit code, standard output and standard error."""
    import subprocess

    def run(*arguments: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "visionlora", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )
        return done.returncode, done.stdout, done.stderr

    return run
