"""A picture says how it came to be."""

import io
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visionlora.config import parse_composition, parse_lora_use
from visionlora.diffusion.recipe import LoraUse, Recipe, png_bytes, read_recipe, take_tags
from visionlora.errors import ConfigError, DataError

RECIPE = Recipe(
    "a dog, (sitting)", "emoji-64", 64, 96, "blurry", (LoraUse("ink", "loras/ink.safetensors", 0.8, {"up": 1.5}, "ab" * 32),),
    "switch", {"tau": 2}, 7, 20, 2.0, "euler-a",
)  # fmt: skip
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), max_size=30)


@given(TEXT, TEXT, st.integers(0, 2**40), st.floats(0, 20), st.floats(-3, 3))
def test_a_recipe_comes_out_of_its_picture_as_it_went_in(
    tmp_path_factory, prompt: str, negative: str, seed: int, guidance: float, scale: float
) -> None:
    recipe = Recipe(
        prompt, "m", 8, 8, negative, (LoraUse("a", "a b.safetensors", scale),), seed=seed, guidance_scale=guidance
    )
    path = tmp_path_factory.mktemp("r") / "a.png"
    path.write_bytes(png_bytes(Image.new("RGB", (8, 8)), recipe))
    assert read_recipe(path) == recipe and read_recipe(path).key == recipe.key


def test_what_a1111_reads() -> None:
    assert RECIPE.parameters() == (
        "a dog, (sitting) <lora:ink:0.8>\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 2, Seed: 7, "
        'Size: 64x96, Model: emoji-64, Lora hashes: "ink: abababababab", Version: visionlora 0.1.0'
    )
    with Image.open(io.BytesIO(png_bytes(Image.new("RGB", (8, 8)), RECIPE))) as picture:
        assert picture.text["parameters"] == RECIPE.parameters()


def test_names_that_would_part_the_settings_are_quoted() -> None:
    odd = replace(RECIPE, model="a/my, model: v2", loras=(LoraUse('say "hi": b', "a", 1.0, {}, "ab" * 32),))
    line = odd.parameters().splitlines()[-1]
    settings = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    assert json.loads(settings["Model"]) == "my, model: v2" and settings["Version"] == "visionlora 0.1.0"
    assert json.loads(settings["Lora hashes"]) == 'say "hi" b: abababababab'


def test_the_command_says_all_of_it() -> None:
    words = shlex.split(RECIPE.command())
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert (
        options["--prompt"] == "a dog, (sitting)"
        and options["--height"] == "96"
        and options["--scheduler"] == "euler-a"
    )
    assert parse_lora_use(options["--lora"]) == ("loras/ink.safetensors", 0.8, {"up": 1.5})
    assert parse_composition(options["--compose"]) == ("switch", {"tau": 2})


@given(st.floats(-3, 3), st.floats(0, 20), st.floats(0.05, 1))
def test_the_command_says_numbers_exactly(scale: float, guidance: float, strength: float) -> None:
    use = LoraUse("a", "a.safetensors", scale, {"up": scale})
    recipe = Recipe("a", "m", 8, 8, loras=(use,), guidance_scale=guidance, init_image="a.png", strength=strength)
    words = shlex.split(recipe.command())
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert parse_lora_use(options["--lora"]) == ("a.safetensors", scale, {"up": scale})
    assert (float(options["--guidance-scale"]), float(options["--strength"])) == (guidance, strength)


def test_what_was_let_through_is_in_the_command_and_not_in_the_name() -> None:
    let = replace(RECIPE, force=True, allow_partial=True)
    assert RECIPE.command().count("--force") == 0 and let.command().split()[-4:-2] == ["--force", "--allow-partial"]
    assert let.file_name == RECIPE.file_name != replace(RECIPE, model_hash="0" * 16).file_name


def test_numbers_and_paths_are_as_the_command_gives_them(tmp_path: Path) -> None:
    """From Python they may be of other types, and it is the same picture."""
    regions = {"a": (0, 0, 1, 1), "b": tmp_path / "b.png"}
    given = Recipe("a", "m", 8, 8, loras=(LoraUse("a", "a", 1, {"up": 0}),), guidance_scale=3, control_scale=1,
                   compose="regional", compose_options={"regions": regions, "softness": 0.0})  # fmt: skip
    options = {"regions": {"a": [0.0, 0.0, 1.0, 1.0], "b": str(tmp_path / "b.png")}, "softness": 0}
    same = replace(given, loras=(LoraUse("a", "a", 1.0, {"up": 0.0}),), guidance_scale=3.0, compose_options=options)
    assert given.to_json() == same.to_json() and '"guidance_scale": 3.0' in given.to_json()
    assert Recipe.from_json(given.to_json()) == given


