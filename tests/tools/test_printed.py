"""Names and texts out of files cannot move a terminal's cursor, whatever tool prints them."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys

import pytest
from support import packs
from support.checkpoints import tiny, write
from support.paths import ROOT
from support.tokenizer import tiny_json
from support.tool import run_tool_here

from minqwen.cli import Shown, run

ODD = "\x1b[2J\x1b]0;x\x07\n\u202e\x85" + "x" * 100


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A directory whose name moves the cursor."""
    path = tmp_path_factory.mktemp("odd") / ODD
    write(path, tiny(vocab_size=260))
    tiny_json(path)
    return path


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    "args",
    [
        ("heads.py", "plan", "{}", "--tp", "8"),
        ("heads.py", "extend", "{}", "{}-wide", "--num-attention-heads", "8"),
        ("heads.py", "explain", "{}-wide"),
        ("heads.py", "shrink", "{}-wide", "{}-back"),
        ("plan.py", "{}"),
        ("golden.py", "make", "{}-pack", "--model", "{}", "--ids", "5,17", "--run", "float64"),
        ("golden.py", "verify", "{}-pack"),
    ],
)
def test_the_name_of_a_directory_is_shown_escaped(odd, args):
    done = run_tool_here(*(word.replace("{}", str(odd)) for word in args))
    assert done.code == 0, done
    assert printable(done.out) and printable(done.err), done
    assert "\\x1b[2J" in done.out + done.err or args[1] in ("explain", "verify"), done


def test_texts_of_a_packs_manifest_are_shown_escaped_or_refused(tmp_path):
    packs.pack(tmp_path)
    for change, code in (
        (lambda content: content["machine"].update(cpu=ODD), 0),
        (lambda content: content["points"].update({ODD: None}), 2),
        (lambda content: content.update(machine={"cpu": [ODD]}), 2),
        (lambda content: content.update(prompts=[]), 2),
    ):
        shutil.rmtree(tmp_path / "forged", ignore_errors=True)
        shutil.copytree(tmp_path / "pack", tmp_path / "forged")
        packs.sign(tmp_path / "forged", change)
        done = run_tool_here("golden.py", "verify", tmp_path / "forged")
        assert done.code == code and printable(done.out) and printable(done.err), done
        assert len(done.err) <= 500


def test_line_ends_and_tabs_pass_and_nothing_else_does():
    out = io.StringIO()
    print("a\tb\nGrüße \x1b[31m\r\x08\u2028\ud800", file=Shown(out))
    assert out.getvalue() == "a\tb\nGrüße \\x1b[31m\\r\\x08\\u2028\\ud800\n"


def test_stdout_is_itself_again_after_a_tool(capsys):
    before = sys.stdout
    with pytest.raises(SystemExit):
        run(lambda: print("\x1b"))
    assert sys.stdout is before and capsys.readouterr().out == "\\x1b\n"


EXACT = "from minqwen.cli import run; run(lambda: print('\\x1b[2J'), exact={})"


@pytest.mark.parametrize("exact", [False, True])
def test_a_models_own_text_is_escaped_on_a_terminal_only(exact):
    command = [sys.executable, "-c", EXACT.format(exact)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(command, capture_output=True, env=env, check=True)
    assert piped.stdout == (b"\x1b[2J\n" if exact else b"\\x1b[2J\n")
    if exact:
        ours, theirs = pty.openpty()
        subprocess.run(command, stdout=theirs, env=env, check=True)
        assert os.read(ours, 100) == b"\\x1b[2J\r\n"
