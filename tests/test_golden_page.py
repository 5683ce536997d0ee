"""docs/golden.md: its commands and its Python run as they stand there."""

from __future__ import annotations

import re
import shlex

import torch
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool_here

from minqwen.lab.packs.streaming import HEAD_BYTES, ROW_BLOCK

PAGE = (ROOT / "docs" / "golden.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)


def run(commands: str) -> None:
    for line in commands.replace("\\\n", " ").splitlines():
        python, tool, *args = shlex.split(line, comments=True)
        assert (python, tool) == ("python", "tools/golden.py")
        args = [str(EMBEDDED) if arg == "weights/embedded" else arg for arg in args]
        done = run_tool_here("golden.py", *args)
        assert done.code == 0, done.err


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, text in BLOCKS:
        if language == "bash":
            run(text)
        else:
            exec(text, names)
    assert names["ids"].shape == names["values"].shape == (3, 5)
    assert names["values"].dtype == torch.float64
    assert {path.name for path in tmp_path.iterdir()} == {"pack", "small", "top", "streamed"}


def test_its_figures_are_those_of_the_code():
    assert f"{HEAD_BYTES >> 20} MiB" in PAGE and f"multiples of {ROW_BLOCK} rows" in PAGE
