"""Lines of this package's own code, to be shown: taken from the files when they are asked for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minqwen.errors import MinqwenError

ROOT = Path(__file__).resolve().parents[3]

Source = Callable[..., Any] | type


@dataclass(frozen=True)
class Code:
    """Lines as they stand in a file, without their common indentation.

    file: from the directory that holds the package, "minqwen/model/qwen2.py". line: of the first.
    """

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Parsed:
    """A function or a class: its file, the number of its first line, its lines, and its tree."""

    file: str
    start: int
    lines: list[str]
    tree: ast.AST

    def code(self, first: int, last: int) -> Code:
        """The lines `first` to `last` of the function, counted from 1."""
        text = textwrap.dedent("\n".join(self.lines[first - 1 : last]))
        return Code(self.file, self.start + first - 1, text)

    def body(self) -> list[ast.stmt]:
        """The statements of a function, without its docstring."""
        (function,) = ast.iter_child_nodes(self.tree)
        assert isinstance(function, (ast.FunctionDef, ast.ClassDef))
        first, *rest = function.body
        return rest if rest and is_text(first) else function.body


@cache
def parse(source: Source) -> Parsed:
    """Raises MinqwenError where the code is not to be had."""
    try:
        lines, start = inspect.getsourcelines(source)
        path = Path(inspect.getsourcefile(source) or "").resolve()
    except (OSError, TypeError):
        raise MinqwenError(f"the code of {source} is not in a file: it cannot be shown") from None
    file = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    lines = textwrap.dedent("".join(lines)).splitlines()
    return Parsed(file, start, lines, ast.parse("\n".join(lines)))


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a text and nothing else, as a docstring is."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def whole(source: Source) -> Code:
    """All of a function or a class."""
    parsed = parse(source)
    return parsed.code(1, len(parsed.lines))


def statement(source: Source, holds: str) -> Code:
    """The first statement that holds a text or reads an attribute of that name.

    For example the line `x = x + tap("mlp.out", ...)` for "mlp.out", and `y = self.lm_head(x)` for
    "lm_head". Raises MinqwenError if there is none.
    """
    parsed = parse(source)
    for found in simple_statements(parsed.tree):
        if mentions(found, holds):
            return parsed.code(found.lineno, found.end_lineno or found.lineno)
    raise MinqwenError(f"no statement of {source} holds {holds!r}")


def between(function: Source, after: str = "", until: str = "") -> Code:
    """The body of a function, without its docstring, or a part of it.

    after: the part begins behind the statement that holds this. until: it ends with that one.
    """
    parsed = parse(function)
    body = parsed.body()
    first = 1 + position(body, after) if after else 0
    last = position(body, until) if until else len(body) - 1
    end = body[last].end_lineno
    assert end is not None
    return parsed.code(body[first].lineno, end)


def position(body: list[ast.stmt], holds: str) -> int:
    """Which statement holds a text. Raises MinqwenError if none does."""
    for i, found in enumerate(body):
        if mentions(found, holds):
            return i
    raise MinqwenError(f"no statement holds {holds!r}")


def simple_statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that hold no others, in their order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt) and not getattr(node, "body", None) and not is_text(node):
            yield node
        yield from simple_statements(node)


def mentions(tree: ast.AST, name: str) -> bool:
    """Whether a text is `name`, or an attribute is called so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == name:
            return True
        if isinstance(node, ast.Attribute) and node.attr == name:
            return True
    return False
