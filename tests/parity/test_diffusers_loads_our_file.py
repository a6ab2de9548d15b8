"""`load_lora_weights` of diffusers on our file draws the picture that our own loader draws, also where alpha ≠ rank."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import visionlora as vl
from visionlora.formats import native
from visionlora.loaders import apply, load_adapter
from visionlora.lora.adapter import Adapter, AdapterModule
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [(2, 3, 4), (4, 3, 2), (2, 3, 3)], ids=str)
def test_a_kohya_file_with_the_projection_of_the_second_text_encoder(
    tiny_xl: Path, tmp_path: Path, ranks: tuple[int, int, int]
) -> None:
    """diffusers does not look at its rank, and takes the most common of the other layers."""
    from diffusers import StableDiffusionXLPipeline

    generator = torch.Generator().manual_seed(0)
    layer = "text_encoder_2.text_model.encoder.layers.0."
    widths = {layer + f"self_attn.{p}_proj": (24, ranks[0]) for p in ("q", "k", "v", "out")}
    widths |= {layer + "mlp.fc1": (32, ranks[1]), "text_encoder_2.text_projection": (24, ranks[2])}
    adapter = Adapter(
        {
            name: AdapterModule.lora(
                torch.randn(r, 24, generator=generator), torch.randn(o, r, generator=generator), r / 3
            )
            for name, (o, r) in widths.items()
        }
    )
    vl.save_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    found = load_adapter(tmp_path / "a.safetensors")
    for name, m in adapter.modules.items():
        torch.testing.assert_close(found.modules[name].delta_weight(), m.delta_weight(), rtol=1e-6, atol=1e-6)
    ours, theirs = (StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False) for _ in range(2))
    ids = torch.tensor([[0, 3, 4, 5, *[1] * 12]])
    with torch.no_grad():
        plain = ours.text_encoder_2(ids).text_embeds
        vl.attach(ours, adapter)
        expected = ours.text_encoder_2(ids).text_embeds
        theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
        torch.testing.assert_close(theirs.text_encoder_2(ids).text_embeds, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["kohya", "diffusers", "diffusers-folded"])
@pytest.mark.parametrize("layers", [("q_proj", "v_proj"), ("k_proj", "fc1"), ("fc1",), ("fc2",), ("out_proj", "fc2")])
def test_a_text_encoder_adapted_in_a_few_layers(
    layers: tuple[str, ...], format: str, tiny_model: Path, tmp_path: Path
) -> None:
    """diffusers tells the spelling of such a part by single layers, and passes by or refuses the others without them."""
    from diffusers import StableDiffusionPipeline

    ours, theirs = (StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None) for _ in range(2))
    handle = inject(ours.text_encoder, AdapterConfig(rank=2, alpha=3.0, targets=layers))
    for lora in handle.methods.values():
        lora.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    vl.save_adapter(handle.adapter(), tmp_path / "a.safetensors", format)
    lacking = [("q_proj", "v_proj"), ("k_proj", "fc1")] if format == "kohya" else [("fc1",), ("fc2",)]
    zero = [n for n, t in load_file(tmp_path / "a.safetensors").items() if t.dim() > 1 and not t.any()]
    assert len(zero) == 2 * int(layers in lacking) and all("out_proj" in n for n in zero)
    assert len(load_adapter(tmp_path / "a.safetensors").modules) == len(handle.methods), "we read it without them"
    ids = torch.tensor([[0, 3, 4, 5, *[1] * 12]])
    with torch.no_grad():
        expected = ours.text_encoder(ids)[0]
        theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
        torch.testing.assert_close(theirs.text_encoder(ids)[0], expected, rtol=1e-4, atol=1e-4)
        handle.set_scale(0)
        assert (expected - ours.text_encoder(ids)[0]).abs().max() > 1e-2
