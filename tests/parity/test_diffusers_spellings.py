"""Files that diffusers writes, in every spelling it ever had, load here with the same ΔW; ours load there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visionlora as vl
from visionlora.formats.names import locate
from visionlora.loaders import apply, load_adapter, save_adapter
from visionlora.lora.adapter import Adapter, AdapterModule, in_one_spelling
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trained(tiny_model: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A UNet with a PEFT adapter of mixed ranks and alphas, and its ΔW by layer."""
    import peft

    unet = open_base(str(tiny_model)).pipe.unet
    unet.add_adapter(peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"],
        rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3, "proj_in": 8},
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, p in unet.named_parameters():
        if "lora" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    deltas = {
        n: m.get_delta_weight("default").detach() for n, m in unet.named_modules() if hasattr(m, "get_delta_weight")
    }
    return unet, deltas


def check_deltas(adapter: Adapter, deltas: dict[str, torch.Tensor]) -> None:
    found = adapter.delta_weights()
    assert found.keys() == {f"unet.{n}" for n in deltas}
    for name, delta in deltas.items():
        torch.testing.assert_close(found[f"unet.{name}"], delta.view_as(found[f"unet.{name}"]), rtol=1e-5, atol=1e-6)


def test_save_lora_adapter(trained, tmp_path: Path) -> None:
    """No prefix, the config in the header."""
    unet, deltas = trained
    unet.save_lora_adapter(tmp_path)
    check_deltas(load_adapter(tmp_path), deltas)


