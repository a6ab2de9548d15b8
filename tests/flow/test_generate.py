"""`generate` and `show` as a user runs them."""

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import visionlora as vl
from visionlora.cli.generate import lines_of
from visionlora.cli.main import app
from visionlora.diffusion.recipe import SCHEDULERS, Recipe, read_recipe
from visionlora.errors import ConfigError, ModelError
from visionlora.lora.adapter import Adapter, AdapterModule
from visionlora.models.base import open_base

from ..doubles import become_process

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def loras(tiny_model: Path, tmp_path: Path) -> Path:
    return save_loras(tiny_model, tmp_path / "loras")


def save_loras(model: Path, folder: Path) -> Path:
    """Four adapters for a model: two on the UNet, one on a text encoder, and a word of nine vectors, `<rex>`."""
    base = open_base(str(model))
    for seed, name in enumerate(("dog", "ink", "word")):
        part, targets = ("text_encoder", "attn,mlp") if name == "word" else ("unet", "attn,mlp,conv")
        handle = vl.inject(getattr(base.pipe, part), vl.AdapterConfig(rank=2, targets=targets))
        generator = torch.Generator().manual_seed(seed)
        for lora in handle.methods.values():
            lora.lora_B.data = torch.randn(lora.lora_B.shape, generator=generator) * 0.2
        info = {"base": {"id": str(model), "fingerprints": base.fingerprints()}}
        vl.save_adapter(handle.adapter(part, info), folder / f"{name}.safetensors")
        handle.eject()
    widths = {name: encoder.get_input_embeddings().weight.shape[1] for name, _, encoder in base.text_parts()}
    generator = torch.Generator().manual_seed(9)
    vectors = {name: torch.randn(9, width, generator=generator) for name, width in widths.items()}
    vl.save_adapter(Adapter({}, {}, {"<rex>": vectors}), folder / "rex.safetensors")
    return folder


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def pictures(folder: Path) -> None:
    """A picture to start from, and a mask whose right half is white."""
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "start.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(folder / "mask.png")


