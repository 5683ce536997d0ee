"""Lines of code that a page quotes: are they in the file, at the line that the page says?

In a block of Python the line `# minqwen/model/rope.py:103` stands above the lines that it quotes,
which are shown without their common indentation. When code has moved, the numbers are mended by

    PYTHONPATH=tests python -m support.quoted_code docs/model.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

# The line that names a place, and what follows up to the next one or the end of the block.
QUOTE = re.compile(r"^# (\S+\.py):(\d+)\n(.*?)(?=^# \S+\.py:\d+\n|^```)", re.M | re.S)


@dataclass(frozen=True)
class Quote:
    """Lines of a page, and where the page says that they are."""

    file: str
    line: int
    lines: tuple[str, ...]


def quotes(page: str) -> Iterator[Quote]:
    for found in QUOTE.finditer(page):
        yield Quote(found[1], int(found[2]), tuple(found[3].splitlines()))


def line_of(quote: Quote) -> int:
    """The line of the file at which the quote begins. It must stand there once."""
    code = (ROOT / quote.file).read_text().splitlines()
    count = len(quote.lines)
    places = [i + 1 for i in range(len(code)) if same(code[i : i + count], quote.lines)]
    first = quote.lines[0]
    assert places, f"{quote.file} no longer has these {count} lines: {first}"
    assert len(places) == 1, f"{quote.file} has {first} at {places}: quote more of it"
    return places[0]


def same(code: list[str], quoted: tuple[str, ...]) -> bool:
    """Whether lines are the same, but for an indentation that they have in common."""
    indent = len(code[0]) - len(code[0].lstrip())
    return tuple(line[indent:] for line in code) == quoted


def mended(page: str) -> str:
    """The page with the right line numbers. Raises AssertionError where a quote is not the code."""
    for quote in quotes(page):
        place = f"# {quote.file}:{{}}\n{quote.lines[0]}\n"
        page = page.replace(place.format(quote.line), place.format(line_of(quote)))
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(mended(path.read_text()))
