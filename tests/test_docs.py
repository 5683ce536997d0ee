"""What docs/architecture.md names exists, and its map of the files is whole."""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT
from support.references import missing

PAGE = ROOT / "docs" / "architecture.md"


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