def save_controlnet(model: Path, folder: Path) -> None:
    """A ControlNet that changes pictures, for a model."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(open_base(str(model)).pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for p in net.parameters():
        p.data += 0.05
    net.save_pretrained(folder)


COMMON = ("--steps", 2, "--width", 32, "--height", 32)
CONTROL = ("--controlnet", "{loras}/net", "--control", "{loras}/start.png")
CASES = {
    "plain": (),
    "two at scales, by block": (
        "--lora",
        "{loras}/dog.safetensors:0.7@up=1.2,mid=0",
        "--lora",
        "{loras}/ink.safetensors:0.4",
    ),
    "by step": (
        "--lora",
        "{loras}/dog.safetensors:0.7@start=0.5,up=2",
        "--lora",
        "{loras}/ink.safetensors@first=1,last=0.2",
    ),
    "switch": ("--lora", "{loras}/dog.safetensors", "--lora", "{loras}/ink.safetensors", "--compose", "switch:tau=1"),
    "composite": ("--lora", "{loras}/dog.safetensors", "--lora", "{loras}/ink.safetensors", "--compose", "composite"),
    "regions": (
        "--lora",
        "{loras}/dog.safetensors",
        "--lora",
        "{loras}/ink.safetensors",
        "--region",
        "dog=0,0,0.5,1",
        "--region",
        "ink={loras}/start.png",
    ),
    "ancestral": ("--scheduler", "euler-a", "--negative-prompt", "a 'quoted' \"cat\"", "--guidance-scale", 3.5),
    "from a picture": ("--init-image", "{loras}/start.png", "--strength", 0.5, "--lora", "{loras}/dog.safetensors"),
    "a part of a picture": ("--init-image", "{loras}/start.png", "--mask", "{loras}/mask.png", "--strength", 0.9),
    "after a control picture": (*CONTROL, "--control-scale", 0.7, "--lora", "{loras}/dog.safetensors"),
    "from a picture, after a control picture": (*CONTROL, "--init-image", "{loras}/start.png"),
    "a part, after a control picture": (*CONTROL, "--init-image", "{loras}/start.png", "--mask", "{loras}/mask.png"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_that_show_prints_draws_the_same_bytes(
    case: str, loras: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pictures(loras)
    if "--controlnet" in CASES[case]:
        save_controlnet(tiny_model, loras / "net")
    extra = [str(w).format(loras=loras) for w in CASES[case]]
    run(
        "generate",
        "--prompt",
        "a dog",
        "--model",
        tiny_model,
        "--seed",
        3,
        *COMMON,
        *extra,
        "--output",
        tmp_path / "one",
    )
    (picture,) = (tmp_path / "one").iterdir()
    printed = run("show", picture).strip().splitlines()[-1]
    words = shlex.split(printed)[1:]
    words[words.index("--output") + 1] = str(tmp_path / "two")
    run(*words)
    (again,) = (tmp_path / "two").iterdir()
    assert again.name == picture.name and again.read_bytes() == picture.read_bytes()


def test_show_says_what_was_let_through(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapter = vl.load_adapter(loras / "dog.safetensors")
    adapter.info["base"]["fingerprints"]["unet"]["weights"] = "0" * 16
    vl.save_adapter(adapter, loras / "other.safetensors")
    lora = ("--lora", loras / "other.safetensors", "--force")
    run("generate", "--prompt", "a dog", "--model", tiny_model, *COMMON, *lora, "--output", tmp_path / "one")
    (picture,) = (tmp_path / "one").iterdir()
    words = shlex.split(run("show", picture).strip().splitlines()[-1])
    assert "--force" in words and "--allow-partial" not in words
    words[words.index("--output") + 1] = str(tmp_path / "two")
    run(*words[1:])
    assert (tmp_path / "two" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("part", ["vae", "net"])
def test_other_weights_at_the_same_place_draw_other_pictures(part: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    pictures(tmp_path)
    save_controlnet(tiny_model, tmp_path / "net")
    control = ("--controlnet", tmp_path / "net", "--control", tmp_path / "start.png") if part == "net" else ()
    words = (
        "generate",
        "--prompt",
        "a dog",
        "--model",
        tmp_path / "model",
        *COMMON,
        *control,
        "--output",
        tmp_path / "o",
    )
    run(*words)
    run(*words)
    (first,) = (tmp_path / "o").iterdir()
    file = next((tmp_path / "net" if part == "net" else tmp_path / "model" / "vae").glob("*.safetensors"))
    save_file({name: value * 1.1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    run(*words)
    (second,) = set((tmp_path / "o").iterdir()) - {first}
    assert second.read_bytes() != first.read_bytes()


def test_adapters_seeds_and_prompts_change_the_picture(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# two\na dog\n\na dog <lora:ink:0.9>\n")
    text = run(
        "generate", "--prompts", tmp_path / "prompts.txt", "--model", tiny_model, "--lora-folder", loras, "--num-images", 2,
        *COMMON, "--output", tmp_path / "out",
    )  # fmt: skip
    assert "4. " in text and "Adapter ink: " in text
    pictures = sorted((tmp_path / "out").iterdir())
    assert len(pictures) == 4 and len({Image.open(p).tobytes() for p in pictures}) == 4
    recipes = [read_recipe(p) for p in pictures]
    assert sorted((r.seed, len(r.loras)) for r in recipes) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [u.hash for r in recipes for u in r.loras] == [
        vl.inspect_file(loras / "ink.safetensors").hashes["AutoV3"]
    ] * 2


def test_a_file_of_prompts_from_a_windows_editor(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a dog\r\na cat\r\n".encode("utf-8-sig"))
    assert lines_of(tmp_path / "prompts.txt") == ["a dog", "a cat"]


def test_an_interrupted_run_goes_on_where_it_stopped(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = (
        "generate",
        "--prompt",
        "a dog",
        "--prompt",
        "a cat",
        "--model",
        tiny_model,
        *COMMON,
        "--output",
        tmp_path / "out",
    )
    run(*words)
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    next(p for p in (tmp_path / "out").iterdir() if "cat" in p.name).unlink()
    text = run(*words)
    assert text.count("(was there already)") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


def test_processes_share_the_pictures(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for the others' pictures and tells of all."""
    words = ("generate", "--prompt", "a dog", "--num-images", 3, "--model", tiny_model, *COMMON, "--output")
    alone = run(*words, tmp_path / "alone")
    become_process(monkeypatch, 0)
    out, waits = tmp_path / "out", []

    def other(seconds: float) -> None:
        waits.append({read_recipe(p).seed for p in out.iterdir()})
        become_process(monkeypatch, 1)
        assert run(*words, out) == ""
        become_process(monkeypatch, 0)

    monkeypatch.setattr(time, "sleep", other)
    text = run(*words, out)
    assert waits == [{0, 2}]
    assert text.splitlines()[-3:] == [line.replace("alone", "out") for line in alone.splitlines()[-3:]]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()
    }


