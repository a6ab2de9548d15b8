"""`grid` as a user runs it."""

import base64
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
from visionlora.pipelines import drawing

import visionlora as vl
from visionlora.cli import grid as command
from visionlora.diffusion.axes import NUMBERS, WORDS, Axis, cell_of, parse_axis
from visionlora.diffusion.recipe import Recipe, read_recipe
from visionlora.errors import ConfigError

from ..doubles import become_process
from .test_generate import COMMON, loras, pictures, run, save_controlnet, save_loras

pytestmark = pytest.mark.filterwarnings("ignore")
assert loras  # a fixture


def test_every_combination_labelled_and_on_one_page(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "grid", "--model", tiny_model, *COMMON, "--lora", f"{loras}/dog.safetensors", "--lora", f"{loras}/ink.safetensors:0.5",
        "--x", "lora:dog.scale=0,1", "--y", "prompt=a dog|a cat, black", "--axis", "compose=sum,switch:tau=1", "--output", out,
    )  # fmt: skip
    text = run(*words)
    assert "8 pictures" in text and "grid-2.png" in text
    recipes = [read_recipe(p) for p in (out / "cells").iterdir()]
    seen = {(r.prompt, r.loras[0].scale, r.compose) for r in recipes}
    assert len(recipes) == len(seen) == 8 and ("a cat, black", 1.0, "switch") in seen
    page = (out / "index.html").read_text()
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert {base64.b64decode(f) for f in found} == {p.read_bytes() for p in (out / "cells").iterdir()}
    assert (
        not re.search(r'http://|@import|<link|src="(?!data:)', page)
        and "a cat, black" in page
        and "visionlora generate" in page
    )
    assert Image.open(out / "grid-1.png").width > 256
    assert "8 pictures, 8 of them there already" in run(*words), "nothing is drawn twice"
    grown = [w if w != "lora:dog.scale=0,1" else "lora:dog.scale=0,0.5,1" for w in words]
    assert "12 pictures, 8 of them there already" in run(*grown), "a grid can grow"


