"""The README's commands and Python blocks run as written, in order, and print what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
# The section on debugging is run by test_debugging_page.py.
BASH = [text for language, text in BLOCKS if language == "bash" and "debug" not in text]
FIRST_OUTPUT = next(text for language, text in BLOCKS if not language)


def test_the_python_blocks_run_as_written_from_any_directory(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 2
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith(" unto them, Why do ye not") and " length\n" in out
    table = [
        line for line in out.splitlines() if re.fullmatch(r"('.*?' -?\d+\.\d\d( {2}|$)){3,4}", line)
    ]
    assert len(table) == 20
    assert "7+8=15, 4+3+1=8: 85\n" in out
    assert "torch.Size([1, 28, 4, 4])" in out
    assert re.search(r"logits move by up to \d+\.\d", out)
    (king,) = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert king["king"] in ("David", "Saul") and king["years"] <= 99


def as_tested(block: str, tmp_path: Path) -> str:
    """A block without what it installs and without the tests, for the models that are here."""
    lines = [re.sub(r"^pip install \S+( \S+)? && ", "", line) for line in block.splitlines()]
    lines = [line for line in lines if not line.startswith("python -m pytest")]
    text = "\n".join(lines).replace("/tmp/wide", str(tmp_path / "wide"))
    return re.sub(r"^MODEL=\S+", f"MODEL={ROOT}/weights/embedded", text, flags=re.M)


def run(block: str, tmp_path: Path) -> str:
    """What a block prints on stdout; it must not fail."""
    bin_of_python = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-e", "-c", as_tested(block, tmp_path)],
        cwd=ROOT,
        input="What is 47 + 38?",
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": bin_of_python + os.pathsep + os.environ["PATH"],
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """What each block of commands prints, in order."""
    directory = tmp_path_factory.mktemp("readme")
    return [run(block, directory) for block in BASH]


def test_the_first_commands_print_what_the_readme_says(printed):
    assert printed[0] == FIRST_OUTPUT


def test_the_commands_for_a_7b_run_with_the_embedded_model(printed):
    assert "85" in printed[1] and '"text": ' in printed[1] and "25" in printed[1]


def test_the_commands_for_more_heads_prove_that_the_model_is_the_same(printed):
    assert "bitwise" in printed[2]
    assert FIRST_OUTPUT.splitlines()[0] in printed[2]  # on 8 ranks, of 32 heads
    assert "derive-head-dim" in printed[2]


def test_the_planner_says_what_fits(printed):
    assert "GB per GPU" in printed[3]


def test_two_ranks_share_one_copy_or_hold_two(printed):
    *text, first, second = printed[4].splitlines()
    assert text
    assert [json.loads(line)["index"] for line in (first, second)] == [0, 1]
    assert len(printed) == 5
