"""The adapters that tags of prompts name."""

from pathlib import Path

import pytest

from visionlora.diffusion.uses import tagged
from visionlora.errors import ConfigError


def test_a_tag_names_a_file_in_a_folder_or_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As A1111 has it; it was not found there."""
    for name in ("ink", "styles/ink", "styles/wash", "a/dog", "b/dog"):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert tagged("ink", tmp_path, ()) == tmp_path / "ink.safetensors"
    for name in ("wash", "styles/wash"):
        assert tagged(name, tmp_path, ()) == tmp_path / "styles/wash.safetensors"
    with pytest.raises(ConfigError, match=r"'dog', and there are several: write one of <lora:a/dog>, <lora:b/dog>\."):
        tagged("dog", tmp_path, ())
    with pytest.raises(ConfigError, match=r"'WASH', which is not there\. Did you mean 'wash'\?"):
        tagged("WASH", tmp_path, ())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'wash', which is not there\. Allowed: ink\."):
        tagged("wash", Path(), ())
