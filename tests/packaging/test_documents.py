"""The documents say what was measured, and their examples run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quoted_numbers_are_the_recorded_ones() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "write_tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ours = [b for b in blocks if "import visionlora" in b]
    assert len(ours) == 1
    exec(ours[0], {})


def test_every_command_of_the_readme_is_a_verb_and_every_path_exists() -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"(?<!import )visionlora ([a-z][a-z-]+)", text))
    assert len(verbs) >= 4
    listed = subprocess.run([sys.executable, "-m", "visionlora", "--help"], capture_output=True, text=True).stdout
    assert all(f"  {verb}" in listed for verb in verbs), verbs
    paths = set(re.findall(r"assets/[\w./-]*\w", text))
    assert len(paths) >= 5
    assert all((ROOT / p).exists() for p in paths), [p for p in paths if not (ROOT / p).exists()]
