"""Adapter files on pipelines: by run folder, several at once, each with its scale."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import visionlora as vl
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.loaders import apply, check_base, check_fingerprints, load_adapter, load_pipeline, save_adapter
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.lora.arithmetic import Result
from visionlora.lora.config import AdapterConfig
from visionlora.lora.inject import inject
from visionlora.models.base import BaseModel, open_base
from visionlora.models.fingerprint import architecture_fingerprint, respelled, weights_fingerprint


def random_adapter(base: BaseModel, seed: int) -> Adapter:
    torch.manual_seed(seed)
    handle = inject(base.pipe.unet, AdapterConfig(rank=2), seed=seed)
    for lora in handle.methods.values():
        lora.lora_B.data.normal_(std=0.3)
    modules = handle.modules("unet")
    handle.eject()
    return Adapter(modules, {"base": {"id": base.id, "fingerprints": base.fingerprints()}})


def predict(unet: torch.nn.Module) -> torch.Tensor:
    x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 16, 16)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=text, return_dict=False)[0]


def test_a_run_folder_or_a_file_is_read(tiny_model: Path, tmp_path: Path) -> None:
    adapter = random_adapter(open_base(str(tiny_model)), 0)
    save_adapter(adapter, tmp_path / "run" / "adapter.safetensors")
    for path in (tmp_path / "run", tmp_path / "run" / "adapter.safetensors", str(tmp_path / "run")):
        assert load_adapter(path).modules.keys() == adapter.modules.keys()


def test_two_adapters_at_their_scales_equal_the_sum_of_their_changes_in_the_weights(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    a, b = random_adapter(base, 0), random_adapter(base, 1)
    plain = predict(base.pipe.unet)
    pipe = load_pipeline({"a": a, "dog-v1.5": b}, scales={"dog-v1.5": 0.5})
    merged = open_base(str(tiny_model)).pipe.unet
    modules = dict(merged.named_modules())
    for adapter, scale in ((a, 1.0), (b, 0.5)):
        for name, delta in adapter.delta_weights().items():
            modules[name.removeprefix("unet.")].weight.data += scale * delta
    assert not torch.allclose(plain, predict(merged), atol=1e-3)
    torch.testing.assert_close(predict(pipe.unet), predict(merged), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"There is a scale for 'dog', which is not attached\. Did you mean 'dogs'"):
        load_pipeline({"dogs": a}, scales={"dog": 0.5})


def test_one_adapter_needs_no_name(tiny_model: Path) -> None:
    adapter = random_adapter(open_base(str(tiny_model)), 0)
    alone, with_name = load_pipeline(adapter, scales=0.5), load_pipeline({"a": adapter}, scales={"a": 0.5})
    torch.testing.assert_close(predict(alone.unet), predict(with_name.unet), rtol=0, atol=0)
    with pytest.raises(
        ConfigError, match=r"adapters is list: give them by name, such as \{'dog': 'dog\.safetensors'\}"
    ):
        load_pipeline(["dog.safetensors"])  # type: ignore[arg-type]


def test_a_base_that_was_made_into_an_lcm_takes_the_adapters_of_its_family_by_force(tiny_model: Path) -> None:
    """It has one more parameter, for the guidance, which no adapter touches; vl.attach took them."""
    adapter, base = random_adapter(open_base(str(tiny_model)), 0), open_base(str(tiny_model))
    base.pipe.unet = UNet2DConditionModel.from_config({**base.pipe.unet.config, "time_cond_proj_dim": 8})
    with pytest.raises(AdapterFileError, match="has the same architecture but other weights"):
        apply(base, adapter)
    (handle,) = apply(base, adapter, force=True)
    assert len(handle.methods) == len(adapter.modules)


def test_a_pipeline_that_was_loaded_with_adapters_is_not_saved_in_part(tiny_model: Path, tmp_path: Path) -> None:
    pipe = load_pipeline({"a": random_adapter(open_base(str(tiny_model)), 0)})
    with pytest.raises(ConfigError, match=r"Adapters are on this StableDiffusionPipeline \(a\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_scale_zero_and_eject_give_the_base_bit_for_bit(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    plain = predict(base.pipe.unet)
    handles = apply(base, random_adapter(base, 0), scale=0.0)
    assert torch.equal(predict(base.pipe.unet), plain)
    for handle in handles:
        handle.set_scale(1.0)
        assert not torch.equal(predict(base.pipe.unet), plain)
        handle.eject()
    assert torch.equal(predict(base.pipe.unet), plain)


def test_nothing_stays_of_an_adapter_whose_word_is_refused(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    plain, classes = predict(base.pipe.unet), [type(m) for m in base.pipe.unet.modules()]
    wide = {"<rex>": {"text_encoder": torch.ones(1, 17)}}
    with pytest.raises(AdapterFileError, match="they were made for another family"):
        apply(base, replace(random_adapter(base, 0), embeddings=wide))
    assert torch.equal(predict(base.pipe.unet), plain) and [type(m) for m in base.pipe.unet.modules()] == classes


def test_another_architecture_is_refused_even_with_force(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    adapter = random_adapter(base, 0)
    adapter.info["base"]["fingerprints"]["unet"]["architecture"] = "other"
    with pytest.raises(AdapterFileError, match="whose unet has another architecture than that of"):
        check_base(adapter, base, force=True)


def test_a_part_that_the_base_has_not_is_refused(tiny_model: Path) -> None:
    base = open_base(str(tiny_model))
    adapter = random_adapter(base, 0)
    moved = Adapter({n.replace("unet.", "text_encoder_2."): m for n, m in adapter.modules.items()}, adapter.info)
    with pytest.raises(AdapterFileError, match="has a part for 'text_encoder_2', which"):
        check_base(moved, base)


def test_an_adapter_of_another_transformers_is_for_the_same_text_encoder(tiny_model: Path) -> None:
    """transformers 5.6 dropped `text_model.` from the names of its layers."""
    base, other = open_base(str(tiny_model)), open_base(str(tiny_model))
    encoder = base.pipe.text_encoder
    handle = inject(encoder, AdapterConfig(rank=2, targets="attn"))
    modules = handle.modules("text_encoder")
    handle.eject()
    taken = {
        "architecture": architecture_fingerprint(encoder, respelled),
        "weights": weights_fingerprint(encoder, respelled),
    }
    adapter = Adapter(modules, {"base": {"id": base.id, "fingerprints": {"text_encoder": taken}}})
    assert taken != base.fingerprints()["text_encoder"]
    assert len(apply(base, adapter)) == 1
    with torch.no_grad():
        other.pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    with pytest.raises(AdapterFileError, match="has the same architecture but other weights"):
        check_base(adapter, other)
    check_base(adapter, other, force=True)


@pytest.mark.parametrize("format", ["visionlora", "kohya", "diffusers", "diffusers-folded", "peft"])
@pytest.mark.parametrize("alphas", [(0.0, 0.0), (0.0, 2.0)])
def test_layers_of_alpha_zero_do_nothing_in_every_format(
    format: str, alphas: tuple[float, ...], tmp_path: Path
) -> None:
    """They came back at full strength: others' 0 is read as the rank."""
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{}"
    modules = {
        site.format(name): AdapterModule.lora(torch.ones(2, 8), torch.ones(8, 2), alpha)
        for name, alpha in zip(("to_q", "to_k"), alphas, strict=True)
    }
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    vl.save_adapter(Adapter(modules), path, format=format)
    found = vl.load_adapter(path).delta_weights()
    for name, module in modules.items():
        torch.testing.assert_close(found[name], module.delta_weight())


