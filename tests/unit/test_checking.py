"""Config files looked at before they are used: every problem, with its line."""

from pathlib import Path

import pytest

from visionlora.config import ClassifyConfig, TrainSDConfig, config_text, recipe_names, to_yaml
from visionlora.config.checking import check_file, commands_for
from visionlora.errors import ConfigError

SHIPPED = {
    "emoji64_dog": "train-sd",
    "emoji64_style": "train-sd",
    "emoji_vit_classes": "classify",
    "low_vram_8gb": "train-sd",
    "sd15_one_picture": "train-sd",
    "sd15_style": "train-sd",
    "sd15_subject": "train-sd",
    "sd21_v": "train-sd",
    "sdxl_style": "train-sd",
    "sdxl_subject": "train-sd",
    "vit_b16_classes": "classify",
}


def problems(text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text(text)
    return [str(problem) for problem in check_file(str(tmp_path / "c.yaml")).problems]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    found = check_file(name)
    assert found.problems == () and found.commands == (SHIPPED[name],)
    first = config_text(name).splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") and len(first) <= 128


def test_no_recipe_is_forgotten() -> None:
    assert recipe_names() == sorted(SHIPPED)


def test_all_problems_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = "# mine\nmodel: emoji-64\nlerning_rate: 1\nsample_prompts:\n  - a\n  - b\nsteps: many\nrank: 0\nflip: 3\n"
    assert problems(text, tmp_path) == [
        "line 3: lerning_rate is not a setting. Did you mean 'learning_rate'?",
        "line 7: steps is 'many'; expected a whole number",
        "line 8: rank is 0; it must be at least 1, or auto",
        "line 9: flip is 3; expected true or false",
    ]


def test_a_setting_that_is_given_twice(tmp_path: Path) -> None:
    assert problems("rank: 4\nsteps: 10\nrank: 8\n", tmp_path) == [
        "line 3: rank is given twice, first in line 1; leave one of them out."
    ]


def test_what_needs_another_setting_is_a_problem_of_its_line(tmp_path: Path) -> None:
    assert problems("sample_steps: 2\npatience: 3\n", tmp_path) == [
        "line 2: patience is 3; it needs pictures that are not trained on: give val_share or validation"
    ]


def test_wrong_folders_do_not_make_images_missing(tmp_path: Path) -> None:
    assert problems("folders:\n  - path: a\n    promt: b\n", tmp_path) == [
        "line 1: folders[0].promt is not a setting. Did you mean 'prompt'?"
    ]
    assert problems("images: a\nfolders: 3\n", tmp_path) == ["line 2: folders is 3; expected a list"]


def test_pictures_may_be_missing_and_may_be_wrong(tmp_path: Path) -> None:
    assert problems("sample_steps: 2\n", tmp_path) == []
    assert problems("images:\n", tmp_path) == ["line 1: images is None; expected a word"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "this is not valid YAML: "),
        ("prompt: 2024-13-45", "this is not valid YAML: month must be in"),
        ("- 1", "it must hold `key: value` lines; it holds a list."),
        ("rank", "it must hold `key: value` lines; it holds a str."),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = problems(text, tmp_path)
    assert expected in problem


def test_an_empty_file_is_fine_for_both(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert check_file(str(tmp_path / "c.yaml")).commands == ("train-sd", "classify")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml cannot be read: it is not UTF-8 text"):
        check_file(str(tmp_path / "c.yaml"))


def test_whole_configurations_are_told_apart(tmp_path: Path) -> None:
    for config, command in ((TrainSDConfig(images="a"), "train-sd"), (ClassifyConfig(images="a"), "classify")):
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        found = check_file(str(tmp_path / "c.yaml"))
        assert (found.commands, found.problems) == ((command,), ())


def test_the_command_is_guessed_in_spite_of_a_typo() -> None:
    assert commands_for(["lerning_rate", "mixup", "rank"]) == ("classify",)


def test_more_rules_are_asked_last(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rank: 2\nmethod: lorra\n")
    found = check_file(str(tmp_path / "c.yaml"), lambda config: [f"method is {config.method!r}."])
    assert [str(problem) for problem in found.problems] == ["line 2: method is 'lorra'."]