def test_save_lora_weights_with_its_metadata(trained, tmp_path: Path) -> None:
    """`unet.` before everything, the config under `unet.` keys."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet, deltas = trained
    layers = get_peft_model_state_dict(unet)
    metadata = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path / "a", unet_lora_layers=layers, **metadata)
    assert any(k.startswith("unet.") for k in load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors"))
    check_deltas(load_adapter(tmp_path / "a"), deltas)
    # What the training scripts do: `.lora.down.weight` for attention, the rest as it is, no metadata, so no scale.
    scripts = convert_state_dict_to_diffusers(layers)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "b", unet_lora_layers=scripts)
    keys = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    assert any(k.endswith(".lora.down.weight") for k in keys) and any(k.endswith("lora_A.weight") for k in keys)
    ours = load_adapter(tmp_path / "b")
    assert ours.format == "diffusers (training scripts)" and len(ours.modules) == len(deltas)
    assert all(m.scaling == 1 for m in ours.modules.values())


def test_attention_processors(trained, tmp_path: Path) -> None:
    unet, deltas = trained
    attention = {n: m for n, m in unet.named_modules() if n in deltas and ".attn" in n}
    tensors = {}
    for name, m in attention.items():
        layer, _, last = name.removesuffix(".0").rpartition(".")
        start = f"unet.{layer}.processor.{last}_lora."
        tensors[start + "down.weight"] = m.lora_A["default"].weight.data
        tensors[start + "up.weight"] = m.lora_B["default"].weight.data * m.scaling["default"]
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.format == "diffusers (attention processors)"
    check_deltas(adapter, {n: deltas[n] for n in attention})


def test_peft_folder_of_a_unet(trained, tiny_model: Path, tmp_path: Path) -> None:
    import peft
    from peft.utils import get_peft_model_state_dict

    unet, deltas = trained
    wrapped = peft.get_peft_model(open_base(str(tiny_model)).pipe.unet, unet.peft_config["default"])
    peft.set_peft_model_state_dict(
        wrapped, {f"base_model.model.{k}": t for k, t in get_peft_model_state_dict(unet).items()}
    )
    wrapped.save_pretrained(tmp_path / "p")
    check_deltas(load_adapter(tmp_path / "p"), deltas)


# ------------------------------------------------------------------------------------------------------ ours elsewhere


def random_adapter(model: Path, method: str = "lora", rank: int = 4, alpha: float = 6.0) -> Adapter:
    base = open_base(str(model))
    modules = {}
    for component, part in base.components().items():
        handle = vl.inject(part, vl.AdapterConfig(method=method, rank=rank, alpha=alpha, targets="attn,mlp"))
        generator = torch.Generator().manual_seed(1)
        for lora in handle.methods.values():
            lora.lora_B.data = torch.randn(lora.lora_B.shape, generator=generator) * 0.3
        modules |= handle.modules(component)
        handle.eject()
    return Adapter(modules, {"base": {"id": str(model), "fingerprints": base.fingerprints()}})


def picture(pipe) -> torch.Tensor:
    return torch.from_numpy(
        pipe("dog", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
             height=32, width=32, output_type="np").images
    )  # fmt: skip


@pytest.mark.parametrize("format", ["kohya", "diffusers", "diffusers-folded"])
def test_ours_in_diffusers(format: str, tiny_model: Path, tmp_path: Path) -> None:
    """UNet and text encoder; kohya files with one alpha, as diffusers gives all modules the most common one."""
    from diffusers import StableDiffusionPipeline

    adapter = random_adapter(tiny_model)
    if format == "kohya":
        adapter = Adapter({n: m for n, m in adapter.modules.items() if n.startswith("unet.")}, adapter.info)
    base = open_base(str(tiny_model))
    apply(base, adapter)
    save_adapter(adapter, tmp_path / "a.safetensors", format)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    plain = picture(theirs)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    expected = picture(base.pipe)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(picture(theirs), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_kohya_file_of_mixed_ranks_and_alphas_in_diffusers(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    """As rank auto leaves them: diffusers gives all modules the most common alpha, so the file has but one."""
    from diffusers import StableDiffusionPipeline

    modules = {}
    for k, (name, m) in enumerate(random_adapter(tiny_model).modules.items()):
        down, up = (t.to(dtype) for t in m.lora_factors())
        rank = 2 + k % 3
        modules[name] = AdapterModule.lora(down[:rank], up[:, :rank], (rank, 6.0, 0.7)[k % 5 % 3])
    adapter = Adapter(modules)
    base = open_base(str(tiny_model))
    apply(base, adapter)
    save_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain = theirs.text_encoder(TEXT)[0].detach()
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs.set_progress_bar_config(disable=True)
    expected = base.pipe.text_encoder(TEXT)[0]
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(theirs.text_encoder(TEXT)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(picture(theirs), picture(base.pipe), rtol=0, atol=3e-5)
    found, given = in_one_spelling([load_adapter(tmp_path / "a.safetensors"), adapter])
    assert len({m.alpha for m in found.modules.values()}) == 1
    again = found.delta_weights()
    for name, delta in given.delta_weights().items():
        torch.testing.assert_close(again[name], delta, rtol=1e-6, atol=1e-6)


@pytest.fixture
def mixed_encoder(tiny_model: Path) -> tuple[Adapter, torch.Tensor, torch.Tensor]:
    """An adapter of a text encoder, of mixed alphas as kohya's; what the encoder says of TEXT without it and with it."""
    base = open_base(str(tiny_model))
    first = {n: m for n, m in random_adapter(tiny_model).modules.items() if n.startswith("text_encoder.")}
    mixed = {
        n: AdapterModule.lora(*m.lora_factors(), alpha)
        for (n, m), alpha in zip(first.items(), [2.0, 6.0, 6.0, 6.0] * len(first), strict=False)
    }
    adapter = Adapter(mixed, format="kohya")
    plain = base.pipe.text_encoder(TEXT)[0].detach()
    apply(base, adapter)
    return adapter, plain, base.pipe.text_encoder(TEXT)[0].detach()


TEXT = torch.tensor([[0, 5, 6, 7, 1, 1]])


