"""What other loaders get wrong in silence, one test each: here it is right, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from visionlora.formats.names import flattened
from visionlora.lora.adapter import AdapterModule
from visionlora.lora.arithmetic import Size, merge_adapters, resize_adapter

LAYERS = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{n}" for n in "qkv"]


def kohya(
    path: Path, alphas: list[float | None], ranks: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Writes a kohya file and returns the right ΔW by name."""
    tensors, deltas = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, alpha, rank in zip(LAYERS, alphas, ranks, strict=True):
        down = torch.randn(rank, 6, generator=generator).to(dtype)
        up = torch.randn(8, rank, generator=generator).to(dtype)
        flat = "lora_unet_" + flattened(name)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=dtype)
        scale = 1.0 if alpha is None else float(torch.tensor(alpha, dtype=dtype)) / rank
        deltas[f"unet.{name}"] = up.float() @ down.float() * scale
    save_file(tensors, path)
    return deltas


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta)


def test_every_module_keeps_its_own_alpha(tmp_path: Path) -> None:
    """diffusers gives all of them the most common one."""
    expected = kohya(tmp_path / "a.safetensors", [2.0, 1.0, 8.0], [4, 2, 3])
    check_same(vl.load_adapter(tmp_path / "a.safetensors").delta_weights(), expected)