def test_what_is_told_while_cells_are_drawn(
    loras: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was kept silent, with the line on batches that do not fit."""
    draw = drawing.draw_batch

    def small(pipe: object, batch: list[object], given: object) -> list[Image.Image]:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("no room")
        return draw(pipe, batch, given)

    monkeypatch.setattr(drawing, "draw_batch", small)
    told = run(
        "grid", "--model", tiny_model, *COMMON, "--lora", f"{loras}/dog.safetensors", "--x", "lora:dog.scale=0.5,1",
        "--prompt", "a dog", "--y", "seed=0,1", "--batch-size", 2, "--output", tmp_path / "out",
    )  # fmt: skip
    assert "A batch of 2 pictures does not fit into memory: drawing 1 at a time." in told
    assert told.count("Adapter dog: ") == 1, "once, however often its scale changes"


def test_files_blocks_and_seeds_as_axes(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    run(
        "grid", "--model", tiny_model, *COMMON, "--prompt", "a dog", "--lora", f"{loras}/dog.safetensors",
        "--x", f"lora:dog.file={loras}/dog.safetensors,{loras}/ink.safetensors", "--y", "lora:dog.up=0,1", "--z", "seed=1..2",
        "--output", tmp_path / "out",
    )  # fmt: skip
    recipes = [read_recipe(p) for p in (tmp_path / "out" / "cells").iterdir()]
    assert {(Path(r.loras[0].path).stem, r.loras[0].blocks["up"], r.seed) for r in recipes} == {
        (name, up, seed) for name in ("dog", "ink") for up in (0.0, 1.0) for seed in (1, 2)
    }
    assert len({r.loras[0].hash for r in recipes}) == 2


def test_how_far_the_text_is_read_as_an_axis(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = ("--model", tiny_model, *COMMON, "--prompt", "a dog", "--lora", f"{loras}/dog.safetensors")
    run("grid", *words, "--x", "clip-skip=1,2", "--output", tmp_path / "out")
    cells = {read_recipe(p).clip_skip: p for p in (tmp_path / "out" / "cells").iterdir()}
    assert set(cells) == {1, 2}
    for clip_skip, cell in cells.items():
        run("generate", *words, "--clip-skip", clip_skip, "--output", tmp_path / str(clip_skip))
        (alone,) = (tmp_path / str(clip_skip)).iterdir()
        assert alone.read_bytes() == cell.read_bytes()
    assert cells[1].read_bytes() != cells[2].read_bytes()
    run("grid", *words, "--clip-skip", 2, "--x", "seed=1,2", "--output", tmp_path / "both")
    assert "clip skip 2" in re.findall("<p>(.*?)</p>", (tmp_path / "both" / "index.html").read_text())[0]
    with pytest.raises(vl.VisionLoRAError, match="clip_skip is 9; the text encoder of"):
        run("grid", *words, "--x", "clip-skip=1,9", "--output", tmp_path / "none")


def test_base_models_as_an_axis(tiny_model: Path, tmp_path: Path) -> None:
    """Each cell is what its own command draws."""
    from diffusers import StableDiffusionPipeline

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    pipe = StableDiffusionPipeline.from_pretrained(other)
    pipe.unet.conv_out.weight.data *= 0.5
    pipe.save_pretrained(other)
    loras = save_loras(tiny_model, tmp_path / "loras")
    words = (*COMMON, "--prompt", "a dog", "--lora", f"{loras}/dog.safetensors", "--force", "--batch-size", 1)
    axes = ("--x", "lora:dog.scale=0,1", "--y", f"model={tiny_model}|{other}")
    told = run("grid", *words, *axes, "--output", tmp_path / "out")
    assert told.count("Base model: ") == 2
    cells = {p: read_recipe(p) for p in (tmp_path / "out" / "cells").iterdir()}
    assert {(r.model, r.loras[0].scale) for r in cells.values()} == {
        (str(model), scale) for model in (tiny_model, other) for scale in (0, 1)
    }
    assert len({p.read_bytes() for p in cells}) == 4
    for path, recipe in cells.items():
        run(*shlex.split(recipe.command(str(tmp_path / "alone")))[1:])
        assert (tmp_path / "alone" / path.name).read_bytes() == path.read_bytes()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "model other" in page and f"model {tiny_model.name}" in page
    cell = max(cells, key=lambda p: cells[p].model)
    before = cell.read_bytes()
    cell.unlink()
    assert "3 of them there already" in run("grid", *words, *axes, "--output", tmp_path / "out")
    assert cell.read_bytes() == before
    for refused, said in (
        (("--model", tiny_model, *axes), f"--model {tiny_model} and an axis 'model' do not go together: leave one"),
        (("--x", f"model={other}|{other}/"), "which are one: leave one of them out"),
    ):
        with pytest.raises(vl.VisionLoRAError, match=said):
            run("grid", *words, *refused, "--output", tmp_path / "none")


def test_precisions_as_an_axis(tiny_model: Path, tmp_path: Path) -> None:
    loras = save_loras(tiny_model, tmp_path / "loras")
    words = (
        "--model",
        tiny_model,
        *COMMON,
        "--prompt",
        "a dog",
        "--lora",
        f"{loras}/dog.safetensors",
        "--batch-size",
        1,
    )
    axes = ("--x", "precision=fp32,bf16", "--y", "lora:dog.scale=0,1")
    run("grid", *words, *axes, "--output", tmp_path / "out")
    cells = {p: read_recipe(p) for p in (tmp_path / "out" / "cells").iterdir()}
    assert {(r.precision, r.loras[0].scale) for r in cells.values()} == {
        ("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1)
    }  # fmt: skip
    for path, recipe in cells.items():
        run(*shlex.split(recipe.command(str(tmp_path / "alone")))[1:])
        assert (tmp_path / "alone" / path.name).read_bytes() == path.read_bytes()
    run("grid", *words, "--precision", "bf16", "--x", "seed=1,2", "--output", tmp_path / "half")
    assert "precision bf16" in re.findall("<p>(.*?)</p>", (tmp_path / "half" / "index.html").read_text())[0]
    for refused, said in (
        (("--x", "precision=auto,fp32"), "Axis 'precision' has 'auto' and 'fp32', which are one"),
        (("--x", "precision=fp32,bf17"), "precision is 'bf17'. Did you mean 'bf16'?"),
    ):
        with pytest.raises(vl.VisionLoRAError, match=said):
            run("grid", *words, *refused, "--output", tmp_path / "none")


def test_pictures_to_start_from_as_an_axis(tiny_model: Path, tmp_path: Path) -> None:
    """Each cell has the shape of its own picture, and is what its own command draws."""
    for name, size in (("wide", (96, 32)), ("high", (32, 64)), ("sub/wide", (64, 64))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{name}.png")
    wide, high, other = (str(tmp_path / name) for name in ("wide.png", "high.png", "sub/wide.png"))
    words = ("--model", tiny_model, "--steps", 4, "--prompt", "a dog", "--batch-size", 1)
    axes = ("--x", f"init-image={wide}|{high}|{other}", "--y", "strength=0.5,1")
    run("grid", *words, *axes, "--output", tmp_path / "out")
    cells = {p: read_recipe(p) for p in (tmp_path / "out" / "cells").iterdir()}
    assert {(r.init_image, Image.open(p).size) for p, r in cells.items()} == {
        (wide, (56, 16)), (high, (24, 48)), (other, (32, 32))
    }  # fmt: skip
    for path, recipe in cells.items():
        run(*shlex.split(recipe.command(str(tmp_path / "alone")))[1:])
        assert (tmp_path / "alone" / path.name).read_bytes() == path.read_bytes()
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall("<th>(init_image .*?)</th>", page) == [
        "init_image wide.png", "init_image high.png", "init_image sub/wide.png"
    ]  # fmt: skip
    caption = re.findall("<p>(.*?)</p>", page)[0]
    assert "steps 4" in caption and "width" not in caption and "init image" not in caption
    run("grid", *words, *axes[:2], "--y", "width=32,48", "--output", tmp_path / "wide")
    sizes = {Image.open(p).size for p in (tmp_path / "wide" / "cells").iterdir()}
    assert sizes == {(32, 8), (48, 16), (32, 64), (48, 96), (32, 32), (48, 48)}, "a height follows from shape and width"


def test_masks_and_pictures_to_follow_as_axes(tiny_xl: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    save_controlnet(tiny_xl, tmp_path / "net")
    Image.new("L", (32, 32), 255).save(tmp_path / "all.png")
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "noise.png")
    start, mask, everything, noise = (tmp_path / f"{name}.png" for name in ("start", "mask", "all", "noise"))
    words = ("--model", tiny_xl, *COMMON, "--prompt", "a dog", "--init-image", start, "--strength", 1)
    net = ("--controlnet", tmp_path / "net")
    run("grid", *words, *net, "--x", f"mask={mask},{everything}", "--y", f"control={start},{noise}",
        "--output", tmp_path / "out")  # fmt: skip
    cells = {p: read_recipe(p) for p in (tmp_path / "out" / "cells").iterdir()}
    assert {(r.mask, r.control) for r in cells.values()} == {
        (str(m), str(c)) for m in (mask, everything) for c in (start, noise)
    }
    assert len({p.read_bytes() for p in cells}) == 4
    left = (0, 0, 16, 32)
    for path, recipe in cells.items():
        with Image.open(start) as before, Image.open(path) as drawn:
            held = drawn.crop(left).tobytes() == before.crop(left).tobytes()
        assert held == (recipe.mask == str(mask))


def test_the_steps_of_a_training_as_an_axis(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    shutil.copy(loras / "ink.safetensors", run_folder / "adapter.safetensors")
    for step, name in ((100, "dog"), (200, "ink")):
        shutil.copy(loras / f"{name}.safetensors", run_folder / "checkpoints" / f"step-{step:06d}.safetensors")
    words = (
        "grid",
        "--model",
        tiny_model,
        *COMMON,
        "--prompt",
        "a dog",
        "--lora",
        run_folder,
        "--output",
        tmp_path / "out",
    )
    text = run(*words, "--x", "step=100,200")
    assert "2 pictures" in text
    found = {Path(read_recipe(p).loras[0].path).stem for p in (tmp_path / "out" / "cells").iterdir()}
    assert found == {"step-000100", "step-000200"}
    with pytest.raises(vl.VisionLoRAError, match=r"has no checkpoint of step 150\. It kept steps 100, 200\."):
        run(*words, "--x", "lora:run.step=150")
    with pytest.raises(vl.VisionLoRAError, match="Axis 'step' needs one adapter, there are 2"):
        run(*words, "--lora", loras / "dog.safetensors", "--x", "step=100")


@pytest.mark.parametrize(
    ("word", "axis"),
    [
        ("seed=1..3,7", Axis("seed", (1, 2, 3, 7))),
        ("guidance-scale=1,2.5", Axis("guidance_scale", (1.0, 2.5))),
        ("prompt=a dog, sitting", Axis("prompt", ("a dog, sitting",))),
        ("negative-prompt=ugly, blurred", Axis("negative_prompt", ("ugly, blurred",))),
        ("prompt=one, two|three", Axis("prompt", ("one, two", "three"))),
        ("lora:a.b.scale=-1,0", Axis("lora:a.b.scale", (-1.0, 0.0))),
        ("lora:dog.down.1=0", Axis("lora:dog.down.1", (0.0,))),
        ("compose=sum", Axis("compose", ("sum",))),
    ],
)
def test_axes_are_typed(word: str, axis: Axis) -> None:
    assert parse_axis(word) == axis


def test_help_names_every_axis() -> None:
    assert {*NUMBERS, *WORDS} <= set(re.findall(r"\w+", command.NAMES))


def test_nothing_has_a_label_too() -> None:
    axis = parse_axis("negative-prompt=|ugly")
    assert [axis.label(value) for value in axis.values] == ["negative_prompt (none)", "negative_prompt ugly"]


def test_axes_from_python_are_as_their_words() -> None:
    assert Axis("prompt", "a dog") == parse_axis("prompt=a dog"), "and not one for each letter"
    assert Axis("guidance-scale", (1, "2.5")) == parse_axis("guidance_scale=1,2.5")
    assert Axis("seed", 3) == parse_axis("seed=3")
    assert [type(v) for v in Axis("seed", (*np.arange(2), 2.0, "3", torch.tensor(4))).values] == [int] * 5
    assert Axis("lora:dog.scale", np.array([0, 0.5])).values == (0.0, 0.5)
    assert Axis("lora:dog.file", Path("a.safetensors")).values == ("a.safetensors",)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("sed", (1,), "There is no axis 'sed'. Did you mean 'seed'"),
        ("seed", (), "Axis 'seed' has no value"),
        ("seed", (1.5,), "has the value 1.5, which is not a whole number"),
        ("steps", (None,), "has the value None, which is not a whole number"),
        ("guidance_scale", (float("nan"),), "has the value nan, which is not a number"),
        ("prompt", (3,), "has the value 3, which is not a text"),
        ("seed", (True,), "has the value True"),
    ],
)
def test_axes_from_python_that_cannot_be(name: str, values: tuple, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Axis(name, values)


def test_steps_and_strength_of_a_cell_are_set_together() -> None:
    start = Recipe("a", "m", 8, 8, init_image="a.png")
    cell = cell_of({(): start}, [(Axis("strength", (0.02,)), 0.02), (Axis("steps", (50,)), 50)], None)
    assert (cell.steps, cell.strength) == (50, 0.02)


REFUSALS = {
    "value twice": (("--x", "seed=1,2,1"), "Axis 'seed' has the value 1 more than once."),
    "unknown": (("--x", "sed=1"), "There is no axis 'sed'. Did you mean 'seed'?"),
    "no value": (("--x", "seed="), "An axis is written name=value,value…; this one is 'seed='."),
    "no number": (("--x", "steps=1,two"), "Axis 'steps' has the value 'two', which is not a whole number."),
    "empty": (("--x", "prompt=a||b"), "Axis 'prompt' has an empty value"),
    "twice": (("--x", "seed=1", "--y", "seed=2"), "Axis 'seed' is there twice."),
    "too many": (("--x", "seed=1..200", "--y", "steps=1..200"), "That is 40,000 pictures; a grid has at most 10,000."),
    "far too many": (("--x", "seed=0..99999999999"), "Axis 'seed' has 100,000,000,000 values; a grid has at most 10,000"),
    "not finite": (("--x", "lora:dog.scale=0,nan"), "Axis 'lora:dog.scale' has the value 'nan', which is not a number."),
    "compose": (("--x", "compose=sum,swich"), "There is no composition 'swich'. Did you mean 'switch'?"),
    "two prompts": (("--x", "seed=1", "--prompt", "b"), "A grid starts from one prompt, and there are 2: give"),
    "no adapter": (("--x", "lora:dgo.scale=1"), "is of an adapter that is not there. Did you mean 'dog'?"),
    "size": (("--x", "width=32,33"), "A resolution of 33 px does not fit"),
    "one of two": (("--x", "compose=k-lora"), "K-LoRA chooses between two adapters, content and style; there are 1."),
    "block": (("--x", "lora:dog.upp=0,1"), "No adapted layer is in block 'upp'."),
    "nearly scale": (("--x", "lora:dog.scal=0,1"), "There is no axis 'lora:dog.scal'. Did you mean 'lora:dog.scale'?"),
    "strength of nothing": (("--x", "strength=0.5,1"), "Axis 'strength' changes nothing without --init-image: give it"),
    "following nothing": (("--x", "control_scale=0,1"), "Axis 'control_scale' changes nothing without --controlnet: give"),
    "regions of nothing": (
        ("--x", "compose=sum,switch", "--region", "dog=0,0,1,1"),
        "Regions are for the composition regional, which axis 'compose' has not: add it, or leave --region out.",
    ),
    "no regions": (("--x", "compose=regional"), "on the command line --region dog=0,0,0.5,1 for each."),
    "picture twice": (
        ("--x", "init_image=a.png,b.png", "--init-image", "c.png"),
        "--init-image c.png and an axis 'init_image' do not go together: leave one of them out.",
    ),
    "no picture": (("--x", "init_image=lost.png"), "The picture to start from cannot be read: lost.png: No such file"),
    "mask of nothing": (("--x", "mask=a.png"), "give the picture with --init-image"),
    "following no net": (("--x", "control=a.png"), "A picture to follow needs a ControlNet"),
    "scheduler": (("--x", "scheduler=eular"), "scheduler is 'eular'. Did you mean 'euler'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_draw_nothing(name: str, loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    words, message = REFUSALS[name]
    with pytest.raises(vl.VisionLoRAError) as caught:
        run(
            "grid",
            "--model",
            tiny_model,
            "--prompt",
            "a",
            "--lora",
            f"{loras}/dog.safetensors",
            *words,
            "--output",
            tmp_path / "o",
        )
    assert message in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_regions_beside_other_compositions(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A region was taken for missing on an axis, and left its trace in the recipes of other compositions."""
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    words = [w for name in ("dog", "ink") for w in ("--lora", loras / f"{name}.safetensors")]
    run(
        "grid", "--model", tiny_model, "--prompt", "a", *words, "--region", f"dog={tmp_path}/mask.png", "--region",
        "ink=0,0,.5,1", "--x", "compose=sum,regional", "--steps", 1, "--output", tmp_path / "o",
    )  # fmt: skip
    shown = {vl.show(p).recipe.compose: vl.show(p).recipe for p in (tmp_path / "o" / "cells").iterdir()}
    assert list(shown["regional"].compose_options["regions"]) == ["dog", "ink"] and shown["regional"].region_hashes
    assert not shown["sum"].compose_options and not shown["sum"].region_hashes


def test_a_grid_without_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(
        vl.VisionLoRAError, match=r"^There is no prompt: --prompt TEXT, or several as an axis, --y 'prompt="
    ):
        run("grid", "--x", "seed=1,2", "--output", tmp_path / "o")


def test_tags_act_in_their_own_cells_and_dots_are_part_of_names(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    """What a prompt on an axis names acts where the prompt is; each cell's command draws it again."""
    shutil.copy(loras / "dog.safetensors", loras / "dog_v1.5.safetensors")
    fixed = ("--model", tiny_model, "--steps", 2, "--lora-folder", loras)
    run(
        "grid",
        *fixed,
        "--x",
        "prompt=a|a <lora:ink:0.8>|a <lora:dog_v1.5:0.3>",
        "--y",
        "seed=0,1",
        "--output",
        tmp_path / "g",
    )
    cells = [read_recipe(p) for p in sorted((tmp_path / "g" / "cells").iterdir())]
    assert {(r.prompt, tuple((u.name, u.scale) for u in r.loras)) for r in cells} == {
        ("a", ()), ("a", (("ink", 0.8),)), ("a", (("dog_v1.5", 0.3),))
    }  # fmt: skip
    for path in sorted((tmp_path / "g" / "cells").iterdir()):
        words = shlex.split(read_recipe(path).command(str(tmp_path / "again")))
        run(*words[1:])
        np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "again" / path.name), dtype=int),
                                   np.asarray(Image.open(path), dtype=int), atol=1)  # fmt: skip
    run(
        "grid",
        *fixed,
        "--prompt",
        "a <lora:dog_v1.5:0.3>",
        "--x",
        "lora:dog_v1.5.scale=0,1",
        "--output",
        tmp_path / "h",
    )
    scales = sorted(read_recipe(p).loras[0].scale for p in (tmp_path / "h" / "cells").iterdir())
    assert scales == [0, 1]


