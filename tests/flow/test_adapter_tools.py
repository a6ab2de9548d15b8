"""The adapter tools as a user runs them: one command each, from files to files."""

import dataclasses
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import visionlora as vl
from visionlora.cli.main import app
from visionlora.errors import ConfigError, ModelError, TargetError, VisionLoRAError
from visionlora.loaders import apply
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import open_base

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def files(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with two adapters of the tiny model."""
    base = open_base(str(tiny_model))
    folder = tmp_path / "loras"
    for seed, name in enumerate(("dog", "ink")):
        handle = vl.inject(base.pipe.unet, vl.AdapterConfig(rank=4, alpha=6.0, targets="attn,mlp"))
        generator = torch.Generator().manual_seed(seed)
        for lora in handle.methods.values():
            lora.lora_B.data = torch.randn(lora.lora_B.shape, generator=generator) * 0.2
        info = {"base": {"id": str(tiny_model), "fingerprints": base.fingerprints()}, "trigger": f"{name} word"}
        vl.save_adapter(handle.adapter("unet", info), folder / f"{name}.safetensors")
        handle.eject()
    return folder


def run(*words: object) -> str:
    """The output of a command that succeeds."""
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_output_in_an_encoding_that_has_not_every_sign(files: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows writes into files and pipes: the sign of a norm ended the command in a traceback."""
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    code, out, err = cli("inspect", files / "dog.safetensors")
    assert code == 0 and not err and "method   lora" in out and "??W?" in out


def test_inspect_one_file(files: Path, tmp_path: Path) -> None:
    text = run("inspect", files / "dog.safetensors", "--picture", tmp_path / "norms.png", "--modules")
    for line in (
        "format   visionlora",
        "method   lora",
        "rank     4",
        "alpha    6",
        "trigger  dog word",
        "health   good",
    ):
        assert line in text
    assert "unet mid" in text and "█" in text and (tmp_path / "norms.png").stat().st_size > 5000
    found = json.loads(run("inspect", files / "dog.safetensors", "--json"))
    deltas = vl.load_adapter(files / "dog.safetensors").delta_weights()
    for module in found["modules"]:
        assert module["norm"] == pytest.approx(float(deltas[module["name"]].norm()), rel=1e-4)
    assert sum(n**2 for n in found["blocks"].values()) == pytest.approx(
        sum(float(d.norm()) ** 2 for d in deltas.values()), rel=1e-4
    )


def test_inspect_says_how_it_was_trained(files: Path, tmp_path: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    foreign = {
        "ss_steps": "1500", "ss_num_train_images": "200", "ss_learning_rate": "0.0001", "ss_clip_skip": "None",
        "ss_resolution": "(512, 768)", "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
        "ss_sd_model_name": "anime.safetensors", "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 20}}',
        "ss_tag_frequency": '{"10_sks dog": {"sks dog": 20, "red collar": 7}}', "ss_training_comment": "line\nline",
    }  # fmt: skip
    vl.save_adapter(replace(adapter, info={}, metadata=foreign), tmp_path / "k.safetensors", "kohya")
    text = run("inspect", tmp_path / "k.safetensors")
    trained = (
        "pictures 20, steps 1500, resolution 512x768, learning_rate 0.0001, optimizer AdamW8bit, model anime.safetensors, "
        r"comment line\\nline"
    )
    assert re.search(rf"^trained  {trained}$", text, re.M), text
    assert re.search("^tags     in so many captions: sks dog 20, red collar 7$", text, re.M)
    run("merge", f"{files / 'dog.safetensors'}:0.5", files / "ink.safetensors", "-o", tmp_path / "m.safetensors")
    assert "trained  merged sum at 0.5 and 1" in run("inspect", tmp_path / "m.safetensors")
    sides = {k: (torch.ones(k, 2), torch.ones(2, k)) for k in (1, 3, 2)}
    several = {f"unet.{n}.{k}": AdapterModule.lora(*sides[k], k / 2) for k in sides for n in range(k)}
    vl.save_adapter(Adapter(several), tmp_path / "ranks.safetensors")
    assert re.search(r"^rank     1, 2, 3\nalpha    0.5, 1, 1.5$", run("inspect", tmp_path / "ranks.safetensors"), re.M)
    head = Adapter({"model.head.bias": AdapterModule("full", {"value": torch.ones(2)}, 1.0)},
                   {"classifier": {"classes": ["cat", "dog"]}})  # fmt: skip
    vl.save_adapter(head, tmp_path / "c.safetensors")
    assert "classes  2: cat, dog" in run("inspect", tmp_path / "c.safetensors")
    found = json.loads(run("inspect", tmp_path / "c.safetensors", "--json"))["history"]
    assert found == {"trained": {}, "tags": {}, "classes": ["cat", "dog"]}


def test_inspect_what_has_no_layers_or_no_one_change(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    save_file({"<rex>": torch.randn(2, 16)}, tmp_path / "rex.safetensors")
    assert "no layers" in run("inspect", tmp_path / "rex.safetensors", "--modules")
    handle = vl.inject(open_base(str(tiny_model)).pipe.unet, vl.AdapterConfig(method="tlora", rank=2, targets="attn"))
    handle.save(tmp_path / "t.safetensors", "unet")
    text = run("inspect", tmp_path / "t.safetensors", "--model", tiny_model, "--modules")
    assert "tlora rank   2" in text and "of W" not in text


@pytest.mark.parametrize(
    ("method", "called", "rank"), [("tlora", "tlora", [3]), ("full", "trained in full", []), ("ia3", "ia3", [])]
)
def test_inspect_names_method_and_layers(
    tiny_model: Path, tmp_path: Path, method: str, called: str, rank: list[int]
) -> None:
    """Their tensors have names of their own, by which neither was told."""
    handle = vl.inject(open_base(str(tiny_model)).pipe.unet, vl.AdapterConfig(method=method, rank=3, targets="attn"))
    handle.save(tmp_path / "a.safetensors", "unet")
    modules = vl.load_adapter(tmp_path / "a.safetensors").modules
    found = json.loads(run("inspect", tmp_path / "a.safetensors", "--json"))["summary"]
    assert (found["method"], found["components"], found["ranks"]) == (called, {"unet": len(modules)}, rank)
    text = run("inspect", tmp_path)
    assert called.split()[-1] in text and str(len(modules)) in text


def test_inspect_says_what_is_wrong(files: Path, tiny_model: Path) -> None:
    tensors = load_file(files / "dog.safetensors")
    first, second, *_ = [n for n in sorted(tensors) if n.endswith("lora_B.weight")]
    tensors[first] = torch.zeros_like(tensors[first])
    tensors[second] = tensors[second] * 1000
    save_file({**tensors, "strange": torch.ones(1)}, files / "bad.safetensors")
    text = run("inspect", files / "bad.safetensors", "--model", tiny_model)
    assert "modules change nothing (ΔW is zero), such as" in text
    assert "times stronger than the median" in text and "1 tensors are not used, such as strange" in text
    assert "change their weight by more than 50%" in text


def test_inspect_says_what_a_model_has_not(files: Path, tiny_model: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    first, second, *_ = adapter.modules
    modules = {n: m for n, m in adapter.modules.items() if n not in (first, second)}
    modules["unet.conv_in"] = adapter.modules[first]
    modules[second.replace("to_", "ot_")] = adapter.modules[second]
    vl.save_adapter(Adapter(modules), files / "odd.safetensors")
    text = run("inspect", files / "odd.safetensors", "--model", tiny_model)
    assert "modules do not fit the model, such as" in text
    assert "unet.conv_in: The adapter's ΔW for unet.conv_in has shape (16, 16), the base weight (16, 4, 3, 3)." in text
    assert f"Did you mean '{second.removeprefix('unet.')}'?" in text


def test_convert_one_part(files: Path, tmp_path: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    two = {**adapter.modules, "text_encoder.text_model.encoder.layers.0.mlp.fc1": next(iter(adapter.modules.values()))}
    vl.save_adapter(Adapter(two), files / "two.safetensors")
    with pytest.raises(
        VisionLoRAError, match="A PEFT folder holds one part; this adapter has text_encoder, unet: write one"
    ):
        run("convert", files / "two.safetensors", tmp_path / "peft", "--to", "peft")
    with pytest.raises(VisionLoRAError, match=r"has no part 'unte'. Did you mean 'unet'\?"):
        run("convert", files / "two.safetensors", tmp_path / "peft", "--to", "peft", "--component", "unte")
    run("convert", files / "two.safetensors", tmp_path / "peft", "--to", "peft", "--component", "unet")
    assert set(vl.load_adapter(tmp_path / "peft").modules) == set(adapter.modules)


def test_inspect_a_folder(files: Path) -> None:
    (files / "broken.safetensors").write_bytes(b"nothing")
    run("convert", files / "dog.safetensors", files / "peft", "--to", "peft")
    of_diffusers = files / "ink-run" / "pytorch_lora_weights.safetensors"
    run("convert", files / "ink.safetensors", of_diffusers, "--to", "diffusers")
    assert "ink-run/pytorch_lora_weights.safetensors" in run("inspect", files)
    of_diffusers.unlink()
    text = run("inspect", files)
    assert (
        "dog.safetensors" in text
        and "ink word" in text
        and "broken.safetensors is not a whole safetensors file" in text
    )
    torch.save({"unet.a": torch.ones(1)}, files / "old.bin")
    assert f"{files / 'old.bin'}: a pickle: inspect the file itself" in run("inspect", files)
    (files / "old.bin").unlink()
    found = {Path(s["path"]).name: s for s in json.loads(run("inspect", files, "--json"))}
    assert set(found) == {"dog.safetensors", "ink.safetensors", "broken.safetensors", "peft"}
    assert (
        found["peft"]["format"] == "peft" and found["peft"]["alpha"] == 6 and found["dog.safetensors"]["ranks"] == [4]
    )


def test_names_and_triggers_are_no_markup(files: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    adapter.info["trigger"] = "[b]a[/b] :dog:"
    vl.save_adapter(adapter, files / "dog[v2][b].safetensors")
    text = run("inspect", files)
    assert "dog[v2][b].safetensors" in text and "[b]a[/b] :dog:" in text


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_convert_there_and_back(files: Path, tmp_path: Path, to: str) -> None:
    there, back = tmp_path / ("there" if to == "peft" else "there.safetensors"), tmp_path / "back.safetensors"
    run("convert", files / "dog.safetensors", there, "--to", to)
    run("convert", there, back)
    old, new = (vl.load_adapter(p).delta_weights() for p in (files / "dog.safetensors", back))
    assert all(torch.equal(d, new[n]) for n, d in old.items()) and old.keys() == new.keys()


def test_merge_resize_and_what_they_lose(files: Path, tmp_path: Path) -> None:
    a, b = files / "dog.safetensors", files / "ink.safetensors"
    text = run("merge", f"{a}:0.8", f"{b}:0.5", "-o", tmp_path / "both.safetensors")
    assert "rank 8; exact" in text
    one, two, both = (vl.load_adapter(p) for p in (a, b, tmp_path / "both.safetensors"))
    for name, delta in both.delta_weights().items():
        torch.testing.assert_close(delta, 0.8 * one.delta_weights()[name] + 0.5 * two.delta_weights()[name])
    assert both.info["base"] == one.info["base"] and both.info["trigger"] == "dog word, ink word"
    text = run(
        "resize", tmp_path / "both.safetensors", "--rank", 3, "-o", tmp_path / "small.safetensors", "--to", "kohya"
    )
    assert "rank 3; relative error of ΔW 0." in text
    assert {m.rank for m in vl.load_adapter(tmp_path / "small.safetensors").modules.values()} == {3}
    for method in ("ties", "dare", "knots", "iso-c"):
        run("merge", a, b, "-o", tmp_path / f"{method}.safetensors", "--method", method, "--energy", 0.9)


@torch.no_grad()
def test_factors_of_blocks_are_those_of_drawing(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    both = [f"{files / 'dog.safetensors'}:0.8@up=0.5,mid=0", f"{files / 'ink.safetensors'}:-0.3@down=2"]
    run("merge", *both, "-o", tmp_path / "both.safetensors")
    run("bake", tiny_model, *both, "-o", tmp_path / "model")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)

    def seen(unet) -> torch.Tensor:
        found: torch.Tensor = unet(x, torch.tensor(500), text[..., : unet.config.cross_attention_dim]).sample
        return found

    pipe = open_base(str(tiny_model)).pipe
    plain = seen(pipe.unet)
    scales = {"dog": vl.Scale(0.8, blocks={"up": 0.5, "mid": 0}), "ink": vl.Scale(-0.3, blocks={"down": 2})}
    with vl.attach(pipe, {name: files / f"{name}.safetensors" for name in scales}, scales=scales):
        wanted = seen(pipe.unet)
    with vl.attach(pipe, {"both": tmp_path / "both.safetensors"}):
        merged = seen(pipe.unet)
    baked = seen(open_base(str(tmp_path / "model")).pipe.unet)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(baked, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "text"), [("start=0.5", "start is of steps"), ("sideways=1", "No adapted layer is in")]
)
def test_factors_that_a_file_cannot_hold_are_refused(files: Path, tmp_path: Path, words: str, text: str) -> None:
    for verb in (["merge"], ["bake", "auto"]):
        with pytest.raises(ConfigError, match=text):
            run(*verb, f"{files / 'dog.safetensors'}@{words}", "-o", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("to", ["visionlora", "kohya", "diffusers"])
def test_merging_what_was_trained_here_with_a_kohya_file(tiny_model: Path, tmp_path: Path, to: str) -> None:
    """Their names of a text encoder's layers differ; half of one and half of the same in the other is the whole."""
    encoder = open_base(str(tiny_model)).pipe.text_encoder
    handle = vl.inject(encoder, vl.AdapterConfig(rank=2, targets="attn"))
    for k, lora in enumerate(handle.methods.values()):
        lora.lora_B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(k))
    own = handle.adapter("text_encoder")
    vl.save_adapter(own, tmp_path / "own.safetensors")
    vl.save_adapter(own, tmp_path / "kohya.safetensors", "kohya")
    halves = [f"{tmp_path / name}.safetensors:0.5" for name in ("own", "kohya")]
    assert "8 modules, rank 4; exact" in run("merge", *halves, "-o", tmp_path / "m.safetensors", "--to", to)
    handle.eject()
    found = vl.attach(encoder, vl.load_adapter(tmp_path / "m.safetensors")).adapter("text_encoder").delta_weights()
    assert len(found) == 8
    for name, delta in own.delta_weights().items():
        torch.testing.assert_close(found[name], delta)


@pytest.fixture
def with_a_word(files: Path) -> Path:
    """An adapter that brings a word."""
    adapter = vl.load_adapter(files / "dog.safetensors")
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    vl.save_adapter(replace(adapter, embeddings={"<rex>": {"text_encoder": vectors}}), files / "word.safetensors")
    return files / "word.safetensors"


def test_a_word_of_an_adapter_for_diffusers(with_a_word: Path, tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    own = tmp_path / "d-rex.safetensors"
    own.write_bytes(b"somebody's")
    with pytest.raises(VisionLoRAError, match=r"d-rex\.safetensors exists already"):
        run("convert", with_a_word, tmp_path / "d.safetensors", "--to", "diffusers")
    assert own.read_bytes() == b"somebody's" and not (tmp_path / "d.safetensors").exists()
    own.unlink()
    told = run("convert", with_a_word, tmp_path / "d.safetensors", "--to", "diffusers")
    assert f"a learned word, for the folder of embeddings: {own}" in told
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name="d.safetensors")
    pipe.load_textual_inversion(tmp_path / "d-rex.safetensors")
    (found,) = vl.load_adapter(with_a_word).embeddings.values()
    ids = pipe.tokenizer("<rex> <rex>_1", add_special_tokens=False).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], found["text_encoder"])
    with pytest.raises(VisionLoRAError, match=r"has no layers .* load_textual_inversion"):
        vl.save_adapter(vl.load_adapter(tmp_path / "d-rex.safetensors"), tmp_path / "e.safetensors", "diffusers")


def test_words_whose_vectors_lie_beside_are_not_forgotten(with_a_word: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A merged or converted file did not say any more that it needs them, and a model was baked without them in silence."""
    one, other, m = (tmp_path / f"{name}.safetensors" for name in ("d", "k", "m"))
    run("convert", with_a_word, one, "--to", "diffusers")
    run("convert", one, other, "--to", "kohya")
    assert vl.load_adapter(other).info["words"] == ["<rex>"]
    for to in ("kohya", "visionlora"):
        told = run("merge", f"{one}:0.5", f"{other}:0.5", "--output", m, "--to", to, "--overwrite")
        assert "The vectors of <rex> are in none of the adapters: they stay in files of their own" in told
        assert vl.load_adapter(m).info["words"] == ["<rex>"]
    beside = tmp_path / "<rex>.safetensors"
    (tmp_path / "d-rex.safetensors").rename(beside)
    told = run("merge", one, beside, "--output", m, "--overwrite")
    assert "The vectors of" not in told and list(vl.load_adapter(m).embeddings) == ["<rex>"]
    told = run("bake", tiny_model, f"{one}", "--output", tmp_path / "baked", "--force")
    assert f"{one} was trained with the word <rex>, whose vectors are not in it: the model does not know it." in told


@pytest.mark.parametrize(
    "words",
    [("merge", "{word}:0.5"), ("resize", "{word}", "--rank", 1), ("convert", "{word}", "{out}")],
    ids=lambda words: words[0],
)
def test_a_word_beside_the_output_takes_no_others_place(with_a_word: Path, tmp_path: Path, words: tuple) -> None:
    out, other = tmp_path / "out.safetensors", tmp_path / "out-rex.safetensors"
    told = [str(w).format(word=with_a_word, out=out) for w in words] + ["--to", "diffusers"]
    told += [] if words[0] == "convert" else ["--output", str(out)]
    other.write_text("of somebody else")
    with pytest.raises(ConfigError, match=r"out-rex\.safetensors exists already"):
        run(*told)
    assert other.read_text() == "of somebody else" and not out.exists()
    other.unlink()
    assert f"a learned word, for the folder of embeddings: {other}" in run(*told)
    assert out.exists() and other.exists()


def test_one_part_of_an_adapter_has_no_words_of_others(with_a_word: Path, tmp_path: Path) -> None:
    for to, output in (("peft", "p"), ("kohya", "k.safetensors")):
        run("convert", with_a_word, tmp_path / output, "--to", to, "--component", "unet")
        found = vl.load_adapter(tmp_path / output)
        assert found.components == ["unet"] and not found.embeddings


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_what_has_one_layer_in_two_spellings_is_not_written_in_half(tmp_path: Path, to: str) -> None:
    module = AdapterModule.lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    names = ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    with pytest.raises(
        VisionLoRAError, match=f"changes one layer of text_encoder twice, as encoder.* and {to} has one"
    ):
        vl.save_adapter(Adapter(dict.fromkeys(names, module)), tmp_path / "a.safetensors", to)


@torch.no_grad()
def drawn(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return unet(
        torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([9]), torch.randn(1, 5, 16, generator=generator)
    ).sample


def test_convert_takes_adapters_in_memory(files: Path, tmp_path: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    vl.convert(adapter, tmp_path / "one.safetensors", "kohya")
    vl.convert(vl.resize_adapter(adapter, vl.Size(rank=1)), tmp_path / "two.safetensors", component="unet")
    found = [vl.load_adapter(tmp_path / name) for name in ("one.safetensors", "two.safetensors")]
    assert all(one.modules.keys() <= adapter.modules.keys() and one.modules for one in found)
    with pytest.raises(VisionLoRAError, match=r"The adapter has no part 'unte'\. Did you mean 'unet'"):
        vl.convert(adapter, tmp_path / "no.safetensors", component="unte")
    with pytest.raises(VisionLoRAError, match="int"):
        vl.convert(3, tmp_path / "no.safetensors")


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_a_model_is_baked_in_either_word_for_its_precision_and_in_silence(
    files: Path, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    vl.bake("auto", [(str(files / "dog.safetensors"), 1.0)], tmp_path / "baked", dtype)
    kept = load_file(tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float16}
    assert [record.getMessage() for record in caplog.records] == []


def test_bake_and_extract(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    told = run("bake", "auto", f"{files / 'dog.safetensors'}:0.7", files / "ink.safetensors", "-o", tmp_path / "baked")
    assert "A model with 2 adapters in it" in told
    base = open_base(str(tiny_model))
    apply(base, vl.load_adapter(files / "dog.safetensors"), "dog", 0.7)
    apply(base, vl.load_adapter(files / "ink.safetensors"), "ink")
    baked = open_base(str(tmp_path / "baked"))
    torch.testing.assert_close(drawn(baked.pipe.unet), drawn(base.pipe.unet), rtol=1e-4, atol=1e-5)
    assert not any(
        "adapters" in n for n in load_file(tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors")
    )
    run("extract", tiny_model, tmp_path / "baked", "--rank", 8, "-o", tmp_path / "again.safetensors")
    again = vl.load_adapter(tmp_path / "again.safetensors")
    fresh = open_base(str(tiny_model))
    apply(fresh, again)
    torch.testing.assert_close(drawn(fresh.pipe.unet), drawn(baked.pipe.unet), rtol=1e-3, atol=1e-4)


def test_baking_takes_the_place_of_a_model_alone(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    """--overwrite deleted whatever folder it was pointed at."""
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "thesis.txt").write_text("x")
    words = ["bake", "auto", str(files / "dog.safetensors"), "-o"]
    with pytest.raises(ConfigError, match=r"holds more than a model \(sub, thesis\.txt\), which would be lost"):
        CliRunner().invoke(app, [*words, str(work), "--overwrite"], catch_exceptions=False)
    assert (work / "thesis.txt").read_text() == "x"
    run(*words, tmp_path / "model")
    before = (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    run("bake", "auto", f"{files / 'dog.safetensors'}:0.5", "-o", tmp_path / "model", "--overwrite")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    (tmp_path / "model" / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds more than a model \(notes\.md\)"):
        CliRunner().invoke(app, [*words, str(tmp_path / "model"), "--overwrite"], catch_exceptions=False)


@pytest.mark.parametrize("verb", ["inspect", "overlap"])
def test_pictures_take_the_place_of_nothing(files: Path, tmp_path: Path, verb: str) -> None:
    words = [verb, str(files / "dog.safetensors"), *([str(files / "ink.safetensors")] if verb == "overlap" else [])]
    before = (files / "dog.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"does not end in \.png, which is what is drawn: write dog\.png"):
        CliRunner().invoke(app, [*words, "--picture", str(files / "dog.safetensors")], catch_exceptions=False)
    assert (files / "dog.safetensors").read_bytes() == before
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(
        ConfigError, match=r"a\.png exists already; name another output, or replace it with --overwrite"
    ):
        CliRunner().invoke(app, [*words, "--picture", str(tmp_path / "a.png")], catch_exceptions=False)
    run(*words, "--picture", tmp_path / "a.png", "--overwrite")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_baked_model_draws_at_the_noise_levels_of_its_adapters(files: Path, tiny_sd2: Path, tmp_path: Path) -> None:
    adapter = vl.load_adapter(files / "dog.safetensors")
    info = {"base": {"id": str(tiny_sd2)}, "training": {"zero_terminal_snr": True, "clip_skip": 2}}
    vl.save_adapter(dataclasses.replace(adapter, info=info), files / "levels.safetensors")
    text = run("bake", tiny_sd2, files / "levels.safetensors", "-o", tmp_path / "baked", "--force")
    assert "--clip-skip 2; diffusers, which counts from 0: clip_skip=1" in text and "nothing but noise" in text
    kept = json.loads((tmp_path / "baked" / "scheduler" / "scheduler_config.json").read_text())
    assert kept["rescale_betas_zero_snr"] is True


def test_extract_from_two_vits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = {"blocks.0.attn.qkv.weight": torch.randn(24, 8), "blocks.0.norm1.weight": torch.ones(8)}
    delta = torch.randn(24, 2) @ torch.randn(2, 8) * 0.1
    after = {
        "blocks.0.attn.qkv.weight": before["blocks.0.attn.qkv.weight"] + delta,
        "blocks.0.norm1.weight": torch.ones(8),
    }
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    output = tmp_path / "c.safetensors"
    text = run("extract", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--energy", 0.999, "-o", output)
    assert "1 modules, rank 2" in text
    torch.testing.assert_close(
        vl.load_adapter(output).delta_weights()["model.blocks.0.attn.qkv"], delta, rtol=1e-3, atol=1e-5
    )


def test_a_baked_model_keeps_no_originals_and_other_adapters_see_the_plain_base(files: Path, tiny_model: Path) -> None:
    from visionlora.lora.merge import bake

    base = open_base(str(tiny_model))
    names = [n for n, _ in base.pipe.unet.named_modules()]
    adapters = [vl.load_adapter(files / f"{n}.safetensors") for n in ("dog", "ink")]
    handles = [h for i, a in enumerate(adapters) for h in apply(base, a, f"a{i}")]
    expected = drawn(base.pipe.unet)
    bake(handles)
    torch.testing.assert_close(drawn(base.pipe.unet), expected, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in base.pipe.unet.named_modules()] == names


REFUSALS = {
    "output exists": (["convert", "dog.safetensors", "ink.safetensors"], "ink.safetensors exists already; name another output"),
    "format": (["convert", "dog.safetensors", "x", "--to", "koya"], "There is no adapter format 'koya'. Did you mean 'kohya'?"),
    "name": (["merge", "dog.safetensors", "-o", "dog-v1.5"], "write dog-v1.5.safetensors, or choose format peft (--to peft)"),
    "name of a pickle": (["convert", "dog.safetensors", "x.bin"], "x.bin does not end in .safetensors, by which programs know "
                         "adapters: write x.safetensors."),
    "name of a file for a folder": (["convert", "dog.safetensors", "x.safetensors", "--to", "peft"], "would be a folder, as "
                                    "PEFT has adapters: write x, or choose another format (--to)."),
    "no file": (["inspect", "nothing.safetensors"], "There is no adapter file at"),
    "scale": (["merge", "dog.safetensors:much", "-o", "x"], "'much' is not a number; write path or path:scale."),
    "scale that is no number": (["merge", "dog.safetensors:nan", "-o", "x"], "a scale must be a finite number, such as 0.8"),
    "picture of several": (["inspect", ".", "--picture", "x"], "--picture is for one adapter, and several are given"),
    "layers of several": (["inspect", "dog.safetensors", "ink.safetensors", "--modules"], "--modules is for one adapter"),
    "merged twice": (["merge", "dog.safetensors", "./dog.safetensors:0.3", "-o", "x.safetensors"], "./dog.safetensors is given "
                     "twice, as dog.safetensors:1 and ./dog.safetensors:0.3: give it once, at the scale that is meant"),
    "baked twice": (["bake", "auto", "dog.safetensors", "dog.safetensors", "-o", "x"], "is given twice"),
    "density of a sum": (["merge", "dog.safetensors", "-o", "x.safetensors", "--density", "0.5"], "changes nothing in 'sum'"),
    "dtype": (["bake", "auto", "dog.safetensors", "-o", "x", "--dtype", "float61"], "Did you mean 'float16'?"),
    "dtype as a precision": (["bake", "auto", "dog.safetensors", "-o", "x", "--dtype", "fp61"], "Did you mean 'fp16'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = REFUSALS[name]
    monkeypatch.chdir(files)
    with pytest.raises(VisionLoRAError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert message in str(caught.value)
    assert not list(files.glob("x*"))


def test_merge_refuses_scales_that_are_not_finite(tmp_path: Path) -> None:
    from visionlora.pipelines.merge import merge

    with pytest.raises(VisionLoRAError, match="The scale of dog is inf; it must be a finite number"):
        merge([("dog", float("inf"))], tmp_path / "x.safetensors")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="limits of files are of Linux")
def test_bake_onto_a_full_disk(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    import resource
    import signal

    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(ModelError, match=r"The model cannot be written to .*baked: .*File too large"):
            vl.bake(str(tiny_model), [str(files / "dog.safetensors")], tmp_path / "out" / "baked")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "out").iterdir())


def test_delta_weights_of_a_method_that_needs_the_base(tiny_model: Path, tmp_path: Path) -> None:
    """The base may be a pipeline."""
    base = open_base(str(tiny_model))
    handle = vl.inject(base.pipe.unet, vl.AdapterConfig(method="dora", rank=2))
    handle.save(tmp_path / "dora.safetensors")
    handle.eject()
    adapter = vl.load_adapter(tmp_path / "dora.safetensors")
    deltas = adapter.delta_weights(base.pipe)
    assert len(deltas) == len(adapter.modules)
    for name, delta in adapter.delta_weights(base.pipe.unet).items():
        assert torch.equal(deltas[name], delta)
    with pytest.raises(TargetError, match=r"The adapter changes unet\..*, which the base has not"):
        adapter.delta_weights(object())


def test_bake_refuses_a_classifier(tmp_path: Path) -> None:
    classifier = Path(__file__).parents[2] / "assets" / "adapters" / "style-classifier"
    with pytest.raises(VisionLoRAError, match=r"style-classifier is a classifier of \d+ classes, .* predict --adapter"):
        CliRunner().invoke(app, ["bake", "auto", str(classifier), "-o", str(tmp_path / "x")], catch_exceptions=False)


def test_overlap_from_python_is_that_of_the_command(files: Path, tmp_path: Path) -> None:
    paths = [files / "dog.safetensors", files / "ink.safetensors"]
    told = json.loads(run("overlap", *paths, "--json"))
    (pair,) = vl.overlap(paths, tmp_path / "o.png")
    assert told == [json.loads(json.dumps(pair.to_dict()))] and (pair.first, pair.second) == ("dog", "ink")
    assert (tmp_path / "o.png").exists()
    assert vl.overlap({"dog": str(paths[0]), "ink": vl.load_adapter(paths[1])}) == [pair]
    for given, said in (([vl.load_adapter(paths[0])], "has no name of its own"), (paths[0], "give at least two")):
        with pytest.raises(ConfigError, match=said):
            vl.overlap(given)


def test_overlap_names_the_file_that_cannot_be_compared(files: Path) -> None:
    classifier = Path(__file__).parents[2] / "assets" / "adapters" / "style-classifier"
    with pytest.raises(VisionLoRAError, match=r"style-classifier: model\.head\.bias was trained in full"):
        CliRunner().invoke(app, ["overlap", str(files / "dog.safetensors"), str(classifier)], catch_exceptions=False)
