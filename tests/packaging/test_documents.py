"""The documents say what was measured, and their examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_quoted_numbers_are_the_recorded_ones() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "write_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


DOCUMENTS = ("README.md", "assets/emoji-64/README.md", "assets/emoji-vit/README.md")
BLOCKS = [b for d in DOCUMENTS for b in re.findall(r"```python\n(.*?)```", (ROOT / d).read_text(), re.DOTALL)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS, ids=[b.splitlines()[-1][:40] for b in BLOCKS])
def test_the_examples_of_the_readme_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")  # what they write stays out of the checkout
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(block, found)
    assert len(found) > 2


def test_every_command_of_the_readme_is_a_verb_and_every_path_exists() -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"(?<!import )visionlora ([a-z][a-z-]+)", text))
    assert len(verbs) >= 4
    listed = subprocess.run([sys.executable, "-m", "visionlora", "--help"], capture_output=True, text=True).stdout
    assert all(f"  {verb}" in listed for verb in verbs), verbs
    paths = set(re.findall(r"assets/[\w./-]*\w", text))
    assert len(paths) >= 5
    assert all((ROOT / p).exists() for p in paths), [p for p in paths if not (ROOT / p).exists()]
