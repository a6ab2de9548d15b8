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


def facts_in(run: Path) -> dict[str, str]:
    """The table of a card, without its head."""
    rows = re.findall(r"^\| ([A-Z].*?) \| (.*) \|$", (run / "README.md").read_text(), re.MULTILINE)
    return dict(rows)


def test_all_that_learned_is_counted_and_named(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    alone = facts_in(trained(dogs, tiny_model, tmp_path / "alone"))
    assert alone["Method"] == "lora, rank 2, alpha 2, targets attn"
    run = trained(
        dogs, tiny_model, tmp_path / "all", "token=<it>", "prompt=a <it> dog", "token_vectors=2", "train_text_encoder=true",
        "text_encoder_stop=0.5", "prior_prompt=a dog",
    )  # fmt: skip
    found, adapter = facts_in(run), vl.load_adapter(run)
    numbers = sum(t.numel() for m in adapter.modules.values() for t in m.tensors.values())
    numbers += sum(t.numel() for parts in adapter.embeddings.values() for t in parts.values())
    assert found.pop("Trained parameters") == f"{numbers:,}"
    assert {name: found[name] for name in found.keys() - alone.keys()} == {
        "Text encoders": "trained too, at 0.05, for 50% of the steps",
        "Learned word": r"\<it\>, 2 x, at 0.5",
        "Class": "a dog, kept by the base's predictions, weight 1",
    }


def test_what_a_method_has_not_is_not_said(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    assert facts_in(trained(dogs, tiny_model, tmp_path / "a", "method=ia3"))["Method"] == "ia3, targets attn"


def test_a_run_that_stopped_early_says_its_own_steps(tiny_model: Path, dogs: Path, tmp_path: Path) -> None:
    early = ("learning_rate=100", "val_share=0.3", "patience=1", "checkpoints=5", "steps=5", "sample_columns=1")
    run = trained(dogs, tiny_model, tmp_path / "a", *early, "sample_steps=1")
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert done < 5 and facts_in(run)["Steps"] == f"{done} of 3 pictures"


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

    half = DiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant=variant)
    run = trained(dogs, tmp_path / "half", tmp_path / "run")
    found = drawn(executed(run, monkeypatch)["pipe"])
    np.testing.assert_allclose(found, drawn(vl.load_pipeline({"a": run})), rtol=0, atol=1e-4)


def test_the_model_that_comes_with_visionlora(dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(dogs, Path("emoji-64"), tmp_path / "run", "learning_rate=0.001", "steps=1")
    (card,) = executed(run, monkeypatch)["drawn"]
    assert card.path.is_file() and card.recipe.model == "emoji-64"
