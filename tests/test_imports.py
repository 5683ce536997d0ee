"""Imports go down the list of rooms, in no circle, and take no private name of another file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.paths import ROOT

# From the bottom to the top. A room imports itself and the rooms before it.
ROOMS = [
    ["commands"],
    ["interrupts"],
    ["errors"],
    ["files"],
    ["checks"],
    ["confined"],
    ["config"],
    ["tokenizer"],
    ["board"],
    ["watch"],
    ["parallel"],
    ["agreement"],
    ["model"],
    ["checkpoint"],
    ["heads"],
    ["sampling"],
    ["engine"],
    ["lab"],
    ["serve"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]
HEIGHT = {name: height for height, room in enumerate(ROOMS) for name in room}
# What is computed depends on a config and on the ranks. (checks words the refusals.)
MODEL_IMPORTS = {"errors", "checks", "config", "parallel", "model"}
# People know these two methods from transformers. Each of them imports what loads or saves. There
# are no other imports inside functions.
LAZY = {
    ("minqwen.model.qwen2", "from_pretrained", "heads"),
    ("minqwen.model.qwen2", "save_pretrained", "checkpoint"),
}


class Import(NamedTuple):
    """One name that a file imports, at its top or anywhere else."""

    importer: str  # "minqwen.model.qwen2", "tools.heads", "tests.test_config", "support.paths"
    line: int
    function: str  # the function that the import is in, or ""
    name: str  # "minqwen.files.write_text", "minqwen.model.exact", "json"
    module: str  # the part of the name that is a file of this repository, or ""
    alias: str  # what the importer calls it

    def is_lazy_and_documented(self) -> bool:
        return (self.importer, self.function, room(self.module)) in LAZY


def python_files(root: Path) -> dict[str, Path]:
    """Every file by its module's name. Tests import `support`, which lies in tests/."""
    found = {}
    for folder in ("minqwen", "tools", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if name.startswith("tests.support"):
                name = name.removeprefix("tests.")
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(importer: str, tree: ast.AST, files: dict[str, Path]) -> list[Import]:
    function_of: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function_of |= dict.fromkeys(ast.walk(node), node.name)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for item in node.names:
            name = module = package + item.name
            while module and module not in files:
                module = module.rpartition(".")[0]
            function, alias = function_of.get(node, ""), item.asname or item.name
            found.append(Import(importer, node.lineno, function, name, module, alias))
    return found


def wrong_place(i: Import, files: dict[str, Path]) -> str | None:
    """What is wrong when this file, wherever it is, imports that one."""
    folder, _, _ = i.importer.rpartition(".")
    first = i.name.split(".")[0]
    if first == "minqwen":
        if i.function and not i.is_lazy_and_documented():
            return "imports belong at the top of a file"
        return None
    if first == "support":
        return None if folder.split(".")[0] in ("tests", "support") else "only tests import support"
    if folder.startswith("tools.") and f"{folder}.{first}" in files:
        return None  # a program that is a folder of files
    others = [name for name in files if name.split(".")[0] in ("tools", "benchmarks", "tests")]
    if any(first in name.split(".") for name in others):
        return "nothing imports tools, benchmarks or tests"
    return None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def wrong_direction(i: Import) -> str | None:
    """What is wrong when one file of the package imports another."""
    if not (i.importer.startswith("minqwen") and i.module.startswith("minqwen")):
        return None
    here, there = room(i.importer), room(i.module)
    if here not in HEIGHT or there not in HEIGHT:
        return "a file is in no room, see ROOMS"
    if i.is_lazy_and_documented():
        return None
    if here == "model" and there not in MODEL_IMPORTS:
        return "model/ imports only a config and the ranks"
    if HEIGHT[there] > HEIGHT[here]:
        return "a room imports only the rooms before it"
    return None


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST, imported: list[Import]) -> Iterator[tuple[int, str]]:
    """Lines where a file uses a private name of another: imports it, reads it or replaces it."""
    ours = [i for i in imported if i.module]
    for i in ours:
        if any(is_private(part) for part in i.name.split(".")):
            yield i.line, i.name
    aliases = {i.alias for i in ours}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=name):  # files._name
                pass
            case ast.Call(args=[owner, ast.Constant(value=name), *_]):  # setattr(files, "_name", 1)
                pass
            case _:
                continue
        if is_private(name) and ast.unparse(owner) in aliases:
            yield node.lineno, f"{ast.unparse(owner)}.{name}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a ring, the first once more at the end; or nothing."""
    rest = dict(graph)
    while leaves := [file for file in rest if not rest[file] & rest.keys()]:
        for file in leaves:
            del rest[file]
    if not rest:
        return []
    path = [min(rest)]
    while path[-1] not in path[:-1]:
        path.append(min(rest[path[-1]] & rest.keys()))
    return path[path.index(path[-1]) :]


