"""Names of code that a page mentions, as in `minqwen/cli.py: Parser`: does each exist?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

REFERENCE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def names_of(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """The names that a module defines at its top, and those that its classes define."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= names_of(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing(page: str, root: Path) -> list[str]:
    """The references of a page to which nothing corresponds."""
    found = REFERENCE.findall(re.sub(r"\s*\n\s*", " ", page))
    assert found, "the page refers to nothing"
    gone = []
    for file, name in found:
        path = root / file
        if not path.is_file() or name not in names_of(ast.parse(path.read_text()).body):
            gone.append(f"{file}: {name}")
    return gone
