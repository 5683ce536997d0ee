"""docs/README.md names every page once, and every link between the pages works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.paths import ROOT

DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ {0,3}```.*?^ {0,3}```", re.M | re.S)
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("*.ipynb")),
    *sorted((ROOT / "weights").rglob("*.md")),
]


def prose(page: Path) -> str:
    """A page without its blocks of code; of a notebook its texts."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: a heading in small letters, with - for a space."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken(page: Path, text: str) -> list[str]:
    """The links of a page's text to files or headings that are not there."""
    gone = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            gone.append(link)
    return gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_works(page):
    assert broken(page, prose(page)) == []


def test_a_broken_link_is_seen():
    text = "[a](model.md) [b](nowhere.md) [c](model.md#attention) [d](model.md#nothing)"
    assert broken(INDEX, text) == ["nowhere.md", "model.md#nothing"]


def test_the_index_names_every_page_once_in_one_line_or_two():
    named = [link for link in LINK.findall(prose(INDEX)) if "/" not in link]
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", prose(INDEX), re.M)
    pages = {page.name for page in PAGES if page.parent == DOCS} - {"README.md"}
    assert set(listed) == pages, "docs/README.md lists each page: - [Title](page.md): what it is"
    assert len(listed) == len(pages) and set(named) == pages


def test_no_line_is_wider_than_100_columns_but_tables_and_output():
    """What a program prints, a table's row, a heading, a picture or a link may be wider."""
    wide = []
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for line in prose(page).splitlines():
            if len(line) > 100 and not line.startswith(("|", "    ", "#", "!")):
                wide.append(f"{page.name}: {line[:60]}")
    assert wide == []
