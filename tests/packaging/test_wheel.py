"""The wheel: it holds what the tree holds, under the installed names, and nothing else becomes importable."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOP = {"visionlora": "visionlora", "pipelines": "visionlora/pipelines", "configs": "visionlora/configs"}
TOP["assets"] = "visionlora/assets"
NO_PART = shutil.ignore_patterns("__pycache__", "*.egg-info")
SHIPPED = (".py", ".yaml", ".yml", ".json", ".jsonl", ".safetensors", ".png", ".txt", ".model")
FEWEST_FILES = 12


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that no old build/ folder gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for top in TOP:
        shutil.copytree(ROOT / top, folder / "tree" / top, ignore=NO_PART)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", folder / "dist", folder / "tree", cwd=folder,
    )  # fmt: skip
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel alone."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=folder,
    )  # fmt: skip
    return python


def files_in_tree() -> set[str]:
    """Every file of the tree that users need, by its path in the wheel."""
    files = set()
    for top, installed in TOP.items():
        for path in (ROOT / top).rglob("*"):
            if "__pycache__" not in path.parts and (path.suffix in SHIPPED or path.name == "py.typed"):
                files.add(f"{installed}/{path.relative_to(ROOT / top).as_posix()}")
    return files


def files_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_what_the_tree_holds(wheel: Path) -> None:
    expected, held = files_in_tree(), files_in_wheel(wheel)
    assert sorted(expected - held) == []
    assert len(expected) >= FEWEST_FILES
    assert {"visionlora/py.typed", "visionlora/errors.py", "visionlora/assets/build_pictures.py"} <= held


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    for name in files_in_wheel(wheel):
        top, _, rest = name.partition("/")
        if top.endswith(".dist-info"):
            continue
        assert top == "visionlora", f"{name} would be installed beside the package"
        mapped = rest.split("/")[0] if rest.split("/")[0] in TOP else None
        assert (ROOT / (rest if mapped else name)).is_file(), f"{name} is not in the tree"


def test_the_licence_is_in_the_wheel(wheel: Path) -> None:
    assert [name for name in files_in_wheel(wheel) if name.endswith(".dist-info/licenses/LICENSE")]


@pytest.mark.parametrize("name", ["pipelines", "configs", "tests", "assets"])
def test_no_general_name_becomes_importable(python: Path, name: str, tmp_path: Path) -> None:
    code = f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print('missing', error.name)"
    assert run(python, "-I", "-c", code, cwd=tmp_path).split() == ["missing", name]


@pytest.mark.parametrize("name", ["pipelines", "configs", "assets"])
def test_mapped_folders_are_found_under_the_package(python: Path, name: str, tmp_path: Path) -> None:
    # find_spec of importlib.util imports the parent, which may want packages this environment lacks.
    code = (
        "from importlib.machinery import PathFinder\n"
        "package = PathFinder.find_spec('visionlora')\n"
        f"print(PathFinder.find_spec('visionlora.{name}', package.submodule_search_locations).origin)"
    )
    origin = Path(run(python, "-I", "-c", code, cwd=tmp_path).strip())
    assert origin.parts[-3:] == ("visionlora", name, "__init__.py")
    assert python.parents[1] in origin.parents