@pytest.mark.parametrize("format", ["visionlora", "diffusers", "diffusers-folded"])
def test_a_kohya_text_encoder_in_diffusers(format: str, mixed_encoder, tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    adapter, plain, expected = mixed_encoder
    save_adapter(adapter, tmp_path / "a.safetensors", format)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(theirs.text_encoder(TEXT)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["visionlora", "diffusers"])
def test_dora_of_a_text_encoder_in_diffusers(format: str, tiny_model: Path, tmp_path: Path) -> None:
    """transformers' loader asks for `lora_magnitude_vector.weight`, where PEFT has no `.weight`."""
    from diffusers import StableDiffusionPipeline

    base, adapter = open_base(str(tiny_model)), random_adapter(tiny_model, "dora")
    adapter = Adapter({
        n: replace(m, tensors={**m.tensors, "magnitude": m.tensors["magnitude"] * 1.3}) for n, m in adapter.modules.items()
    })  # fmt: skip
    save_adapter(adapter, tmp_path / "a.safetensors", format)
    apply(base, load_adapter(tmp_path / "a.safetensors"))
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain = theirs.text_encoder(TEXT)[0].detach()
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    expected = base.pipe.text_encoder(TEXT)[0]
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(theirs.text_encoder(TEXT)[0], expected, rtol=0, atol=1e-5)


def test_files_with_magnitudes_under_the_older_name_are_read(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(random_adapter(tiny_model, "dora"), file)
    found = load_adapter(file).modules
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert any(k.endswith("vector.weight") for k in tensors)
    save_file({k.replace("vector.weight", "vector"): t for k, t in tensors.items()}, file, metadata)
    again = load_adapter(file).modules
    assert all(torch.equal(m.tensors["magnitude"], again[n].tensors["magnitude"]) for n, m in found.items())


def test_lora_on_some_layers_and_dora_on_others(tiny_model: Path, tmp_path: Path) -> None:
    """A config of PEFT's says one of them for all: diffusers is not given such a file, and refuses our own."""
    from diffusers import StableDiffusionPipeline

    lora, dora = (random_adapter(tiny_model, method).component("unet") for method in ("lora", "dora"))
    mixed = Adapter({f"unet.{n}": (dora if "attn1" in n else lora)[n] for n in lora})
    with pytest.raises(
        vl.VisionLoRAError, match="unet has DoRA on some layers and LoRA on others; diffusers takes one"
    ):
        save_adapter(mixed, tmp_path / "a.safetensors", "diffusers")
    save_adapter(mixed, tmp_path / "b.safetensors")
    again = load_adapter(tmp_path / "b.safetensors").modules
    assert {n: m.kind for n, m in again.items()} == {n: m.kind for n, m in mixed.modules.items()}
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    with pytest.raises(ValueError, match=r"row_magnitude|Invalid LoRA checkpoint"):
        pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")


def test_a_kohya_text_encoder_in_peft_and_back(mixed_encoder, tiny_model: Path, tmp_path: Path) -> None:
    import peft

    adapter, _, expected = mixed_encoder
    save_adapter(adapter, tmp_path / "p", "peft")
    wrapped = peft.PeftModel.from_pretrained(open_base(str(tiny_model)).pipe.text_encoder, tmp_path / "p")
    torch.testing.assert_close(wrapped(TEXT)[0], expected, rtol=0, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "theirs")
    for folder in ("p", "theirs"):
        base, again = open_base(str(tiny_model)), load_adapter(tmp_path / folder)
        assert again.components == ["text_encoder"]
        assert ("base" in again.info) == (folder == "theirs")  # not the id "None"
        apply(base, again)
        torch.testing.assert_close(base.pipe.text_encoder(TEXT)[0], expected, rtol=0, atol=1e-5)


def test_peft_folders_of_sdxls_text_encoders(tiny_xl: Path, tmp_path: Path) -> None:
    """The second one's class alone tells it from the first."""
    import peft

    pipe = open_base(str(tiny_xl)).pipe
    for name in ("text_encoder", "text_encoder_2"):
        wrapped = peft.get_peft_model(getattr(pipe, name), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        wrapped.save_pretrained(tmp_path / name)
        assert load_adapter(tmp_path / name).components == [name]


def test_folded_means_the_same_to_readers_that_know_no_scale(tiny_model: Path, tmp_path: Path) -> None:
    first = random_adapter(tiny_model, rank=4, alpha=6.0)
    mixed = dict(first.modules)
    name = next(iter(mixed))
    down, up = mixed[name].lora_factors()
    mixed[name] = AdapterModule.lora(down[:2], up[:, :2], 5.0)
    adapter = Adapter(mixed, first.info)
    save_adapter(adapter, tmp_path / "a.safetensors", "diffusers-folded")
    tensors = load_file(tmp_path / "a.safetensors")
    for layer, delta in adapter.delta_weights().items():
        found = tensors[layer + ".lora_B.weight"] @ tensors[layer + ".lora_A.weight"]
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6)
    assert {len(t) for k, t in tensors.items() if "lora_A" in k} == {4}


def test_metadata_of_diffusers_is_what_a_lora_config_takes(tiny_model: Path, tmp_path: Path) -> None:
    import peft

    save_adapter(random_adapter(tiny_model), tmp_path / "a.safetensors", "diffusers")
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(**{k.removeprefix("unet."): v for k, v in found.items() if k.startswith("unet.")})
    assert config.r == 4 and config.lora_alpha == 6
    assert all(locate("unet." + n)[0] == "unet" for n in config.target_modules)
