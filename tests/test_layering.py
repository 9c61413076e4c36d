"""The layers of the package: imports go downward only, and only some modules may touch cuda, torch or the terminal."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"

# A module's level, by its own name or its sub-package's. The package itself, `pipeline/__init__.py`, is a face.
LEVELS = {
    part: level
    for level, parts in enumerate(
        [
            ["errors", "dtypes", "options", "keywords", "exclusive", "config", "instrument"],
            ["arrays", "pages", "rows", "flow"],
            ["epilogues"],
            ["kernels"],
            ["layer"],
            ["devices"],
            ["staging", "pinned"],
            ["io", "executor"],
            ["report"],
            ["tuning", "plan"],
            ["upload", "station", "fleet", "kept", "run", "api"],
            ["torch_op", "demo", "testing", ""],
            ["cli"],
            ["__main__"],
        ]
    )
    for part in parts
}


@dataclass(frozen=True)
class Import:
    """`module` names `target` (dotted, absolute) at `line`; `deferred` where it happens inside a function."""

    module: str
    target: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.module} line {self.line} imports {self.target}"


def module_name(path: Path) -> str:
    """`pipeline.io.sources` for `pipeline/io/sources.py`, `pipeline.io` for `pipeline/io/__init__.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def targets_of(module: str, is_package: bool, node: ast.Import | ast.ImportFrom, modules: set[str]) -> list[str]:
    """What an import statement names: `from pipeline import errors` is pipeline.errors, where such a module exists."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.split(".") if is_package else module.split(".")[:-1]
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, base] if base else package)
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in modules or base == "cuda" else base for name in names]


def imports_of(module: str, source: str, *, is_package: bool = False, modules: set[str] | None = None) -> list[Import]:
    """Every import of a module, deferred ones too; those for type checkers only are left out."""
    known = set(MODULES) if modules is None else modules

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets_of(module, is_package, node, known):
                yield Import(module, target, node.lineno, deferred)
            return
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.orelse:
                yield from walk(child, deferred)
            return
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return list(walk(ast.parse(source), False))


def all_imports() -> list[Import]:
    return [
        found
        for name, path in MODULES.items()
        for found in imports_of(name, path.read_text(), is_package=path.name == "__init__.py")
    ]


def part_of(module: str) -> str:
    """The part a module belongs to: `io` for pipeline.io.sources, `api` for pipeline.api, "" for pipeline itself."""
    return [*module.split("."), ""][1]


def subpackage_of(module: str) -> str:
    """The sub-package whose modules see each other: `io`, or "" for the modules at the package's top."""
    part = part_of(module)
    return part if (PACKAGE / part).is_dir() else ""


def is_allowed(found: Import) -> bool:
    if found.target.split(".")[0] != "pipeline":
        return True
    own, other = LEVELS[part_of(found.module)], LEVELS[part_of(found.target)]
    return other < own or (other == own and subpackage_of(found.module) == subpackage_of(found.target))


def test_layering_every_module_has_a_level() -> None:
    assert {part_of(module) for module in MODULES} <= set(LEVELS)


def test_layering_imports_go_downward_only() -> None:
    assert [str(found) for found in all_imports() if not is_allowed(found)] == []


def circle_in(edges: dict[str, set[str]]) -> str:
    """One circle of imports, or an empty text."""
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> str:
        if module in path:
            return " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in sorted(edges[module]):
                if found := visit(target, (*path, module)):
                    return found
            finished.add(module)
        return ""

    return next(filter(None, (visit(module, ()) for module in edges)), "")


def test_layering_modules_do_not_import_each_other_in_circles() -> None:
    """Inside functions neither."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in all_imports():
        if found.target in MODULES and found.target != found.module:
            edges[found.module].add(found.target)
    assert circle_in(edges) == ""


def test_layering_rule_finds_circles() -> None:
    assert circle_in({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == "b -> c -> b"
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ""


def test_layering_only_kernels_and_the_cuda_device_import_cuda() -> None:
    users = {found.module for found in all_imports() if found.target.split(".")[0] == "cuda"}
    assert [user for user in sorted(users) if part_of(user) != "kernels" and user != "pipeline.devices.cuda"] == []


def test_layering_only_torch_op_imports_torch_on_import() -> None:
    eager = {found.module for found in all_imports() if found.target.split(".")[0] == "torch" and not found.deferred}
    assert eager <= {"pipeline.torch_op"}


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) != "cli"])
def test_layering_only_the_command_line_prints(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    prints = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
    streams = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("stdout", "stderr")
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    ]
    assert prints + streams == []


@pytest.mark.parametrize(
    ("module", "source", "target", "allowed"),
    [
        ("pipeline.executor", "from pipeline.devices.base import Device", "pipeline.devices.base", True),
        ("pipeline.config", "from pipeline import errors", "pipeline.errors", True),
        ("pipeline.io.sinks", "from pipeline.io import journal", "pipeline.io", True),
        ("pipeline.io.sinks", "from .sources import Source", "pipeline.io.sources", True),
        ("pipeline.io.sinks", "from ..api import Pipeline", "pipeline.api", False),
        ("pipeline.io.sinks", "def f():\n    import pipeline.api", "pipeline.api", False),
        ("pipeline.devices.cuda", "from pipeline.io import staging", "pipeline.io", False),
        (
            "pipeline.kernels.launch",
            "try:\n    from pipeline.layer import x\nfinally:\n    pass",
            "pipeline.layer",
            False,
        ),
        ("pipeline.layer", "import pipeline", "pipeline", False),
        ("pipeline.api", "import numpy", "numpy", True),
    ],
)
def test_layering_rule_judges_imports(module: str, source: str, target: str, allowed: bool) -> None:
    (found,) = imports_of(module, source, modules={"pipeline.errors", "pipeline.io.sources"})
    assert (found.target, is_allowed(found)) == (target, allowed)


def test_layering_imports_for_type_checkers_are_exempt() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy\n"
    assert [found.target for found in imports_of("pipeline.layer", source)] == ["numpy"]


def test_layering_imports_inside_functions_are_deferred() -> None:
    eager, deferred = imports_of("pipeline.layer", "import torch\ndef f():\n    import torch\n")
    assert (eager.deferred, deferred.deferred) == (False, True)
