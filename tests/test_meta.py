"""No test passes without checking something."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = ("assert_", "check_", "expect_")
FEWEST_TESTS = 50

Function = ast.FunctionDef | ast.AsyncFunctionDef


def checks_something(function: Function) -> bool:
    """Whether a test asserts, expects an exception or warning, or calls a helper that says it checks."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("raises", "warns") or called.startswith(CHECKS):
                return True
    return False


def test_every_test_checks_something() -> None:
    empty, count = [], 0
    for path in sorted(HERE.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function) and node.name.startswith("test"):
                count += 1
                if not checks_something(node):
                    empty.append(f"{path.relative_to(HERE).as_posix()}:{node.lineno} {node.name}")
    assert empty == []
    assert count >= FEWEST_TESTS


@pytest.mark.parametrize(
    ("body", "checks"),
    [
        ("assert x == 1", True),
        ("with pytest.raises(ValueError): f()", True),
        ("check_round_trip(x)", True),
        ("torch.testing.assert_close(x, y)", True),
        ("for x in y: expect_same(x)", True),
        ("f()", False),
        ("assert True", False),
        ("checked = f()", False),
    ],
)
def test_the_check_knows_what_checks(body: str, checks: bool) -> None:
    (function,) = ast.parse(f"def test_it():\n    {body}\n").body
    assert isinstance(function, Function)
    assert checks_something(function) is checks
