"""`visionlora cache` as a user runs it."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from visionlora.cli.main import app
from visionlora.data.cache import key_of
from visionlora.errors import ConfigError


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["cache", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISIONLORA_CACHE", str(tmp_path))
    for days, name in ((0, f"{key_of('new')}.safetensors"), (40, f"{key_of('old')}.safetensors"), (40, "mine.txt")):
        (tmp_path / name).write_bytes(bytes(2**20))
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    return tmp_path


def test_it_says_what_is_there(folder: Path) -> None:
    said = run()
    assert "latents and text" in said and "2 entries     2.0 MiB" in said and str(folder) in said


def test_what_was_not_used_goes_first_then_all(folder: Path) -> None:
    assert "Took away 1 entries, 1.0 MiB." in run("--unused-days", "30")
    assert sorted(p.name for p in folder.iterdir()) == sorted([f"{key_of('new')}.safetensors", "mine.txt"])
    found = json.loads(run("--clear", "--json"))
    assert found["removed"] == {"entries": 1, "bytes": 2**20} and found["kept"]["latents and text"]["entries"] == 0
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--clear", "--unused-days", "3"], "give one of them"), (["--unused-days", "-1"], "it must be 0 or more")],
)
def test_what_cannot_be(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*words)
    assert len(list(folder.iterdir())) == 3