def test_each_cell_is_as_its_own_command_draws_it(tiny_sd2: Path, tmp_path: Path) -> None:
    """Noise, clip_skip and names follow the adapters of the cell, not those of the run."""
    loras = save_loras(tiny_sd2, tmp_path / "loras")
    adapter = vl.load_adapter(loras / "dog.safetensors")
    trained = replace(adapter, info={**adapter.info, "training": {"zero_terminal_snr": True, "clip_skip": 2}})
    vl.save_adapter(trained, loras / "sub" / "trained.safetensors")
    fixed = ("--model", tiny_sd2, "--lora-folder", loras, "--batch-size", 1, *COMMON)
    files = f"lora:ink.file={loras}/ink.safetensors,{loras}/sub/trained.safetensors"
    with pytest.raises(vl.VisionLoRAError, match="'heun', which cannot start from nothing but noise"):
        run(
            "grid",
            *fixed,
            "--x",
            "prompt=a cat|a <lora:sub/trained:1>",
            "--scheduler",
            "heun",
            "--output",
            tmp_path / "g",
        )
    assert not list((tmp_path / "g").glob("cells/*"))
    told = run("grid", *fixed, "--prompt", "a cat", "--lora", loras / "ink.safetensors", "--region", "ink=0,0,1,1",
               "--x", files, "--output", tmp_path / "g")  # fmt: skip
    assert told.count("The noise levels end at nothing but noise") == 1
    run("grid", *fixed, "--x", "prompt=a cat|a <lora:sub/trained:1>", "--output", tmp_path / "g")
    cells = sorted((tmp_path / "g" / "cells").iterdir())
    assert sorted((r.clip_skip, r.zero_terminal_snr, [u.name for u in r.loras]) for r in map(read_recipe, cells)) == [
        (1, False, []), (1, False, ["ink"]), (2, True, ["trained"]), (2, True, ["trained"])
    ]  # fmt: skip
    for path in cells:
        run(*shlex.split(read_recipe(path).command(str(tmp_path / "again")))[1:])
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_checkpoints_of_a_learned_word(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    """Each file brings its own vectors of one word."""
    run("train-sd", "--images", dogs, "--model", tiny_model, "--prompt", "a <it>", "token=<it>", "--steps", 4, "--rank", 2,
        "sample_columns=2", "sample_steps=1", "learning_rate=0.05", "--output", tmp_path / "run")  # fmt: skip
    run("grid", "--model", tiny_model, "--lora", tmp_path / "run", "--prompt", "a <it>", "--x", "step=2,4", "--steps", 2,
        "--output", tmp_path / "g")  # fmt: skip
    pictures = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "g" / "cells").iterdir())]
    assert len(pictures) == 2 and not np.array_equal(*pictures)