TOGETHER = {
    "tags": ("--num-images", 2, "--prompt", "a cat <lora:dog:0.5>", "--prompt", "a dog <lora:ink:1>"),
    "text encoders": ("--prompt", "a cat <lora:word:2>", "--prompt", "a dog <lora:word:1><lora:ink:0.5>"),
    "text encoders read earlier": (
        "--clip-skip", 2, "--negative-prompt", "a hat", "--prompt", "a cat <lora:word:2>", "--prompt", "a pen <lora:word:1>",
    ),
    "a word that makes a prompt too long": (
        "--lora", "{loras}/rex.safetensors", "--prompt", "a b c d e f g h <rex>", "--prompt", "z <rex>",
    ),
    "blocks and steps": ("--lora", "{loras}/ink.safetensors:0.7@start=0.5,up=2", "--prompt", "a cat <lora:dog:0.5>"),
    "one composition": (
        "--lora", "{loras}/ink.safetensors", "--lora", "{loras}/dog.safetensors", "--compose", "composite", "--num-images", 2,
    ),
    "weighted words": ("--prompt", "a (red:1.3) dog", "--num-images", 2),
    "a part of a picture": (
        "--init-image", "{loras}/start.png", "--mask", "{loras}/mask.png", "--num-images", 2, "--scheduler", "euler-a",
    ),
    "after a control picture": (*CONTROL, "--prompt", "a cat <lora:ink>", "--lora", "{loras}/dog.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("model", ["tiny_model", "tiny_xl"])
@pytest.mark.parametrize("case", TOGETHER)
def test_pictures_drawn_together_are_as_drawn_alone(
    case: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    if "--clip-skip" in TOGETHER[case] and model == "tiny_xl":
        pytest.skip("read before the last layer anyway")
    loras = save_loras(folder, tmp_path / "loras")
    pictures(loras)
    if "--controlnet" in TOGETHER[case]:
        save_controlnet(folder, loras / "net")
    extra = [str(w).format(loras=loras) for w in TOGETHER[case]]
    for size in (1, 3):
        run("generate", "--prompt", "a dog", "--model", folder, "--lora-folder", loras, *COMMON,
             *extra, "--batch-size", size, "--output", tmp_path / str(size))  # fmt: skip
    alone, together = (sorted((tmp_path / str(size)).iterdir()) for size in (1, 3))
    assert [p.name for p in alone] == [p.name for p in together] and len(alone) > 1
    assert max(read_recipe(p).batch_size for p in together) > 1
    pixels = [[np.asarray(Image.open(p), dtype=int) for p in group] for group in (alone, together)]
    assert max(abs(a - b).max() for a, b in zip(*pixels, strict=True)) <= 1, "rounding alone"
    assert all((a != b).any() for a, b in itertools.pairwise(pixels[0]))
    told = run("show", next(p for p in together if read_recipe(p).batch_size > 1))
    assert "alone, as by this command, values may round otherwise" in told


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("MPS backend out of memory (…)")])
def test_a_batch_that_does_not_fit_is_halved(
    error: RuntimeError, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionlora.pipelines import drawing

    draw, sizes = drawing.draw_batch, []

    def small(pipe: object, batch: list[object], given: object) -> list[Image.Image]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise error
        return draw(pipe, batch, given)

    monkeypatch.setattr(drawing, "draw_batch", small)
    words = ("generate", "--prompt", "a dog", "--num-images", 5, "--model", tiny_model, *COMMON)
    told = run(*words, "--batch-size", 5, "--output", tmp_path)
    assert sizes == [5, 2, 3, 1, 2] and len(list(tmp_path.iterdir())) == 5
    assert "A batch of 5 pictures does not fit into memory: drawing 2 at a time." in told


CLASSIFIER = Path(__file__).parents[2] / "assets" / "adapters" / "style-classifier"
REFUSALS = {
    "no prompt": ((), "There is no prompt: --prompt TEXT, or --prompts FILE with one per line."),
    "unknown tag": (("--prompt", "<lora:dg:1>", "--lora-folder", "{loras}"), "names an adapter 'dg', which is not there. Did"),
    "classifier": (("--prompt", "a", "--lora", CLASSIFIER), "style-classifier is a classifier of"),
    "no file": (("--prompt", "a", "--lora", "{loras}/nothing.safetensors"), "There is no adapter file at"),
    "size": (("--prompt", "a", "--width", 33), "A resolution of 33 px does not fit"),
    "no width": (("--prompt", "a", "--width", 0), "width is 0; it must be at least 1 px."),
    "compose": (("--prompt", "a", "--lora", "{loras}/dog.safetensors", "--compose", "swich"), "Did you mean 'switch'?"),
    "compose of nothing": (("--prompt", "a", "--compose", "foo"), "There is no composition 'foo'."),
    "tau": (("--prompt", "a", "--compose", "switch:tau=nan"), "'tau=nan' is no name=number"),
    "block": (("--prompt", "a", "--lora", "{loras}/dog.safetensors:1@dwn=1"), "No adapted layer is in block 'dwn'."),
    "region": (
        ("--prompt", "a", "--lora", "{loras}/dog.safetensors", "--region", "dg=0,0,1,1"),
        "There is a region for 'dg', which is not attached. Did you mean 'dog'?",
    ),
    "region and switch": (
        ("--prompt", "a", "--region", "dog=0,0,1,1", "--compose", "switch"), "--region and --compose switch do not go together",
    ),
    "two regions": (
        ("--prompt", "a", "--lora", "{loras}/dog.safetensors", "--region", "dog=0,0,1,1", "--region", "dog=0,0,.5,1"),
        "--region dog=0,0,.5,1: dog has a region already; each adapter has one.",
    ),
    "nearly a file": (
        ("--prompt", "a", "--lora", "{loras}/dogg.safetensors"), "dogg.safetensors. Did you mean {loras}/dog.safetensors?",
    ),
    "no region": (("--prompt", "a", "--region", "dog"), "A region is written adapter=left,top,right,bottom"),
    "start": (("--prompt", "a", "--init-image", "{loras}/none.png"), "The picture to start from cannot be read"),
    "number": (("--prompt", "a", "--num-images", 0), "num_images is 0; it must be at least 1."),
    "batch": (("--prompt", "a", "--batch-size", 0), "batch_size is 0; it must be at least 1."),
    "output is a file": (("--prompt", "a", "--model", "none", "--output", "{loras}/ink.safetensors"), "is a file; name a"),
    "output in a file": (
        ("--prompt", "a", "--model", "none", "--output", "{loras}/dog.safetensors/x"), "dog.safetensors is a file. Choose an",
    ),
    "prompts": (("--prompts", "{loras}/none.txt"), "The prompts cannot be read: There is no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_draw_nothing(name: str, loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    extra, message = REFUSALS[name]
    words = [
        "generate",
        "--model",
        tiny_model,
        "--output",
        tmp_path / "out",
        *(str(w).format(loras=loras) for w in extra),
    ]
    with pytest.raises(vl.VisionLoRAError) as caught:
        CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert message.format(loras=loras) in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_step_is_enough_for_a_picture(scheduler: str, tmp_path: Path) -> None:
    run("generate", "--prompt", "a dog", "--model", "emoji-64", "--steps", 1, "--width", 32, "--scheduler", scheduler,
        "--output", tmp_path)  # fmt: skip
    (file,) = tmp_path.iterdir()
    with Image.open(file) as picture:
        assert len(picture.getcolors(32 * 32) or ()) > 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_outside_of_the_mask_the_picture_stays(scheduler: str, tiny_model: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    run("generate", "--prompt", "a dog", "--model", tiny_model, *COMMON, "--init-image", tmp_path / "start.png", "--mask",
        tmp_path / "mask.png", "--strength", 1, "--scheduler", scheduler, "--steps", 5,
        "--output", tmp_path / "out")  # fmt: skip
    check_halves(tmp_path)


def test_a_part_of_a_picture_by_a_model_with_latents_of_its_own_kind(tmp_path: Path) -> None:
    pictures(tmp_path)
    run("generate", "--prompt", "a dog", "--model", "emoji-64", "--steps", 2, "--width", 32, "--init-image",
        tmp_path / "start.png", "--mask", tmp_path / "mask.png", "--output", tmp_path / "out")  # fmt: skip
    check_halves(tmp_path)


def check_halves(folder: Path) -> None:
    """The picture that was drawn is the start on the left, which the mask leaves alone, and another on the right."""
    (file,) = (folder / "out").iterdir()
    with Image.open(file) as drawn, Image.open(folder / "start.png") as start:
        left, right = (0, 0, 16, 32), (16, 0, 32, 32)
        assert drawn.crop(left).tobytes() == start.crop(left).tobytes()
        assert drawn.crop(right).tobytes() != start.crop(right).tobytes()


@pytest.mark.parametrize("task", ["text", "picture", "mask"])
def test_a_control_picture_steers_sdxl_too(task: str, tiny_xl: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    save_controlnet(tiny_xl, tmp_path / "net")
    start = () if task == "text" else ("--init-image", tmp_path / "start.png", "--strength", 1)
    start += ("--mask", tmp_path / "mask.png") if task == "mask" else ()
    drawn = []
    for scale in (0, 1):
        run("generate", "--prompt", "a dog", "--model", tiny_xl, *COMMON, *start, "--controlnet", tmp_path / "net",
            "--control", tmp_path / "start.png", "--control-scale", scale, "--output", tmp_path / str(scale))  # fmt: skip
        (file,) = (tmp_path / str(scale)).iterdir()
        with Image.open(file) as picture:
            drawn.append(picture.tobytes())
    assert drawn[0] != drawn[1]


def test_pictures_that_do_not_go_together(tiny_model: Path, tiny_xl: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    start, mask, small, lost = (tmp_path / f"{name}.png" for name in ("start", "mask", "small", "lost"))
    save_controlnet(tiny_xl, tmp_path / "net")
    for words, said in (
        (("--mask", mask), "give the picture with --init-image"),
        (("--control", start), "A picture to follow needs a ControlNet"),
        (("--controlnet", tmp_path / "net"), "A ControlNet needs a picture to follow"),
        (("--strength", 0.5), "strength is 0.5, which means nothing without --init-image"),
        (("--control-scale", 0.5), "control_scale is 0.5, which means nothing without --controlnet"),
        (("--init-image", start, "--mask", small), "small.png and the picture differ in size: 16x16 and 32x32 px"),
        (("--init-image", start, "--mask", lost), "The mask cannot be read"),
        (("--controlnet", tmp_path / "net", "--control", lost), "The picture to follow cannot be read"),
        (("--controlnet", tmp_path / "net", "--control", start), "reads text 40 wide, the UNet of"),
        (("--controlnet", tmp_path / "none", "--control", start), "none cannot be opened"),
        (("--controlnet", tmp_path / "net", "--control", start, "--control-scale", -1), "control_scale is -1.0"),
    ):
        words = ("generate", "--prompt", "a dog", "--model", tiny_model, *COMMON, *words, "--output", tmp_path / "out")
        with pytest.raises(vl.VisionLoRAError, match=re.escape(said)):
            run(*words)
        assert not list((tmp_path / "out").glob("*"))


def test_a_base_that_the_adapter_names_was_not_chosen(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    told = run("generate", "--prompt", "a", "--lora", loras / "dog.safetensors", *COMMON, "--output", tmp_path)
    assert f"Base model: {tiny_model}, which the adapter names. Choose with --model." in told


def test_adapters_of_one_name_and_tags_that_are_none(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    paths = []
    for run_name in ("a", "b", "c"):
        folder = tmp_path / run_name / "checkpoints"
        folder.mkdir(parents=True)
        paths.append(folder / "best.safetensors")
        paths[-1].write_bytes((loras / ("dog.safetensors" if run_name == "a" else "ink.safetensors")).read_bytes())
    words = [word for path in paths for word in ("--lora", path)]
    run("generate", "--model", tiny_model, "--prompt", "a", *words, "--steps", 1, "--output", tmp_path / "o")
    (picture,) = (tmp_path / "o").iterdir()
    assert [u.name for u in read_recipe(picture).loras] == ["best", "checkpoints/best", "checkpoints/best-2"]
    for tag in ("<lora:ink:0.8:0.5>", "<lora:ink:0.8", "<lora:>"):
        with pytest.raises(vl.VisionLoRAError, match="is not understood: a tag is <lora:name:scale>"):
            run("generate", "--model", tiny_model, "--prompt", f"a {tag}", "--steps", 1, "--output", tmp_path / "p")


def test_half_precision_and_devices(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", tiny_model, "--prompt", "a", "--lora", loras / "dog.safetensors", "--steps", 2)
    run(*words, "--precision", "bf16", "--device", "cpu", "--output", tmp_path / "half")
    run(*words, "--output", tmp_path / "whole")
    (half,), (whole,) = ((tmp_path / name).iterdir() for name in ("half", "whole"))
    recipe = read_recipe(half)
    assert recipe.precision == "bf16" and read_recipe(whole).precision == "fp32" and half.name != whole.name
    pixels = [np.asarray(Image.open(p), dtype=float) for p in (half, whole)]
    assert 0 < np.abs(pixels[0] - pixels[1]).mean() < 20
    run(*shlex.split(recipe.command(str(tmp_path / "again")))[1:])
    assert (tmp_path / "again" / half.name).read_bytes() == half.read_bytes()
    for more, message in (
        (("--device", "meta"), "device is 'meta'; it must be auto, cpu, mps, xpu or cuda"),
        (("--device", "gpu"), "device is 'gpu'; it must be auto, cpu, mps, xpu or cuda"),
        (("--device", "cuda"), "there is no GPU that torch can use. Take cpu."),
        (("--precision", "fp16"), "precision is 'fp16', which a CPU has no fast kernels for"),
        (("--precision", "fp61"), "precision is 'fp61'. Did you mean 'fp16'?"),
    ):
        with pytest.raises(vl.VisionLoRAError) as caught:
            run(*words, *more, "--output", tmp_path / "no")
        assert message in str(caught.value)


def test_another_mask_of_a_region_is_another_picture(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Under the same name: it must not be taken for the picture that is there already."""
    pictures(tmp_path)
    words = ("generate", "--model", tiny_model, "--prompt", "a", "--lora", loras / "dog.safetensors", "--steps", 1,
             "--region", f"dog={tmp_path / 'mask.png'}", "--output", tmp_path / "o")  # fmt: skip
    run(*words)
    assert "was there already" in run(*words)
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    assert "was there already" not in run(*words) and len(list((tmp_path / "o").iterdir())) == 2


@pytest.mark.parametrize("kind", ["header", "peft"])
def test_another_scale_of_the_same_tensors_is_another_picture(
    kind: str, loras: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It stands in the header of the file, or in PEFT's config beside it."""
    adapter = vl.load_adapter(loras / "dog.safetensors")
    path = loras / ("again.safetensors" if kind == "header" else "again")
    vl.save_adapter(adapter, path, "visionlora" if kind == "header" else "peft")
    words = ("generate", "--model", tiny_model, "--prompt", "a", "--lora", path, *COMMON, "--output", tmp_path / "o")
    run(*words)
    assert "was there already" in run(*words)
    (first,) = (tmp_path / "o").iterdir()
    if kind == "header":
        stronger = {name: replace(m, alpha=m.alpha * 4) for name, m in adapter.modules.items()}
        vl.save_adapter(replace(adapter, modules=stronger), path)
    else:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 4}))
    assert "was there already" not in run(*words)
    (second,) = set((tmp_path / "o").iterdir()) - {first}
    uses = [read_recipe(p).loras[0] for p in (first, second)]
    assert uses[0].hash == uses[1].hash and uses[0].file_hash != uses[1].file_hash
    assert Image.open(first).tobytes() != Image.open(second).tobytes()


def test_what_one_adapter_was_trained_with_is_not_for_the_pictures_of_others(tiny_sd2: Path, tmp_path: Path) -> None:
    loras = save_loras(tiny_sd2, tmp_path / "loras")
    adapter = vl.load_adapter(loras / "dog.safetensors")
    training = {"zero_terminal_snr": True, "clip_skip": 2}
    vl.save_adapter(replace(adapter, info={**adapter.info, "training": training}), loras / "trained.safetensors")
    words = ("generate", "--model", tiny_sd2, "--lora-folder", loras, *COMMON, "--prompt", "a cat")
    run(*words, "--output", tmp_path / "alone")
    run(*words, "--prompt", "a dog <lora:trained:1>", "--output", tmp_path / "both")
    (alone,) = (tmp_path / "alone").iterdir()
    assert (tmp_path / "both" / alone.name).read_bytes() == alone.read_bytes()
    (other,) = set((tmp_path / "both").iterdir()) - {tmp_path / "both" / alone.name}
    assert read_recipe(other).zero_terminal_snr and read_recipe(other).clip_skip == 2
    run(*words, "--prompt", "a <lora:trained:1> <lora:ink:1>", "--output", tmp_path / "silent")
    (mixed,) = (r for r in map(read_recipe, (tmp_path / "silent").iterdir()) if r.loras)
    assert mixed.clip_skip == 2, "an adapter that says nothing of its training has no say"
    ink = vl.load_adapter(loras / "ink.safetensors")
    vl.save_adapter(replace(ink, info={**ink.info, "training": {"steps": 5}}), loras / "plain.safetensors")
    with pytest.raises(vl.VisionLoRAError, match=r"trained with clip_skip 2 \(.*\), 1 \(.*\): choose with --clip-skip"):
        run(*words, "--prompt", "a <lora:trained:1> <lora:plain:1>", "--output", tmp_path / "none")


def test_numbers_and_masks_from_python_are_those_of_the_command(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    regions = {"dog": tmp_path / "mask.png", "ink": (0, 0, 1, 1)}
    config = vl.GenerateConfig(
        ["a dog"], [(str(loras / "dog.safetensors"), 1, {}), (str(loras / "ink.safetensors"), 1, {"up": 2})],
        model=str(tiny_model), steps=2, width=32, height=32, guidance_scale=3, compose="regional",
        compose_options=(("regions", regions),), output=tmp_path / "one",
    )  # fmt: skip
    (drawn,) = vl.generate(config)
    run(*shlex.split(drawn.recipe.command(str(tmp_path / "two")))[1:])
    assert (tmp_path / "two" / drawn.path.name).read_bytes() == drawn.path.read_bytes()


def test_pictures_have_the_shape_of_the_one_they_start_from(tiny_model: Path, tmp_path: Path) -> None:
    Image.effect_noise((96, 32), 80).convert("RGB").save(tmp_path / "wide.png")
    run("generate", "--model", tiny_model, "--prompt", "a", "--init-image", tmp_path / "wide.png", "--steps", 2,
        "--output", tmp_path / "o")  # fmt: skip
    (file,) = (tmp_path / "o").iterdir()
    assert Image.open(file).size == (56, 16)


def test_settings_of_python_are_taken_as_they_are_meant(tmp_path: Path) -> None:
    config = vl.GenerateConfig(
        "a dog", ["ink:0.8@up=1.5", Path("dog"), ("cat", 0.5), ("hen", 1.0, {"mid": 0.0})], lora_folder="loras",
        init_image="x.png", mask="m.png", output="out",
    )  # fmt: skip
    assert list(config.prompts) == ["a dog"] and config.init_image == Path("x.png") and config.mask == Path("m.png")
    assert config.lora_folder / "a" == Path("loras/a") and config.output == Path("out")
    expected = [("ink", 0.8, {"up": 1.5}), ("dog", 1.0, {}), ("cat", 0.5, {}), ("hen", 1.0, {"mid": 0.0})]
    assert list(config.loras) == expected
    assert dataclasses.replace(config, seed=1).loras == config.loras
    with pytest.raises(vl.VisionLoRAError, match=r"loras has 0\.8, which is no adapter: write each as a path"):
        vl.GenerateConfig(["a dog"], ("dog", 0.8))
    with pytest.raises(vl.VisionLoRAError, match=r"There is nothing at .*x\.png"):
        vl.predict(tmp_path, str(tmp_path / "x.png"))


def test_another_picture_under_the_same_key_is_not_taken_for_it(tiny_model: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", tiny_model, *COMMON)
    for name, prompt in (("one", "a dog"), ("two", "a cat")):
        run(*words, "--prompt", prompt, "--output", tmp_path / name)
    (dog,), (cat,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    pixels = cat.read_bytes()
    shutil.copy(dog, cat)
    told = run(*words, "--prompt", "a cat", "--output", tmp_path / "two")
    (again,) = set((tmp_path / "two").iterdir()) - {cat}
    assert "was there already" not in told and again.read_bytes() == pixels
    assert again.stem.startswith(cat.stem) and len(again.stem) == len(cat.stem) + 8
    assert "was there already" in run(*words, "--prompt", "a cat", "--output", tmp_path / "two")
    with Image.open(again) as picture:
        picture.save(cat)  # without its recipe
    assert str(cat) in run(*words, "--prompt", "a cat", "--output", tmp_path / "two"), (
        "whatever the user made of it stays"
    )


def test_two_pictures_of_a_run_under_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from visionlora.pipelines.drawing import places_of

    digest = Recipe.digest.fget
    monkeypatch.setattr(Recipe, "digest", property(lambda recipe: "0" * 8 + digest(recipe)[8:]))
    recipes = [Recipe("a dog", "m", 8, 8, steps=steps) for steps in (3, 4, 3)]
    first, second, third = places_of(recipes, tmp_path)
    assert first == third == tmp_path / "a-dog-0-00000000.png" and second == tmp_path / recipes[1].named(16)


def test_a_merged_adapter_has_no_say_in_clip_skip_where_its_parts_differed() -> None:
    from visionlora.pipelines.generate import clip_skip_of

    def told(**training: object) -> Adapter:
        lora = AdapterModule.lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        return Adapter({"unet.to_q": lora}, info={"training": training})

    config = vl.GenerateConfig("a dog")
    first, second = told(clip_skip=2, zero_terminal_snr=True), told(steps=1)
    merged = vl.merge_adapters([(first, 1.0), (second, 1.0)]).adapter
    assert merged.zero_terminal_snr and clip_skip_of(config, {"m": merged, "e": told(clip_skip=2)}) == 2
    with pytest.raises(ConfigError, match=r"trained with clip_skip 2 .* 1 "):
        clip_skip_of(config, {"a": first, "b": second})


def test_no_negative_prompt_may_be_none() -> None:
    assert vl.GenerateConfig("a dog", negative_prompt=None).negative_prompt == ""


def test_a_model_that_is_gone_does_not_pass_for_one_of_the_hub_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slash in its name it looks like owner/name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "models/sd15")
    words = ("generate", "--prompt", "a dog", "--model", "models/sd15", *COMMON, "--output")
    run(*words, "out")
    (picture,) = Path("out").iterdir()
    assert not vl.show(picture).changed
    shutil.rmtree("models/sd15")
    said = "The folder models is here, but has no sd15; perhaps it is a model of the Hub."
    assert vl.show(picture).changed == (f"models/sd15 is not here. {said}",)
    with pytest.raises(ModelError, match=f"The model models/sd15 cannot be opened: {said}"):
        run(*words, "again")
    Path("models").rmdir()
    assert not vl.show(picture).changed
    with pytest.raises(ModelError) as caught:
        run(*words, "again")
    assert "The folder" not in str(caught.value)


def test_show_says_what_is_no_longer_the_same(loras: Path, tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    adapter, start, out = tmp_path / "c.safetensors", tmp_path / "start.png", tmp_path / "out"
    shutil.copy(loras / "dog.safetensors", adapter)
    shutil.copy(dogs / "0.png", start)
    run(
        "generate", "--prompt", "a dog", "--model", tiny_model, *COMMON, "--lora", adapter, "--init-image", start,
        "--output", out,
    )  # fmt: skip
    (picture,) = out.iterdir()
    assert "is not here" not in run("show", picture) and "other contents" not in run("show", picture)
    shown = vl.show(str(picture))
    assert run("show", picture) == f"{shown}\n" and not shown.changed
    assert shown.command == read_recipe(picture).command() and str(shown).endswith(shown.command)
    shutil.copy(loras / "ink.safetensors", adapter)
    start.unlink()
    told = run("show", picture)
    assert f"{adapter} has other contents than when the picture was drawn. The command draws another picture" in told
    assert f"{start} is not here." in told and f"{start} is not here." in vl.show(picture).changed


def test_a_learned_word_that_is_not_in_the_file_is_missed(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    """As after convert --to diffusers, which writes it beside; the prompt's word then meant nothing, without a word."""
    dog, rex = (vl.load_adapter(loras / f"{name}.safetensors") for name in ("dog", "rex"))
    vl.save_adapter(replace(dog, embeddings=rex.embeddings), whole := tmp_path / "whole.safetensors")
    vl.convert(whole, alone := tmp_path / "alone.safetensors", to="diffusers")
    asked = ("generate", "--model", tiny_model, *COMMON, "--output", tmp_path / "out", "--lora", alone)
    said = f"{alone} was trained with the word <rex>, whose vectors are not in it"
    assert said in run(*asked, "--prompt", "a <rex>")
    assert said not in run(*asked, "--prompt", "a dog")
    assert said not in run(*asked, "--prompt", "a <rex>", "--lora", loras / "rex.safetensors")


def test_show_knows_models_and_masks_of_regions(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of which it said nothing."""
    model, mask, out = tmp_path / "base", tmp_path / "left.png", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    Image.new("L", (8, 8), 255).save(mask)
    run(
        "generate", "--prompt", "a dog", "--model", model, *COMMON, "--lora", loras / "dog.safetensors",
        "--region", f"dog={mask}", "--output", out,
    )  # fmt: skip
    (picture,) = out.iterdir()
    assert not vl.show(picture).changed
    Image.new("L", (8, 8), 9).save(mask)
    assert vl.show(picture).changed == (f"{mask} has other contents than when the picture was drawn.",)
    mask.unlink()
    shutil.rmtree(model)
    assert vl.show(picture).changed == (f"{model} is not here.", f"{mask} is not here.")


def test_a_file_that_is_given_twice_is_refused(loras: Path, tmp_path: Path) -> None:
    from visionlora.diffusion.uses import uses_of

    (tmp_path / "other").symlink_to(loras)
    first, again = f"{loras}/dog.safetensors", f"{tmp_path}/other/dog.safetensors"
    with pytest.raises(ConfigError) as caught:
        vl.generate(vl.GenerateConfig("a dog", loras=[first, (again, 0.3, {"up": 0.5})], output=tmp_path / "out"))
    assert str(caught.value) == (
        f"The adapter {again} is given twice, as {first}:1 and {again}:0.3@up=0.5: give it once, at the scale that is meant, "
        f"such as {again}:0.3@up=0.5."
    )
    shutil.copy(first, tmp_path / "dog.safetensors")
    two = uses_of("a dog", vl.GenerateConfig("a dog", loras=[first, str(tmp_path / "dog.safetensors")]))
    assert len({use.name for use in two}) == 2, "other files may have one name"
    (tagged,) = uses_of("a dog <lora:dog:0.2>", vl.GenerateConfig("a dog", loras=[first], lora_folder=loras))
    assert tagged.scale == 0.2, "a tag sets the scale of what the command gives"


@pytest.mark.parametrize("verb", ["generate", "grid"])
def test_ctrl_c_says_how_far_it_came(
    verb: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionlora.pipelines import drawing

    draw, calls = drawing.draw_batch, []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr(drawing, "draw_batch", interrupted)
    several = ("--num-images", 3) if verb == "generate" else ("--x", "seed=0..2")
    words = (
        verb,
        "--model",
        tiny_model,
        *COMMON,
        "--prompt",
        "a dog",
        "--batch-size",
        1,
        *several,
        "--output",
        tmp_path,
    )
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 130
    assert "Interrupted with 1 of 3 pictures drawn. The same command goes on with the others." in result.output
    run(*words)
    assert len(calls) == 4, "two, of which one was cut off, and the two others"
    calls[:] = calls[:1]
    become_process(monkeypatch, 1)
    again = CliRunner().invoke(app, [str(w) for w in (*words, "--guidance-scale", 3)])
    assert again.exit_code == 130 and "Interrupted" not in again.output, "in a launch the first process speaks"
