"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import visionlora


def test_every_docstring_example_runs() -> None:
    attempted = 0
    for module in pkgutil.walk_packages(visionlora.__path__, "visionlora."):
        if module.name == "visionlora.__main__":
            continue
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted >= 6
