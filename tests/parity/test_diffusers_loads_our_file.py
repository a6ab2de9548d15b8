"""`load_lora_weights` of diffusers on our file draws the picture that our own loader draws, also where alpha ≠ rank."""

from pathlib import Path

import pytest
import torch

import visionlora as vl
from visionlora.formats import native
from visionlora.loaders import apply, load_adapter
from visionlora.lora.adapter import Adapter
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.base import open_base


def picture(pipe) -> torch.Tensor:
    return torch.from_numpy(
        pipe("dog", num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
             height=32, width=32, output_type="np").images
    )  # fmt: skip


def random_adapter(model: Path, mixed: bool, method: str = "lora") -> Adapter:
    base = open_base(str(model))
    modules = {}
    for targets, rank, alpha in (("attn", 4, 3.0), ("mlp", 2, 10.0)) if mixed else (("attn,mlp,conv", 4, 9.0),):
        handle = inject(
            base.pipe.unet,
            AdapterConfig(method=method, rank=rank, alpha=alpha, targets=targets),
            name=targets.replace(",", "_"),
        )
        for lora in handle.methods.values():
            lora.lora_B.data.normal_(std=0.2)
            if method == "dora":
                lora.magnitude.data *= 1.1
        modules |= handle.modules("unet")
        handle.eject()
    return Adapter(modules, {"base": {"id": str(model), "fingerprints": base.fingerprints()}})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mixed", "method"),
    [(False, "lora"), (True, "lora"), (False, "rslora"), (False, "dora")],
    ids=["one alpha", "mixed ranks and alphas", "rsLoRA", "DoRA"],
)
def test_same_picture_in_diffusers(tiny_model: Path, tmp_path: Path, mixed: bool, method: str) -> None:
    from diffusers import StableDiffusionPipeline

    native.write(random_adapter(tiny_model, mixed, method), tmp_path / "adapter.safetensors")
    base = open_base(str(tiny_model))
    plain = picture(base.pipe)
    handles = apply(base, load_adapter(tmp_path))
    ours = picture(base.pipe)
    for handle in handles:
        handle.merge()
    merged = picture(base.pipe)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert (ours - plain).abs().max() > 1e-3, "the adapter must change the picture"
    torch.testing.assert_close(ours, picture(theirs), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours, merged, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_a_loop_of_ones_own_saves_fits_a_pipeline(part: str, tiny_model: Path, tmp_path: Path) -> None:
    """Without a word for the part: it is told from the model."""
    from diffusers import StableDiffusionPipeline

    pipe = open_base(str(tiny_model)).pipe
    plain = picture(pipe)
    handle = inject(getattr(pipe, part), AdapterConfig(rank=2, targets="attn"))
    for lora in handle.methods.values():
        lora.lora_B.data.normal_(std=0.3)
    trained = picture(pipe)
    handle.save(tmp_path / "mine.safetensors")
    handle.eject()
    assert load_adapter(tmp_path / "mine.safetensors").components == [part]
    mix = vl.attach(pipe, {"mine": tmp_path / "mine.safetensors"})
    torch.testing.assert_close(picture(pipe), trained, rtol=1e-3, atol=1e-3)
    mix.detach()
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    torch.testing.assert_close(picture(theirs), trained, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(trained, plain, atol=1e-2)
