"""Settings from files, words and flags: precedence, conversion, and problems reported together."""

from pathlib import Path

import pytest
import yaml

from visionlora.config import (
    ClassifyConfig,
    TrainSDConfig,
    budget_of,
    build,
    parse_words,
    read_yaml,
    recipe_names,
    to_yaml,
)
from visionlora.errors import ConfigError


def test_later_layers_win() -> None:
    config = build(TrainSDConfig, {"images": "a", "steps": 10, "rank": 4}, {"steps": 20}, {"steps": 30})
    assert (config.steps, config.rank) == (30, 4)


def test_dashes_and_underscores_mean_the_same() -> None:
    assert build(TrainSDConfig, {"images": "a", "learning-rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("steps", "12", 12),
        ("steps", 12.0, 12),
        ("learning_rate", "2e-3", 2e-3),
        ("alpha", None, None),
        ("alpha", "none", None),
        ("flip", "yes", True),
        ("sample_prompts", "one", ("one",)),
        ("sample_prompts", ["one", "two"], ("one", "two")),
        ("prompt", 7, "7"),
    ],
)
def test_values_are_converted(key: str, given: object, expected: object) -> None:
    assert getattr(build(TrainSDConfig, {"images": "a", key: given}), key) == expected


def test_unknown_keys_and_wrong_types_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        build(TrainSDConfig, {"lerning_rate": 1, "steps": "many", "rank": 3.5, "flip": 3, "batch_size": True})
    assert str(caught.value).splitlines() == [
        "These settings cannot be used:",
        "- lerning_rate is not a setting. Did you mean 'learning_rate'?",
        "- steps is 'many'; expected a whole number",
        "- rank is 3.5; expected a whole number or auto",
        "- flip is 3; expected true or false",
        "- batch_size is True; expected int",
    ]


def test_values_out_of_range_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainSDConfig(images="", steps=0, rank=-1, learning_rate=0, precision="fp23", caption_dropout=2)
    assert str(caught.value).splitlines() == [
        "These settings cannot be used:",
        "- images is ''; name the folder of pictures to learn from: --images ./dog",
        "- steps is 0; it must be at least 1",
        "- rank is -1; it must be at least 1, or auto",
        "- learning_rate is 0; it must be positive",
        "- precision is 'fp23'; Did you mean 'fp32'?",
        "- caption_dropout is 2; it must be between 0 and 1",
    ]


def test_yaml_of_a_config_gives_it_back() -> None:
    config = TrainSDConfig(images="a: b", sample_prompts=("x, y", "z: 1"), alpha=3.5, prompt="sks 'dog'")
    assert build(TrainSDConfig, yaml.safe_load(to_yaml(config))) == config


def test_words_are_read_as_yaml() -> None:
    assert parse_words(["steps=5", "flip=true", "prompt=a = b"]) == {"steps": 5, "flip": True, "prompt": "a = b"}
    with pytest.raises(ConfigError, match="'steps' is not understood: settings are written key=value"):
        parse_words(["steps"])


def test_every_recipe_is_a_valid_configuration() -> None:
    names = recipe_names()
    assert len(names) >= 2
    for name in names:
        kind = ClassifyConfig if name.endswith("_classes") else TrainSDConfig
        made = build(kind, read_yaml(name), {"images": "x"})
        assert made.steps is not None or made.epochs > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not valid YAML at line"), ("- 1", "must hold `key: value` lines; it holds a list")],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(str(tmp_path / "c.yaml"))
    assert words in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"There is no config file or recipe 'emoji_dog'\. Did you mean 'emoji64_dog'"
    ):
        read_yaml("emoji_dog")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(str(tmp_path / "c.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", ("rank", 8)), ("300k", ("parameters", 300_000)), ("2 MB", ("parameters", 524_288)), ("0", None), ("1.5", None),
     ("much", None)],
)  # fmt: skip
def test_budgets(text: str, expected: tuple[str, int] | None) -> None:
    assert budget_of(text) == expected


def test_rank_is_a_number_or_auto() -> None:
    assert build(TrainSDConfig, {"images": "x", "rank": "auto"}).rank == "auto"
    assert build(TrainSDConfig, {"images": "x", "rank": "4"}).rank == 4
    with pytest.raises(ConfigError, match="rank is 'some'; expected a whole number or auto"):
        build(TrainSDConfig, {"images": "x", "rank": "some"})
    with pytest.raises(
        ConfigError, match=r"rank_budget is 'lots'; write a mean rank \(8\), parameters \(300k\) or a size"
    ):
        TrainSDConfig(images="x", rank="auto", rank_budget="lots")


def test_weights_of_classes_are_words_or_a_mapping() -> None:
    def given(value: object) -> object:
        return build(ClassifyConfig, {"images": "x", "class_weights": value}).class_weights

    assert given("auto") == "auto" and given({"cat": 2, "a, b": "1.5"}) == {"cat": 2.0, "a, b": 1.5}
    with pytest.raises(ConfigError, match=r"class_weights is .*; expected a word or names with values"):
        build(ClassifyConfig, {"images": "x", "class_weights": [3.5]})
