"""tools/golden.py prints what the library computes, once."""

from __future__ import annotations

import pytest
from support.forked import forked
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool_here

from minqwen.lab.golden import fingerprint


def test_the_fingerprint_of_the_embedded_model_is_the_one_in_the_readme():
    done = run_tool_here("golden.py", "fingerprint", "--dtype", "float32")
    dtype, digest = done.out.split()
    assert done.code == 0 and dtype == "float32"
    assert digest == fingerprint(EMBEDDED, "float32")
    assert f"float32  {digest}" in (ROOT / "README.md").read_text()


def test_rank_0_alone_prints_the_same_digest():
    done = forked(2, ROOT / "tools/golden.py", ["fingerprint", "--dtype", "float32"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == run_tool_here("golden.py", "fingerprint", "--dtype", "float32").out


@pytest.mark.parametrize(
    "args, expected",
    [
        (["fingerprint", "/nowhere"], "/nowhere"),
        (["fingerprint", "--dtype", "float32", "float31"], "invalid choice: 'float31'"),
        (["fingerprnt"], "invalid choice: 'fingerprnt'"),
        (["fingerprint", "--device", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_mistakes_are_one_line_before_any_digest(args, expected):
    done = run_tool_here("golden.py", *args)
    assert done.code == 2 and expected in done.err
    assert done.err.count("\n") == 1 and not done.out
