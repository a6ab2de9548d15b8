"""`path:scale` words."""

from pathlib import Path

import pytest

from visionlora.config import parse_lora, parse_lora_use, parse_region
from visionlora.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("runs/dog", ("runs/dog", 1.0)),
        ("runs/dog:0.8", ("runs/dog", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
    ],
)
def test_words_are_split(word: str, expected: tuple[str, float]) -> None:
    assert parse_lora(word) == expected


def test_a_path_with_a_colon_that_exists_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:0.5"
    path.mkdir()
    assert parse_lora(str(path)) == (str(path), 1.0)


def test_a_path_with_an_at_sign_that_exists_is_a_path(tmp_path: Path) -> None:
    """As the command of a picture gives it: with its scale, and factors of blocks where there are some."""
    path = tmp_path / "a@v=2.safetensors"
    path.touch()
    assert parse_lora_use(f"{path}:1") == (str(path), 1.0, {})
    assert parse_lora_use(f"{path}:0.5@up=2") == (str(path), 0.5, {"up": 2.0})


def test_a_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="dog:strong: 'strong' is not a number; write path or path:scale"):
        parse_lora("dog:strong")


@pytest.mark.parametrize("word", ["dog:nan", "dog:inf", "dog:-inf", "dog:1@up=nan"])
def test_a_number_that_is_not_finite_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"finite|no name=number"):
        parse_lora_use(word)


def test_regions_of_names_and_files_with_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mask=1.png").touch()
    assert parse_region("dog=~/mask=1.png") == ("dog", str(tmp_path / "mask=1.png"))
    assert parse_region("a=b=0,0,.5,1") == ("a=b", [0, 0, 0.5, 1])
    assert parse_region("dog=mask=1.png") == ("dog", "mask=1.png")
    assert parse_region("a=b=mask=1.png") == ("a=b", "mask=1.png")
    assert parse_region("dog=no=1.png") == ("dog", "no=1.png"), "a file that is not there is named as it was given"


def test_a_block_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^dog:1@up=1,mid=0,up=2: up is given twice; leave one of them out\.$"):
        parse_lora_use("dog:1@up=1,mid=0,up=2")
