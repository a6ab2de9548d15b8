"""The source tree: every package is listed, and imports go one way."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
MAPPED = ("assets", "configs", "pipelines")
"""Folders at the top that are installed under ``visionlora``."""

ROOMS = (
    "errors",
    "atomic",
    "plugins",
    "config",
    "lora",
    "formats",
    "data",
    "models",
    "diffusion",
    "vision",
    "training",
    "report",
    "loaders",
    "mixing",
    "classifier",
    "pipelines",
    "cli",
)
"""A room may import itself and those before it."""

FRONT_DOOR = "loaders"
"""``from visionlora import x`` reaches every library room, so it counts as the last of them."""

DATA = ("assets", "configs")
"""Packages of files to read; every room may open them."""

EXEMPT = ("__init__", "__main__")
FEWEST_MODULES = 6


def module_files() -> dict[str, Path]:
    """Every module of the library and the pipelines by its installed name."""
    files = {}
    for folder, package in ((ROOT / "visionlora", "visionlora"), (ROOT / "pipelines", "visionlora.pipelines")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((package, *parts))] = path
    return files


def imports_at_run_time(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, without those below ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports_at_run_time(ast.Module([other], []))
        else:
            yield from imports_at_run_time(node)


def rooms_imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import from visionlora in the source of ``module``."""
    for node in imports_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package != "visionlora" or rest.startswith("__"):
                continue
            room = rest.split(".")[0]
            yield node.lineno, room if room in (*ROOMS, *DATA) else FRONT_DOOR


def wrong_imports(source: str, module: str) -> list[str]:
    """Imports of a room that comes after the module's own."""
    own = module.split(".")[1]
    allowed = (*ROOMS[: ROOMS.index(own) + 1], *DATA)
    return [f"{module}:{line} imports {room}" for line, room in rooms_imported(source, module) if room not in allowed]


def test_listed_packages_are_the_folders_with_an_init() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inside = [path.parent.relative_to(ROOT) for path in (ROOT / "visionlora").rglob("__init__.py")]
    mapped = [path.parent.relative_to(ROOT) for top in MAPPED for path in (ROOT / top).rglob("__init__.py")]
    found = {".".join(path.parts) for path in inside} | {".".join(("visionlora", *path.parts)) for path in mapped}
    assert sorted(setuptools["packages"]) == sorted(found)
    assert setuptools["package-dir"] == {f"visionlora.{top}": top for top in MAPPED}


def test_folders_with_modules_are_packages() -> None:
    files = [path for top in ("visionlora", *MAPPED) for path in (ROOT / top).rglob("*.py")]
    assert [path for path in files if not (path.parent / "__init__.py").exists()] == []
    assert len(files) >= FEWEST_MODULES


def test_imports_go_one_way() -> None:
    checked, wrong = 0, []
    for module, path in module_files().items():
        if module in [f"visionlora.{name}" for name in EXEMPT]:
            continue
        assert module.split(".")[1] in ROOMS, f"{module} is in no room; add it to ROOMS where it belongs"
        wrong += wrong_imports(path.read_text(encoding="utf-8"), module)
        checked += 1
    assert wrong == []
    assert checked >= FEWEST_MODULES


@pytest.mark.parametrize(
    ("source", "module", "rooms"),
    [
        ("import visionlora.cli.main", "visionlora.lora.layers", ["cli"]),
        ("from visionlora.cli import main", "visionlora.report.grid", ["cli"]),
        ("from visionlora import errors, training", "visionlora.data.images", ["training"]),
        ("def f():\n    from visionlora.loaders import load", "visionlora.training.loop", ["loaders"]),
        ("try:\n    import visionlora.report\nexcept ImportError:\n    pass", "visionlora.errors", ["report"]),
        ("from .. import report", "visionlora.lora.layers", ["report"]),
        ("from ..models.opening import open_base", "visionlora.lora.layers", ["models"]),
        ("from visionlora import inject", "visionlora.training.loop", ["loaders"]),
        ("import visionlora", "visionlora.config", ["loaders"]),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import visionlora.cli", "visionlora.errors", ["cli"]),
        ("if TYPE_CHECKING:\n    from visionlora.cli import main", "visionlora.errors", []),
        ("from visionlora.errors import DataError\nimport torch", "visionlora.lora.layers", []),
        ("from . import layers\nfrom .layers import LoRA", "visionlora.lora.inject", []),
        ("from visionlora import __version__, inject\nimport visionlora", "visionlora.pipelines.train_sd", []),
        ("from visionlora import configs", "visionlora.config", []),
    ],
)
def test_the_check_finds_wrong_imports(source: str, module: str, rooms: list[str]) -> None:
    assert [found.rsplit(" ", 1)[1] for found in wrong_imports(source, module)] == rooms
