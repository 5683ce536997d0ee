"""What docs/architecture.md names exists, and its map of the files is whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.paths import ROOT

PAGE = ROOT / "docs" / "architecture.md"
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


def test_every_file_and_name_in_the_walks_exists():
    assert missing(PAGE.read_text(), ROOT) == []


@pytest.mark.parametrize("wrong", ["minqwen/engine/nowhere.py: LLM", "minqwen/cli.py: Parser.gone"])
def test_a_reference_to_nothing_is_seen(wrong):
    assert missing(f"{PAGE.read_text()} `{wrong}`", ROOT)[-1] == wrong


def test_each_walk_fits_on_half_a_screen():
    walks = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:5]
    assert len(walks) == 4
    for walk in walks:
        assert len(walk.splitlines()) <= 32, walk.splitlines()[0]


def unnamed(page: str) -> list[str]:
    """The rooms, tools and files of the lab that the map has no word for.

    `lab/verify_page.py` is named by "verify".
    """
    words = set(re.findall(r"\w+", page.partition("\n## The files\n")[2]))
    gone = []
    for folder in ("minqwen", "minqwen/lab", "tools"):
        for path in sorted((ROOT / folder).iterdir()):
            counts = path.suffix == ".py" or (path / "__init__.py").exists()
            name = path.stem
            if counts and name[0] != "_" and not {name, name.partition("_")[0]} & words:
                gone.append(f"{folder}/{path.name}")
    return gone


def test_the_map_names_every_room_every_tool_and_every_file_of_the_lab():
    assert unnamed(PAGE.read_text()) == []


def test_a_file_without_its_word_is_seen():
    page = PAGE.read_text().replace("soak", "").replace("doctor", "")
    assert unnamed(page) == ["minqwen/lab/soak.py", "tools/doctor.py"]
