"""The public names are there, sorted, and load on first use."""

import ast
from pathlib import Path

import pytest

import visionlora


def test_every_public_name_exists() -> None:
    assert len(visionlora.__all__) >= 10
    assert sorted(visionlora.__all__[:-1]) == visionlora.__all__[:-1]
    assert all(getattr(visionlora, name) is not None for name in visionlora.__all__)


def test_type_checkers_see_every_name() -> None:
    tree = ast.parse(Path(visionlora.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(home, name) for name, home in visionlora._HOMES.items()}
    pipelines = {"bake", "classify", "convert", "export", "generate", "grid", "overlap", "predict", "show", "train_sd"}
    assert pipelines | {"Options", "PairOverlap", "Result", "Shown"} <= {name for _, name in seen}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'injekt'"):
        visionlora.injekt  # noqa: B018