def test_the_command_says_the_precision() -> None:
    """On another machine auto would be another."""
    assert "--precision fp32 " in RECIPE.command()


def test_file_names_tell_pictures_apart() -> None:
    other = Recipe("a dog, (sitting)", "emoji-64", 64, 96, seed=7)
    assert RECIPE.file_name.startswith("a-dog-sitting-7-") and RECIPE.file_name != other.file_name
    assert Recipe("<lora:x:1>", "m", 8, 8).file_name.startswith("picture-0-")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog", ("a dog", [])),
        ("<lora:a:0.5>a  dog<lora:b>", ("a dog", [("a", 0.5), ("b", 1.0)])),
        ("a <lora:x y.z:-1> b", ("a b", [("x y.z", -1.0)])),
        ("a <lyco:x:2> <LoRA:y>", ("a", [("x", 2.0), ("y", 1.0)])),
    ],
)
def test_tags(prompt: str, expected: tuple) -> None:
    assert take_tags(prompt) == expected


BAD = {
    "steps": (lambda: Recipe("a", "m", 8, 8, steps=0), "steps is 0; it must be between 1 and 1000."),
    "scheduler": (lambda: Recipe("a", "m", 8, 8, scheduler="eular"), "scheduler is 'eular'. Did you mean 'euler'?"),
    "strength": (lambda: Recipe("a", "m", 8, 8, strength=0), "strength is 0; it must be above 0 and at most 1."),
    "too many steps": (lambda: Recipe("a", "m", 8, 8, steps=1001), "steps is 1001; it must be between 1 and 1000."),
    "guidance": (lambda: Recipe("a", "m", 8, 8, guidance_scale=-3), "guidance_scale is -3; it must be 0 or more"),
    "guidance nan": (
        lambda: Recipe("a", "m", 8, 8, guidance_scale=math.nan),
        "guidance_scale is nan; it must be 0 or more",
    ),
    "width": (lambda: Recipe("a", "m", 0, 8), "width is 0; it must be at least 1 px."),
    "tag nan": (lambda: take_tags("<lora:a:nan>"), "'nan' is not a finite number; write <lora:name:scale>."),
    "two tags": (
        lambda: take_tags("<lora:a:1> <lora:b:1> <lora:a:0.5>"),
        "<lora:a:0.5>: the prompt has a tag of 'a' already; leave one of them out.",
    ),
    "no step is left": (
        lambda: Recipe("a", "m", 8, 8, steps=4, init_image="a.png", strength=0.2),
        "4 steps at strength 0.2 leave the picture as it is: take at least 5 steps, or a strength of at least 0.25.",
    ),
    "region": (
        lambda: Recipe("a", "m", 8, 8, compose_options={"regions": {"a": 3}}),
        "The region of 'a' is a int; to be in the recipe of a picture it must be a box",
    ),
    "seed": (lambda: Recipe("a", "m", 8, 8, seed=-1), "seed is -1"),
    "tag": (lambda: take_tags("<lora:a:loud>"), "'loud' is not a finite number; write <lora:name:scale>."),
    "hypernetwork": (
        lambda: take_tags("<hypernet:a:1>"),
        "<hypernet:a:1> is not understood: a tag is <lora:name:scale>",
    ),
    "block": (lambda: parse_lora_use("dog@up=loud"), "dog@up=loud: 'up=loud' is no name=number, separated by commas."),
    "option": (lambda: parse_composition("switch:tau"), "switch:tau: 'tau' is no name=number, separated by commas."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    action, message = BAD[name]
    with pytest.raises(ConfigError) as caught:
        action()
    assert message in str(caught.value)


def test_pictures_without_a_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="carries no recipe: it was not drawn by visionlora"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be opened as a picture: it is broken, or no picture\.$"):
        read_recipe(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"There is no picture .*plane\.png; did you mean .*plain\.png\?"):
        read_recipe(tmp_path / "plane.png")
    with pytest.raises(DataError, match=r"cannot be opened as a picture: Is a directory\."):
        read_recipe(tmp_path)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3")
    Image.new("RGB", (4, 4)).save(tmp_path / "webui.png", pnginfo=info)
    with pytest.raises(DataError, match="was not drawn by visionlora; its own parameters are:\na cat"):
        read_recipe(tmp_path / "webui.png")
    info = PngInfo()
    info.add_text("visionlora", '{"prompt": 3')
    Image.new("RGB", (4, 4)).save(tmp_path / "broken.png", pnginfo=info)
    with pytest.raises(DataError, match=r"The recipe in this picture is broken \(JSONDecodeError"):
        read_recipe(tmp_path / "broken.png")
