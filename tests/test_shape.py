"""The shape of the code: short functions, small classes, files about one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTION_LINES, CLASS_METHODS, FILE_LINES, TEST_FILE_LINES = 60, 20, 350, 500

# What is larger still.
LARGER: set[str] = set()


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without decorators and its docstring."""
    body = node.body
    documented = ast.get_docstring(node, clean=False) is not None
    first = body[1].lineno if documented and len(body) > 1 else body[-1 if documented else 0].lineno
    return (node.end_lineno or node.lineno) - first + 2


def sizes(path: Path, most_lines: int) -> Iterator[tuple[str, int, int]]:
    """What is measured in a file: its name, its size, and the most that it may have."""
    name, text = str(path.relative_to(ROOT)), path.read_text()
    yield name, len(text.splitlines()), most_lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}: {node.name}", code_lines(node), FUNCTION_LINES
        elif isinstance(node, ast.ClassDef) and not name.startswith(
            "tests/"
        ):  # a class of tests has as many as it needs
            methods = sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)
            yield f"{name}: {node.name}", methods, CLASS_METHODS


def all_sizes() -> list[tuple[str, int, int]]:
    package = [found for path in sorted((ROOT / "pipeline").rglob("*.py")) for found in sizes(path, FILE_LINES)]
    tests = [found for path in sorted((ROOT / "tests").rglob("*.py")) for found in sizes(path, TEST_FILE_LINES)]
    return package + tests


def test_shape_only_known_exceptions_are_larger_than_they_may_be() -> None:
    """An exception that isn't one any more is to be taken off the list."""
    sizes_by_name = {name: (size, most) for name, size, most in all_sizes()}
    larger = {name for name, (size, most) in sizes_by_name.items() if size > most}
    assert {name: sizes_by_name.get(name) for name in larger ^ LARGER} == {}, "cut it, by what it does"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    return 1\n", 2),
        ('def f():\n    """One\n    two."""\n    x = 1\n    return x\n', 3),
        ('def f():\n    """One."""\n', 2),
    ],
)
def test_shape_docstrings_do_not_count(source: str, lines: int) -> None:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef) and code_lines(function) == lines
