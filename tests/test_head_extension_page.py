"""docs/head-extension.md: its commands run. (`heads.py demo` runs in tests/tools/test_heads.py.)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.paths import ROOT
from support.tool import run_tool_here

PAGE = (ROOT / "docs" / "head-extension.md").read_text()
COMMANDS = re.search(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)[1].splitlines()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[str]:
    """What each command prints."""
    wide = str(tmp_path_factory.mktemp("page") / "wide")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for line in COMMANDS:
            python, tool, *args = shlex.split(line.replace("/tmp/wide", wide), comments=True)
            assert python == "python"
            if args == ["demo"]:
                continue
            done = run_tool_here(Path(tool).name, *args)
            assert done.code == 0, done.err
            found.append(done.out)
    return found


def test_the_commands_prove_that_the_model_is_the_same(told):
    plan, extended, verified, generated = told
    assert "32" in plan and "28 query and 4 KV heads" in extended
    assert "bitwise" in verified
    assert generated.strip()
