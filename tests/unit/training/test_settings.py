"""What a run says of its settings before it begins."""

from dataclasses import asdict

import pytest

from visionlora.config import ClassifyConfig, TrainSDConfig, build, read_yaml, recipe_names
from visionlora.config.checking import COMMANDS, commands_for
from visionlora.errors import ConfigError
from visionlora.training.settings import OF_OTHERS, cut_warmup, left_aside, targets_of


def test_what_a_method_without_layers_leaves_aside_is_said() -> None:
    given = {"images": "x", "method": "full", "targets": "attn.q"}
    assert left_aside(TrainSDConfig(**given)) == (
        "Method full trains every parameter, so this is left aside: targets=attn.q.",
    )
    (line,) = left_aside(ClassifyConfig(**{**given, "method": "linear-probe", "rank": 4}))
    assert "the head alone" in line and line.endswith("targets=attn.q, rank=4.")
    assert targets_of(TrainSDConfig(**given)) == "every parameter"
    again = TrainSDConfig(**asdict(TrainSDConfig(images="x", method="full")))
    assert left_aside(again) == left_aside(TrainSDConfig(images="x", targets="attn.q")) == ()
    assert left_aside(TrainSDConfig(images="x", method="ia3", alpha=2, targets="mlp")) == (
        "Method ia3 has none of its own, so this is left aside: alpha=2.0.",
    )
    with pytest.raises(ConfigError, match="rank is 'auto'; method full has no ranks that could be spread"):
        TrainSDConfig(**given, rank="auto")


def test_settings_without_effect_are_said() -> None:
    idle = {
        "rank_budget": "300k", "schedule_cycles": 2, "schedule_power": 3.0, "keep_tags": 2, "picture_variants": 4,
        "bucket_step": 32, "upscale": True, "prior_weight": 0.5, "prior_count": 9, "sample_prompts": ("a",),
        "sample_steps": 5,
    }  # fmt: skip
    fixed = {"images": "x", "buckets": False, "sample_columns": 0}
    assert left_aside(TrainSDConfig(**fixed, **idle)) == (
        "Without effect in this run: rank_budget is of rank auto, schedule_cycles is of schedule cosine-restarts, "
        "schedule_power is of schedule polynomial, keep_tags is of shuffle_tags and tag_dropout, picture_variants is of "
        "random_crop and colour_jitter, bucket_step is of buckets, upscale is of buckets, prior_weight is of prior_prompt, "
        "prior_count is of prior_images, sample_prompts is of the sample grid, sample_steps is of the sample grid.",
    )
    assert {*idle} == {*OF_OTHERS}
    used = {"rank": "auto", "schedule": "polynomial", "shuffle_tags": True, "colour_jitter": 0.1, "prior_prompt": "a"}
    del idle["schedule_cycles"]
    assert left_aside(TrainSDConfig(images="x", prior_images="y", **used, **idle)) == ()
    assert left_aside(ClassifyConfig(images="x", schedule="cosine-restarts", schedule_cycles=2)) == ()


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_set_nothing_without_effect(name: str) -> None:
    settings = read_yaml(name)
    (command,) = commands_for(settings)
    assert left_aside(build(COMMANDS[command], {"images": "x"}, settings)) == ()


def test_a_warm_up_that_is_cut_is_said() -> None:
    given = {"images": "x", "warmup_steps": 20, "batch_size": 1, "learning_rate": 1.0}
    assert cut_warmup(build(TrainSDConfig, given, {"steps": 60})) == (
        "The warm-up takes a tenth of a run at most: 6 of these 60 steps, not 20."
    )
    assert cut_warmup(build(TrainSDConfig, given, {"steps": 200})) == ""
    del given["warmup_steps"]  # the usual one is short in short runs, without a word
    assert cut_warmup(build(TrainSDConfig, given, {"steps": 60})) == ""