def test_a_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    """diffusers takes that of the other modules."""
    expected = kohya(tmp_path / "a.safetensors", [1.0, None, 1.0], [4, 4, 4])
    check_same(vl.load_adapter(tmp_path / "a.safetensors").delta_weights(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_rounded_with_its_file_is_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """12.345 is 12.375 in bfloat16."""
    expected = kohya(tmp_path / "a.safetensors", [12.345, 12.345, 3.0], [4, 4, 4], dtype)
    check_same(vl.load_adapter(tmp_path / "a.safetensors").delta_weights(), expected)


def test_alpha_zero_means_the_rank(tmp_path: Path) -> None:
    kohya(tmp_path / "a.safetensors", [0.0, 1.0, 1.0], [4, 4, 4])
    adapter = vl.load_adapter(tmp_path / "a.safetensors")
    assert [adapter.modules[f"unet.{n}"].scaling for n in LAYERS] == [1.0, 0.25, 0.25]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_lost_is_refused(alpha: float, tmp_path: Path) -> None:
    kohya(tmp_path / "a.safetensors", [alpha, 1.0, 1.0], [4, 4, 4])
    with pytest.raises(
        vl.VisionLoRAError, match=f"has an alpha of {alpha} for 'lora_unet_down_blocks_0_.*its scale is lost"
    ):
        vl.load_adapter(tmp_path / "a.safetensors")


def test_two_spellings_in_one_file_are_both_read(tmp_path: Path) -> None:
    """diffusers looks at the first key alone."""
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    save_file({
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": a, "unet.mid_block.attentions.0.proj_in.lora_B.weight": b,
        f"unet.{LAYERS[0]}.lora.down.weight": a.clone(), f"unet.{LAYERS[0]}.lora.up.weight": b.clone(),
    }, tmp_path / "a.safetensors")  # fmt: skip
    adapter = vl.load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.modules) == {"unet.mid_block.attentions.0.proj_in", f"unet.{LAYERS[0]}"}


def test_a_layer_of_sdxl_in_both_its_namings_is_refused_and_never_half_read(tmp_path: Path) -> None:
    """Different layers may have either name; of one that has both, one would be lost, or count twice."""
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    ours = {f"unet.{block}.to_q.lora_A.weight": a, f"unet.{block}.to_q.lora_B.weight": b}
    for start in ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_", f"lora_unet_{flattened(block)}_to_"):
        for which in "qk":
            theirs = {f"{start}{which}.lora_down.weight": a.clone(), f"{start}{which}.lora_up.weight": b.clone()}
            save_file({**ours, **theirs}, tmp_path / f"{which}.safetensors")
        assert set(vl.load_adapter(tmp_path / "k.safetensors").modules) == {f"unet.{block}.to_{n}" for n in "qk"}
        with pytest.raises(vl.VisionLoRAError, match=rf"adapts unet\.{block}\.to_q twice, once as '"):
            vl.load_adapter(tmp_path / "q.safetensors")


def test_bundled_embeddings_do_not_hide_the_lora(tmp_path: Path) -> None:
    """One foreign key makes diffusers load nothing."""
    kohya(tmp_path / "a.safetensors", [1.0] * 3, [4] * 3)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    tensors["bundle_emb.<dog>.string_to_param.*"] = torch.randn(2, 768)
    tensors["bundle_emb.ink.clip_g"] = torch.randn(1, 1280)
    save_file(tensors, tmp_path / "b.safetensors")
    adapter = vl.load_adapter(tmp_path / "b.safetensors")
    assert len(adapter.modules) == 3
    assert {t: {c: tuple(v.shape) for c, v in p.items()} for t, p in adapter.embeddings.items()} == {
        "<dog>": {"text_encoder": (2, 768)},
        "ink": {"text_encoder_2": (1, 1280)},
    }
    vl.save_adapter(adapter, tmp_path / "c.safetensors")
    again = vl.load_adapter(tmp_path / "c.safetensors")
    assert torch.equal(again.embeddings["<dog>"]["text_encoder"], adapter.embeddings["<dog>"]["text_encoder"])


def test_an_unknown_tensor_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kohya(tmp_path / "a.safetensors", [1.0] * 3, [4] * 3)
    save_file(
        load_file(tmp_path / "a.safetensors") | {"lora_unet_mid_block.strange": torch.ones(2)},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(
        vl.VisionLoRAError,
        match=r"has 1 tensors that nothing here takes: 'lora_unet_mid_block.strange'.*--allow-partial",
    ):
        vl.load_adapter(tmp_path / "b.safetensors")
    adapter = vl.load_adapter(tmp_path / "b.safetensors", allow_partial=True)
    assert len(adapter.modules) == 3 and adapter.unused == ("lora_unet_mid_block.strange",)


def test_a_method_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"lora_unet_mid_block_conv.a1.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(vl.VisionLoRAError, match=r"holds no adapter that visionlora knows.*They are GLoRA's"):
        vl.load_adapter(tmp_path / "a.safetensors")


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(vl.VisionLoRAError, match="holds half an adapter for 'lora_unet_conv_in': up alone"):
        vl.load_adapter(tmp_path / "a.safetensors")


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.0.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(vl.VisionLoRAError, match="is a whole model, not an adapter"):
        vl.load_adapter(tmp_path / "a.safetensors")


def test_the_sum_of_two_is_the_sum_of_their_changes(tmp_path: Path) -> None:
    """Adding up and down by themselves is off by more than half."""
    one = kohya(tmp_path / "a.safetensors", [2.0, None, 8.0], [4, 2, 3])
    two = kohya(tmp_path / "b.safetensors", [1.0, 3.0, None], [2, 5, 4])
    a, b = (vl.load_adapter(tmp_path / f"{n}.safetensors") for n in "ab")
    found = merge_adapters([(a, 0.8), (b, -0.5)])
    assert not any(found.errors.values())
    check_same(found.adapter.delta_weights(), {n: 0.8 * one[n] - 0.5 * two[n] for n in one})


def test_no_key_is_taken_for_another_by_a_piece_of_its_name(tmp_path: Path) -> None:
    """A token or layer that has `alpha` or `lora_down` in its own name."""
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    save_file(
        {"blocks.alpha_lora_down.lora_A.weight": a, "blocks.alpha_lora_down.lora_B.weight": b},
        tmp_path / "a.safetensors",
    )
    adapter = vl.load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.modules) == ["model.blocks.alpha_lora_down"]
    assert resize_adapter(adapter, Size(rank=1)).adapter.modules["model.blocks.alpha_lora_down"].rank == 1


@pytest.mark.parametrize(
    "names", [("transformer.h.0.q", "transformer.h.0.k"), ("conv_in", "head"), ("diffusion_model.a", "b")]
)
def test_layers_of_ones_own_model_keep_their_names_and_stay_together(names: tuple[str, str], tmp_path: Path) -> None:
    """A layer that is called as one of Stable Diffusion's does not make the model one."""
    model = nn.Module()
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(6, 8))
    save_file(
        {
            f"base_model.model.{n}.lora_{k}.weight": torch.ones(*s)
            for n in names
            for k, s in (("A", (2, 6)), ("B", (8, 2)))
        },
        tmp_path / "a.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    adapter = vl.load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.modules) == {f"model.{n}" for n in names}
    assert set(vl.attach(model, adapter).methods) == set(names)


def test_a_peft_folder_does_not_lose_tokens_in_silence(tmp_path: Path) -> None:
    module = vl.Adapter({"unet.conv_in": AdapterModule.lora(torch.ones(1, 4), torch.ones(8, 1), 1.0)}).modules
    adapter = vl.Adapter(module, {}, {"<dog>": {"text_encoder": torch.ones(1, 768)}})
    with pytest.raises(
        vl.VisionLoRAError, match=r"cannot hold the vectors of <dog>\. Formats visionlora and kohya keep them"
    ):
        vl.save_adapter(adapter, tmp_path / "a", "peft")


@pytest.mark.filterwarnings("ignore")
def test_diffusers_refuses_our_file_of_a_dora_by_columns(tmp_path: Path) -> None:
    """It knows magnitudes of rows alone; on a square layer it would take one for the other."""
    from diffusers import StableDiffusionPipeline

    tensors = {"lora_A": torch.ones(1, 8), "lora_B": torch.ones(8, 1), "magnitude": torch.ones(8)}
    adapter = vl.Adapter({f"unet.{LAYERS[0]}": AdapterModule("dora", tensors, 1.0, {"axis": "in"})})
    vl.save_adapter(adapter, tmp_path / "a.safetensors")
    (module,) = vl.load_adapter(tmp_path / "a.safetensors").modules.values()
    assert module.options == {"axis": "in"} and torch.equal(module.tensors["magnitude"], torch.ones(8))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        StableDiffusionPipeline.load_lora_weights(StableDiffusionPipeline, tmp_path, weight_name="a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_eight_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch stores such tensors and does not calculate with them; fp16 holds their values exactly."""
    torch.manual_seed(0)
    layer = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, 6).to(dtype),
        f"{layer}.lora_B.weight": torch.randn(8, 2).to(dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    (module,) = vl.load_adapter(tmp_path / "a.safetensors").modules.values()
    wanted = tensors[f"{layer}.lora_B.weight"].float() @ tensors[f"{layer}.lora_A.weight"].float()
    torch.testing.assert_close(module.delta_weight(), wanted, rtol=0, atol=0)


def test_a_dora_of_a_loha_on_a_convolution_keeps_its_shape_for_others(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = {f"hada_w{k}_{s}": torch.randn(*((8, 2) if s == "a" else (2, 54)), generator=generator)
             for k in (1, 2) for s in "ab"}  # fmt: skip
    name = "unet.mid_block.resnets.0.conv1"
    own = vl.Adapter({name: AdapterModule("dora", {**sides, "magnitude": torch.ones(8)}, 2.0, {"product": "loha"})})
    vl.save_adapter(own, tmp_path / "a.safetensors", "kohya")
    (scale,) = (t for n, t in load_file(tmp_path / "a.safetensors").items() if n.endswith("dora_scale"))
    assert scale.shape == (8, 1, 1, 1)
    assert vl.load_adapter(tmp_path / "a.safetensors").modules[name].options == {"product": "loha"}


@pytest.mark.parametrize("format", ["visionlora", "kohya"])
def test_both_encoders_vectors_of_a_token_are_kept(format: str, tmp_path: Path) -> None:
    """SDXL's, beside layers that do not tell the family."""
    modules = {
        "unet.down_blocks.1.attentions.0.proj_in": AdapterModule.lora(torch.ones(1, 640), torch.ones(640, 1), 1.0)
    }
    vectors = {"text_encoder": torch.randn(2, 768), "text_encoder_2": torch.randn(2, 1280)}
    vl.save_adapter(vl.Adapter(modules, {}, {"<rex>": vectors}), tmp_path / "a.safetensors", format)
    found = vl.load_adapter(tmp_path / "a.safetensors")
    assert list(found.modules) == list(modules)
    assert {c: torch.equal(v, vectors[c]) for c, v in found.embeddings["<rex>"].items()} == dict.fromkeys(vectors, True)


def test_the_two_text_encoders_of_sdxl_have_two_prefixes(tmp_path: Path) -> None:
    module = AdapterModule.lora(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    names = [f"text_encoder{n}.text_model.encoder.layers.0.mlp.fc1" for n in ("", "_2")]
    vl.save_adapter(vl.Adapter(dict.fromkeys(names, module)), tmp_path / "a.safetensors", "kohya")
    assert {k.partition("_text_model")[0] for k in load_file(tmp_path / "a.safetensors")} == {"lora_te1", "lora_te2"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_of_a_training_that_diverged_are_refused(value: float, tmp_path: Path) -> None:
    bad = torch.tensor([[1.0, value, 2.0]])
    save_file({"<rex>": bad}, tmp_path / "alone.safetensors")
    module = AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    for format in ("visionlora", "kohya"):
        own = vl.Adapter({"unet.mid_block.a": module}, {}, {"<rex>": {"text_encoder": bad}})
        vl.save_adapter(own, tmp_path / f"{format}.safetensors", format)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(vl.VisionLoRAError, match="has NaN or infinite values in '<rex>'"):
            vl.load_adapter(file)
