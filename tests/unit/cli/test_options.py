"""What the training verbs share."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from visionlora.cli.main import app
from visionlora.cli.options import resolved
from visionlora.config import ClassifyConfig, TrainSDConfig, build, to_yaml
from visionlora.errors import ConfigError
from visionlora.vision.metrics import Metrics

from ...doubles import environment_of

COMMAND = """
import sys
from visionlora.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as e:
    assert not e.code
print(sorted(set(sys.modules) & {"torch", "accelerate"}))
"""


def test_a_run_that_is_finished_is_told_once_and_at_once(tmp_path: Path) -> None:
    """Without torch, and by one process of several."""
    found = {field.name: 0 for field in dataclasses.fields(Metrics)} | {"per_class": [{"name": "cat"}]}
    (tmp_path / "config.yaml").write_text(to_yaml(build(ClassifyConfig, {"images": ".", "output": str(tmp_path)})))
    (tmp_path / "metrics.json").write_text(json.dumps({**found, "contenders": {}}))
    (tmp_path / "run.json").write_text("{}")
    words = ["classify", "--images", ".", "--output", str(tmp_path), "--resume", "auto", "--json"]
    for rank in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            capture_output=True,
            text=True,
            env={**os.environ, **environment_of(int(rank))},
        )
        *told, loaded = done.stdout.splitlines()
        assert loaded == "[]", done.stderr
        assert [json.loads(line)["classes"] for line in told] == ([["cat"]] if rank == "0" else [])
        assert ("nothing is left to do" in done.stderr) == (rank == "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--val-share 0.1",
            "--val-share is not an option but a setting, which is written without dashes: val_share=0.1",
        ),
        (
            "--min_snr_gamma=5",
            "--min_snr_gamma is not an option but a setting, which is written without dashes: min_snr_gamma=5",
        ),
        ("--flip --steps 3", "--flip is not an option but a setting, which is written without dashes: flip=…"),
        ("--learning_rate 1e-4", "--learning_rate is not an option; it is written --learning-rate."),
        (
            "--images a --images=b",
            "--images is given twice, as 'a' and 'b': several folders are one setting, each with its own prompt, captions and "
            "repeats: 'folders=[{path: a}, {path: b}]'",
        ),
    ],
)
def test_words_that_would_be_misread(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        app(["train-sd", *words.split()], standalone_mode=False)
    assert str(caught.value) == message


def test_scripts_may_append_what_they_change() -> None:
    with pytest.raises(ConfigError, match="There is no config file or recipe 'nowhere'"):
        app(
            ["classify", *"--images a --config nowhere --images a --steps 3 --steps 4 -- --val-share".split()],
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    ("flag", "weights"),
    [("auto", "auto"), ("{cat: 2, 1: .5}", {"cat": 2.0, "1": 0.5}), (' {"a, b": 3}', {"a, b": 3.0})],
)
def test_weights_of_classes_may_be_an_option_too(flag: str, weights: object) -> None:
    assert resolved(ClassifyConfig, {"images": ".", "class_weights": flag}).class_weights == weights


def test_a_config_of_another_command_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "my own.yaml").write_text("sample_prompts: [dog]\nrank: 4\n")
    for kind, name, words in (
        (
            TrainSDConfig,
            "emoji_vit_classes",
            "emoji_vit_classes is for `visionlora classify`, and train-sd has no augment",
        ),
        (
            ClassifyConfig,
            str(tmp_path / "my own.yaml"),
            "is for `visionlora train-sd`, and classify has no sample_prompts",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            resolved(kind, {"config": [name], "images": "."})
        assert words in str(caught.value) and str(caught.value).endswith(f"--config {shlex.quote(name)}")