def test_files_and_results_are_adapters_too(tmp_path: Path) -> None:
    first, second = (
        Adapter({"unet.a": AdapterModule.lora(torch.randn(2, 4), torch.randn(3, 2), 2.0)}) for _ in range(2)
    )
    file = tmp_path / "a.safetensors"
    vl.save_adapter(first, file)
    wanted = vl.merge_adapters([(first, 1.0), (second, 1.0)])
    for given in ([file, second], [(str(file), 1), Result(second, {})]):
        found = vl.merge_adapters(given).adapter.delta_weights()
        for name, delta in wanted.adapter.delta_weights().items():
            torch.testing.assert_close(found[name], delta)
    assert vl.resize_adapter(str(file), vl.Size(rank=1)).ranks == {"unet.a": 1}
    vl.save_adapter(wanted, tmp_path / "b.safetensors")
    vl.save_adapter(file, tmp_path / "c.safetensors", "kohya")
    assert vl.inspect_file(str(tmp_path / "c.safetensors")).summary.format == "kohya"
    with pytest.raises(vl.VisionLoRAError, match="Give a list of pairs of adapter and scale"):
        vl.merge_adapters([(file, file)])


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("dog-v1.5", "visionlora", r"dog-v1.5 does not end in .*: write dog-v1.5.safetensors, or choose format peft"),
        ("dog.pt", "kohya", r"dog.pt does not end in .safetensors, by which programs know adapters: write dog.safetensors\.$"),
        ("dog.safetensors", "peft", r"would be a folder, as PEFT has adapters: write dog, or choose another format \(--to\)"),
    ],
)  # fmt: skip
def test_a_name_by_which_no_program_knows_an_adapter(name: str, format: str, said: str, tmp_path: Path) -> None:
    adapter = Adapter({"unet.a": AdapterModule.lora(torch.ones(2, 4), torch.ones(3, 2), 2.0)})
    with pytest.raises(ConfigError, match=said):
        vl.save_adapter(adapter, tmp_path / name, format)
    assert not list(tmp_path.iterdir())
    handle = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), AdapterConfig(rank=1, targets="0"))
    with pytest.raises(ConfigError, match=r"write dog.safetensors"):
        handle.save(tmp_path / "dog")


def test_a_pipeline_says_what_its_calls_must_be_told(tiny_model: Path) -> None:
    plain = random_adapter(open_base(str(tiny_model)), 0)
    trained = replace(plain, info={**plain.info, "training": {"clip_skip": 2}})
    with pytest.warns(UserWarning, match=r"b was trained with clip_skip 2, .*: pipe\(…, clip_skip=1\)") as told:
        load_pipeline({"a": plain, "b": trained}, str(tiny_model))
    assert len(told) == 1


def test_a_model_is_the_same_whichever_side_has_the_newer_names_for_its_layers() -> None:
    newer, older = ({"model": {"architecture": names, "weights": f"w {names}"}} for names in ("new", "old"))
    other = {"model": {**older["model"], "weights": "other"}}

    def check(there: dict, its_older: dict | None = None, **said: dict) -> None:
        modules = {"model.fc": AdapterModule("full", {"value": torch.ones(1)}, 1.0)}
        check_fingerprints(Adapter(modules, {"base": {"id": "vit", **said}}), "vit", there, older=its_older)

    check(newer, older, fingerprints=newer, older_fingerprints=older)
    check(newer, older, fingerprints=older)
    check(older, older, fingerprints=newer, older_fingerprints=older)
    for there in (other, {"model": {"architecture": "another", "weights": "w old"}}):
        with pytest.raises(AdapterFileError, match="architecture"):
            check(there, there, fingerprints=newer, older_fingerprints=older)
    with pytest.raises(AdapterFileError, match="has another architecture"):
        check(older, fingerprints=newer)
