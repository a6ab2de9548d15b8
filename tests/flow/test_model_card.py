"""The Python of a model card, executed: it draws what `visionlora` draws with the file that it lies beside."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from visionlora.pipelines.train_sd import train_sd

import visionlora as vl
from visionlora.config import TrainSDConfig, build, parse_words
from visionlora.diffusion.sampling import sampling_scheduler

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"steps": 3, "rank": 2, "batch_size": 3, "sample_columns": 0, "learning_rate": 0.1}


LONG = " ".join("abcdefghijklmnopqr")


def trained(images: Path, model: Path, run: Path, *settings: str) -> Path:
    fixed = {"images": str(images), "model": str(model), "output": str(run), **SMALL}
    return train_sd(build(TrainSDConfig, fixed, parse_words(settings, TrainSDConfig))).folder


def executed(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the card's code beside the run folder, as a user does."""
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def drawn(pipe: Any, prompt: str = "a <it> dog") -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize("settings", [(), ("method=rslora",), ("method=dora",), ("train_text_encoder=true",)], ids=str)
def test_what_diffusers_reads_it_draws_alike(
    settings: tuple[str, ...], tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(dogs, tiny_model, tmp_path / "run", *settings)
    names = executed(run, monkeypatch)
    assert "visionlora" not in names and "vl" not in names
    ours = drawn(vl.load_pipeline({"a": run}))
    np.testing.assert_allclose(drawn(names["pipe"]), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - drawn(vl.load_pipeline({}, str(tiny_model)))).max() > 1e-2


@pytest.mark.parametrize("settings", [
    ("token=<it>", "prompt=a <it> dog"), ("method=vera",), ("method=tlora",), ("method=ia3",),
    ("method=full", "learning_rate=0.01"), ("clip_skip=2",), ("max_token_length=150", f"prompt={LONG}"),
], ids=str)  # fmt: skip
def test_what_it_does_not_read_is_drawn_by_visionlora(
    settings: tuple[str, ...], tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(dogs, tiny_model, tmp_path / "run", *settings)
    (card,) = executed(run, monkeypatch)["drawn"]
    recipe = card.recipe
    assert recipe.loras[0].scale == 1 and recipe.clip_skip == vl.load_adapter(run).clip_skip
    (own,) = vl.generate(
        vl.GenerateConfig([recipe.prompt], loras=[(str(run), 1.0)], model=str(tiny_model), output="own")
    )
    assert np.array_equal(pixels(own.path), pixels(card.path))
    (plain,) = vl.generate(vl.GenerateConfig(["a dog"], model=str(tiny_model), output="plain"))
    assert np.abs(pixels(card.path) - pixels(plain.path)).max() > 1
    if recipe.clip_skip == 1 and recipe.prompt != LONG:  # which a pipeline of diffusers reads otherwise
        pipe = vl.load_pipeline({"a": run})
        pipe.scheduler = sampling_scheduler(pipe.scheduler)
        picture = pipe(recipe.prompt, num_inference_steps=recipe.steps, guidance_scale=recipe.guidance_scale,
                       generator=torch.Generator().manual_seed(recipe.seed)).images[0]  # fmt: skip
        assert np.abs(np.asarray(picture, int) - pixels(card.path)).max() <= 1


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), int)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_base_in_half_precision(
    variant: str | None, tiny_model: Path, dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    half = DiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant=variant)
    run = trained(dogs, tmp_path / "half", tmp_path / "run")
    found = drawn(executed(run, monkeypatch)["pipe"])
    np.testing.assert_allclose(found, drawn(vl.load_pipeline({"a": run})), rtol=0, atol=1e-4)


def test_the_model_that_comes_with_visionlora(dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(dogs, Path("emoji-64"), tmp_path / "run", "learning_rate=0.001", "steps=1")
    (card,) = executed(run, monkeypatch)["drawn"]
    assert card.path.is_file() and card.recipe.model == "emoji-64"
