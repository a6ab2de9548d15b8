"""The page of a grid."""

import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from visionlora.diffusion.axes import Axis, Sheet
from visionlora.diffusion.recipe import LoraUse, Recipe
from visionlora.report.grid_page import caption_of, page_of

RECIPE = Recipe(
    "dog", "emoji-64", 64, 96, "ugly", (LoraUse("ink", "ink.safetensors", 0.5, {"start": 0.5, "up": 0.3}),), seed=3, steps=2,
    guidance_scale=2.0, init_image="folder/start.png", strength=0.7, clip_skip=2,
)  # fmt: skip


def test_the_caption_has_all_that_decides_the_pictures() -> None:
    text = caption_of(RECIPE.loras, [RECIPE], [Axis("seed", (1, 2)), Axis("lora:ink.up", (0.1, 0.3))])
    assert text == (
        "prompt dog, negative prompt ugly, model emoji-64, steps 2, guidance scale 2, scheduler dpm++, width 64, height 96, "
        "clip skip 2, init image start.png, strength 0.7, ink 0.5@start=0.5"
    )
    assert "ink@start=0.5,up=0.3" in caption_of(RECIPE.loras, [RECIPE], [Axis("lora:ink.scale", (0.1, 0.3))])


def test_pictures_are_told_apart_and_recipes_can_be_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    page = page_of([Sheet("", ('<"1">', "2"), ("x", "y"), ())], [(path, RECIPE)] * 4, "caption")
    alts = re.findall(r'<td><img [^>]*alt="([^"]*)" tabindex="0"', page)
    assert alts == ["&lt;&quot;1&quot;&gt;, x, dog", "&lt;&quot;1&quot;&gt;, y, dog", "2, x, dog", "2, y, dog"]
    assert "user-select:all" in page and "Drawn in a batch" not in page
    page = page_of([Sheet("", ("1",), ("x",), ())], [(path, replace(RECIPE, batch_size=4))], "caption")
    assert (
        "Drawn in a batch of 4; alone, as by this command, values may round otherwise.\n\nvisionlora generate" in page
    )
    assert not re.search(r"\son[a-z]+=|https?://|<link|@import", page.partition("<script>")[0]), "it needs no network"
