"""Functions stay small enough to be read at once. ruff looks after formatting and long lines."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import mean

from radon.complexity import cc_visit
from radon.visitors import Class
from support.paths import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli along
    import tomli as tomllib

MOST_BRANCHES = 15  # radon's cyclomatic complexity of one function
AVERAGE_BRANCHES = 3.5  # of the package's functions and classes
MOST_LINES = 60  # of one function of the package, with its docstring


def exceptions() -> dict[str, str]:
    """pyproject.toml's functions that may be more complex, "tools/heads.py:demo" = "the reason"."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["tool"].get("minqwen", {}).get("complexity", {})


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def where(path: Path, function: str) -> str:
    return f"{path.relative_to(ROOT)}:{function}"


def complex_functions() -> dict[str, int]:
    """Functions of the package and the tools above the limit, with their complexity."""
    found = {}
    for path in [*sources("minqwen"), *sources("tools")]:
        for block in cc_visit(path.read_text()):
            if not isinstance(block, Class) and block.complexity > MOST_BRANCHES:
                found[where(path, block.fullname)] = block.complexity
    return found


def test_no_function_is_complex_except_those_with_a_reason():
    found, excused = complex_functions(), exceptions()
    assert not {name: found[name] for name in found if name not in excused}
    assert all(excused.values())


def test_no_exception_outlives_its_function():
    assert exceptions().keys() <= complex_functions().keys()


def test_the_package_is_simple_on_average():
    blocks = [block for path in sources("minqwen") for block in cc_visit(path.read_text())]
    assert mean(block.complexity for block in blocks) <= AVERAGE_BRANCHES


def test_no_function_of_the_package_is_long():
    long = {}
    for path in sources("minqwen"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1  # without its decorators
                if lines > MOST_LINES:
                    long[where(path, node.name)] = lines
    assert not long
