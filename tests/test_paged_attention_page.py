"""docs/paged-attention.md: its Python prints what stands under it, and what it names exists."""

from __future__ import annotations

import re

from support.paths import ROOT
from support.references import missing

PAGE = (ROOT / "docs" / "paged-attention.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)


def test_every_block_prints_what_stands_under_it(capsys):
    names: dict[str, object] = {}
    assert [language for language, _ in BLOCKS] == ["python", ""] * (len(BLOCKS) // 2)
    for (_, code), (_, printed) in zip(BLOCKS[::2], BLOCKS[1::2]):
        exec(compile(code, "paged-attention.md", "exec"), names)
        assert capsys.readouterr().out == printed


def test_every_file_and_name_that_it_mentions_exists():
    assert missing(PAGE, ROOT) == []
