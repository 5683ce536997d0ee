"""The README's Python blocks run as written, in order, in one session."""

from __future__ import annotations

import re

from support.paths import ROOT


def test_the_python_blocks_run_as_written(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "length" in capsys.readouterr().out  # a finish reason that a block prints