def test_from_python_in_plain_words(loras: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = vl.GenerateConfig(
        "a dog",
        f"{loras}/dog.safetensors:0.5",
        model=str(tiny_model),
        steps=1,
        width=32,
        height=32,
        output=tmp_path / "g",
    )
    result = vl.grid(config, "seed=1..2", others="steps=1,2")
    recipes = [cell.recipe for cell in result.cells]
    assert [(r.seed, r.steps, r.prompt) for r in recipes] == [(s, n, "a dog") for n in (1, 2) for s in (1, 2)]
    assert {(r.loras[0].name, r.loras[0].scale) for r in recipes} == {("dog", 0.5)}
    same = vl.grid(config, vl.Axis("seed", (1, 2)), others=[parse_axis("steps=1,2")])
    assert [c.path for c in same.cells] == [c.path for c in result.cells] and not any(c.new for c in same.cells)


def test_processes_share_the_cells_and_the_first_waits_for_the_others(
    loras: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "grid", "--model", tiny_model, *COMMON, "--batch-size", 1, "--prompt", "a dog", "--lora", f"{loras}/dog.safetensors",
        "--x", "seed=1..3", "--y", "lora:dog.scale=0,1", "--output",
    )  # fmt: skip
    run(*words, tmp_path / "alone")
    out, alone = tmp_path / "out", {p.name: p.read_bytes() for p in (tmp_path / "alone" / "cells").iterdir()}
    become_process(monkeypatch, 0)
    waits = []

    def other(seconds: float) -> None:
        waits.append({p.name for p in (out / "cells").iterdir()})
        assert not (out / "grid.png").exists()
        become_process(monkeypatch, 1)
        assert "pictures" not in run(*words, out) and not (out / "index.html").exists()
        become_process(monkeypatch, 0)

    monkeypatch.setattr(time, "sleep", other)
    monkeypatch.setattr("visionlora.pipelines.drawing.SILENT", -1.0)
    text = run(*words, out)
    assert text.count("Waiting for 3 pictures of the other processes: WORLD_SIZE says that there are 2.") == 1
    assert len(waits) == 1 and len(waits[0]) == 3
    assert "6 pictures\n" in text, "none was there before"
    assert {p.name: p.read_bytes() for p in (out / "cells").iterdir()} == alone
    assert (out / "index.html").read_bytes() == (tmp_path / "alone" / "index.html").read_bytes()
