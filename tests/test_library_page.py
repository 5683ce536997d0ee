"""docs/library.md: its Python runs as written, from any directory, and prints what it promises."""

from __future__ import annotations

import json
import re

from support.paths import ROOT

PAGE = (ROOT / "docs" / "library.md").read_text()
PRINTED = re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)[-1]  # what the last block prints
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_the_blocks_run_as_written_from_any_directory(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 3
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "library.md", "exec"), names)
    out = capsys.readouterr().out
    assert " length\n" in out
    table = [
        line for line in out.splitlines() if re.fullmatch(r"('.*?' -?\d+\.\d\d( {2}|$)){3,4}", line)
    ]
    assert len(table) == 20
    (answer,) = re.findall(r"print\(sums\[0\]\.outputs\[0\]\.text\)  # (.*)", PYTHON[0])
    assert f"{answer}\n" in out
    assert "torch.Size([1, 28, 4, 4])" in out
    assert re.search(r"logits move by up to \d+\.\d", out)
    king, *_ = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert king["king"] in ("David", "Saul") and king["years"] <= 99
    assert out.endswith(PRINTED)
