"""Every recipe that comes with visionlora runs."""

from importlib import resources
from pathlib import Path

import pytest
from visionlora.pipelines.classify import classify
from visionlora.pipelines.dry_run import dry_run

from visionlora.config import ClassifyConfig, TrainSDConfig, build, read_yaml, recipe_names
from visionlora.config.checking import commands_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' schedulers

STAND_INS = {"emoji-64": "tiny_sd2", "stable-diffusion-v1-5": "tiny_model", "stable-diffusion-2-1": "tiny_sd2",
             "stable-diffusion-xl-base-1.0": "tiny_xl"}  # fmt: skip
"""From the last word or owner of a recipe's model to a small random one of its family."""
NAMES = recipe_names()


def test_none_is_forgotten() -> None:
    files = [f.name for f in resources.files("visionlora.configs").iterdir() if f.name.endswith(".yaml")]
    assert len(files) == len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(
    name: str, dogs: Path, shapes: Path, tiny_vit: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = read_yaml(name)
    (command,) = commands_for(settings)
    if command == "classify":
        small = {"images": str(shapes), "model": str(tiny_vit), "epochs": None, "steps": 1, "warmup_steps": 0}
        result = classify(build(ClassifyConfig, settings, {**small, "output": str(tmp_path / "run")}))
        assert result.adapter.is_file()
        return
    (word,) = (w for w in STAND_INS if w in settings["model"].split("/"))
    model = request.getfixturevalue(STAND_INS[word])
    small = {"images": str(dogs), "model": str(model), "resolution": 32, "bucket_step": 8, "sample_steps": 1,
             "rank": 4, "precision": "fp32", "base_precision": "fp32", "optimizer": "adamw", "attention": "sdpa"}  # fmt: skip
    found = dry_run(build(TrainSDConfig, settings, small))
    assert found.steps == settings["steps"] and found.trained_parameters > 0
    assert sum(found.sizes.values()) in (2, 3), "a recipe may keep one apart"