def faults(root: Path) -> list[str]:
    """One line for each thing that is wrong with the imports of a tree."""
    files, found, graph = python_files(root), [], {}
    for importer, path in files.items():
        where, tree = path.relative_to(root), ast.parse(path.read_text(), path)
        imported = imports_of(importer, tree, files)
        graph[importer] = {i.module for i in imported if not i.is_lazy_and_documented()}
        for i in imported:
            if wrong := wrong_place(i, files) or wrong_direction(i):
                found.append(f"{where}:{i.line} imports {i.name}: {wrong}")
        for line, name in private_names(tree, imported):
            found.append(f"{where}:{line} uses {name}, which is private")
    if ring := circle(graph):
        found.append(f"these import each other: {' -> '.join(ring)}")
    return found


def test_every_file_imports_only_what_it_may():
    assert faults(ROOT) == []


SMALL_TREE = {
    "minqwen/__init__.py": "from minqwen.model.qwen2 import Qwen2",
    "minqwen/errors.py": "import json",
    "minqwen/config.py": "from minqwen.errors import Error",
    "minqwen/tokenizer.py": "",
    "minqwen/model/rope.py": "from minqwen.config import Config",
    "minqwen/model/qwen2.py": "from minqwen.model import rope\n"
    "def save_pretrained():\n    from minqwen.checkpoint import load",
    "minqwen/checkpoint/__init__.py": "from minqwen.checkpoint.load import load",
    "minqwen/checkpoint/load.py": "from minqwen.model.qwen2 import Qwen2",
    "tools/generate.py": "import minqwen",
    "tools/train/__main__.py": "from data import texts",
    "tools/train/data.py": "import minqwen.config",
    "benchmarks/speed.py": "from minqwen.checkpoint import load",
    "tests/test_trace.py": "from support.tool import run\nfrom minqwen import config",
    "tests/support/tool.py": "from minqwen.model import rope",
}
PLANTED = {
    "upwards": ("minqwen/errors.py", "from minqwen.config import C", "only the rooms before it"),
    "upwards, for a type": (
        "minqwen/config.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minqwen.model.rope import R",
        "config.py:3 imports minqwen.model.rope.R: a room imports only",
    ),
    "the package itself": ("minqwen/config.py", "import minqwen", "only the rooms before it"),
    "a file in no room": ("minqwen/new.py", "import minqwen.errors", "a file is in no room"),
    "model, the tokenizer": (
        "minqwen/model/rope.py",
        "import minqwen.tokenizer",
        "model/ imports only a config",
    ),
    "inside a function": (
        "minqwen/checkpoint/load.py",
        "def f():\n    import minqwen.errors",
        "load.py:2 imports minqwen.errors: imports belong at the top",
    ),
    "a third lazy line": (
        "minqwen/model/qwen2.py",
        "def save():\n    from minqwen.checkpoint import load",
        "imports belong at the top",
    ),
    "a circle in a room": (
        "minqwen/model/rope.py",
        "from minqwen.model import qwen2",
        "minqwen.model.qwen2 -> minqwen.model.rope -> minqwen.model.qwen2",
    ),
    "a private name": (
        "minqwen/config.py",
        "from minqwen.errors import _line",
        "uses minqwen.errors._line",
    ),
    "a private attribute": (
        "tests/test_trace.py",
        "from minqwen.model import rope as r\nr._turn(1)",
        "test_trace.py:2 uses r._turn",
    ),
    "a private method of a class": (
        "benchmarks/speed.py",
        "from minqwen import Qwen2\nQwen2._load()",
        "uses Qwen2._load",
    ),
    "a private name, replaced": (
        "tests/test_trace.py",
        "from minqwen import config\nmonkeypatch.setattr(config, '_room', 3)",
        "uses config._room",
    ),
    "a tool imports a tool": ("tools/heads.py", "import generate", "nothing imports tools"),
    "a test imports a test": ("tests/test_b.py", "import test_trace", "nothing imports tools"),
    "a test imports a tool": ("tests/test_b.py", "from tools import generate", "nothing imports"),
    "a benchmark imports a file of a tool": ("benchmarks/b.py", "import data", "nothing imports"),
    "tools import support": (
        "tools/heads.py",
        "import support.tool",
        "only tests import support",
    ),
}


def faults_of(root: Path, tree: dict[str, str]) -> list[str]:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return faults(root)


def test_a_tree_without_faults_has_none(tmp_path):
    assert faults_of(tmp_path, SMALL_TREE) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path, fault):
    file, text, complaint = PLANTED[fault]
    found = faults_of(tmp_path, {**SMALL_TREE, file: text})
    assert found and complaint in found[0], found  # an import upwards may also close a circle
