"""The command itself: fast help without torch, versions, unknown verbs."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import visionlora
from visionlora.config import ClassifyConfig, TrainingConfig, TrainSDConfig, build, parse_words

from ..doubles import become_process


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['visionlora', '--help']\nfrom visionlora.cli.main import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "print(sorted(set(sys.modules) & {'torch', 'diffusers', 'PIL'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "train-sd" in done.stdout


def test_version(cli) -> None:
    assert cli("--version")[1].strip() == f"visionlora {visionlora.__version__}"


def test_an_unknown_verb_is_wrong_use(cli) -> None:
    code, _, err = cli("train-ds")
    assert code == 2
    assert "Traceback" not in err
    assert "train-ds" in err


def test_recipes_are_listed_and_copied_once(cli, tmp_path) -> None:
    code, out, _ = cli("configs")
    assert code == 0
    assert "emoji64_dog" in out
    assert cli("copy-config", "emoji64_dog")[0] == 0
    assert (tmp_path / "emoji64_dog.yaml").read_text().startswith("#")
    code, _, err = cli("copy-config", "emoji64_dog")
    assert code == 2
    assert "exists already" in err
    code, out, err = cli("copy-config", "emoji64_dog", "nowhere/x.yaml")
    assert (code, out) == (1, "")
    assert err == "Error: nowhere/x.yaml cannot be read or written: there is no folder nowhere.\n"


def test_ctrl_c_is_said() -> None:
    code = "import sys; sys.argv = ['visionlora', 'plugins']\nfrom visionlora import plugins\n"
    code += "def installed():\n    raise KeyboardInterrupt\nplugins.installed = installed\n"
    code += "from visionlora.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_what_processes_do_not_share_the_first_does_alone(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, listed in ((0, True), (1, False)):
        become_process(monkeypatch, rank)
        code, out, err = cli("configs")
        assert (code, err, "emoji64_dog" in out, bool(out)) == (0, "", listed, listed)


def test_work_is_done_where_standard_output_was_closed(tmp_path: Path) -> None:
    """As some daemons start their children."""
    command = [sys.executable, "-m", "visionlora", "copy-config", "sd15_style", "mine.yaml"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "mine.yaml").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a folder that is used cannot be removed there")
def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    command = [sys.executable, "-m", "visionlora", "generate", "--prompt", "a dog"]
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *command], cwd=gone, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "Error: The folder in which this was started is not there any more; change into another one: cd ~\n"
    )


def test_a_time_of_the_build_that_is_none(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library fell over it when it was imported, and the model was said to be broken."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "nonsense")
    assert cli("generate", "--prompt", "a dog") == (
        2,
        "",
        "Error: SOURCE_DATE_EPOCH is 'nonsense' here; set it to seconds since 1970, or unset it.\n",
    )


@pytest.mark.parametrize(("command", "kind"), [("train-sd", TrainSDConfig), ("classify", ClassifyConfig)])
def test_all_settings_are_listed_with_what_they_mean(cli, command: str, kind: type[TrainingConfig]) -> None:
    code, out, err = cli("settings", command)
    listed = re.findall(r"^(\w+)=.*\n    \S", out, re.M)
    assert (code, err) == (0, "") and listed == [f.name for f in fields(kind)]
    assert "weight_decay=0.05\n    Of the optimizer" in cli("settings", "classify")[1], "the nearest class counts"
    assert build(kind, {"images": "x"}, parse_words(re.findall(r"^(\w+=.+)$", out, re.M)[1:], kind)) == kind(images="x")


def test_settings_about_something(cli) -> None:
    out = cli("settings", "train-sd", "token-")[1]
    assert out.startswith("max_token_length=75\n") and "token_vectors=1\n    How many" in out and "epochs" not in out
    assert cli("settings", "train-ds")[2] == "Error: 'train-ds' has no settings. Did you mean 'train-sd'?\n"
    assert cli("settings", "classify", "zzz")[2] == (
        "Error: No setting of classify is about 'zzz'; all of them: visionlora settings classify\n"
    )
