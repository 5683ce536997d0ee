"""The README's commands and its Python run as written and print what it promises.

Only the first command starts torchrun, whose every rank imports torch anew. The second `torchrun`
line has the same ranks, forked from a process that has imported it. Tools run in this process.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from support.forked import forked
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool_here
from support.torchrun import torchrun

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
START, SEVEN = (text.splitlines() for language, text in BLOCKS if language == "bash")
PRINTED = next(text for language, text in BLOCKS if not language)
INSTALL = re.compile(r'^pip install -e (\.|"\.\[test\]") && ')
TORCHRUN = ["torchrun", "--nproc-per-node", "4"]


def test_it_is_two_screens():
    assert len(README.splitlines()) <= 120


def test_the_first_command_prints_what_the_readme_says():
    command = shlex.split(INSTALL.sub("", START[0]))
    assert command[:3] == TORCHRUN and INSTALL.match(START[0])
    done = torchrun(4, ROOT / command[3], command[4:])
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED


def test_the_second_command_runs_the_tests():
    assert INSTALL.sub("", START[1]) == "python -m pytest -q" and len(START) == 2
    assert "[tool.pytest.ini_options]" in (ROOT / "pyproject.toml").read_text()


def test_the_python_runs_as_written_from_any_directory(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 1
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert PRINTED.startswith(f"And God said{out[:24]}") and "Logprob(" in out


@pytest.fixture
def seven(monkeypatch) -> list[list[str]]:
    """The commands for a 7B, with the embedded model in its place."""
    first, *commands = SEVEN
    assert first.startswith("MODEL=")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 47 + 38?"))
    return [shlex.split(line.replace("$MODEL", str(EMBEDDED)), comments=True) for line in commands]


def test_the_commands_for_a_7b_run_with_the_embedded_model(seven):
    plan, chat, ranks = seven
    told = [run_tool_here(Path(words[1]).name, *words[2:]) for words in (plan, chat)]
    assert [done.code for done in told] == [0, 0], told
    assert "GB per GPU" in told[0].out and "28 query and 4 KV heads" in told[0].out
    assert told[1].out.strip()
    assert ranks[:3] == TORCHRUN
    done = forked(4, ROOT / ranks[3], ranks[4:])
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["text"]
