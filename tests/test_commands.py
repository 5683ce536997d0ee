"""`minqwen COMMAND` is the tool of that name, and messages call tools as they are called here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.tool import run_tool_here
from support.torchrun import torchrun

from minqwen import commands
from minqwen.commands import as_called_here, forget_tools
from minqwen.errors import MinqwenError

TOOLS = sorted(path.stem for path in (ROOT / "tools").iterdir() if path.name[0] not in "._")


def without_packages(*args: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    """`minqwen ARGS` in a Python that has no installed package, and so no torch."""
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "_minqwen.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={"RANK": rank})


def test_help_lists_every_tool_with_one_line_and_does_not_need_torch():
    done = without_packages("--help")
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^  ([\w-]+) +(\S.*)$", done.stdout.partition("commands:")[2], re.M)
    assert [name for name, _ in told] == [name.replace("_", "-") for name in TOOLS]
    assert all(line.endswith((".", "?")) for _, line in told), told


def test_without_a_command_the_list_is_told_as_a_mistake():
    done = without_packages()
    assert (done.returncode, done.stdout) == (2, "") and "  generate " in done.stderr


def test_the_version_is_that_of_the_checkout():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    done = without_packages("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"minqwen {version} (torch not installed, Python ")


@pytest.mark.parametrize(
    "word, says",
    [
        ("generat", "there is no command 'generat'; did you mean 'generate'?"),
        ("Heads", "did you mean 'heads'?"),
        ("zzz", "there is no command 'zzz' (see minqwen --help)"),
        ("--model", "there is no command '--model'"),
        ("../tools/heads", "there is no command '../tools/heads'"),
        ("__main__", "there is no command '__main__'"),
    ],
)
def test_an_unknown_command_is_refused_in_one_line(word, says):
    done = without_packages(word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_other_ranks_do_not_repeat_it():
    done = without_packages("generat", rank="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_command_is_the_tool():
    done = run_tool_here("_minqwen.py", "trace", "points")
    assert done.code == 0 and done == run_tool_here("trace.py", "points")


@pytest.mark.parametrize("name", ["make-checkpoint", "make_checkpoint"])
def test_a_command_of_two_words_has_a_hyphen_or_an_underscore(name):
    done = run_tool_here("_minqwen.py", name, "--help")
    assert done.code == 0 and done.out.startswith(f"usage: minqwen {name} ")


def test_usage_and_mistakes_of_a_command_name_it_and_not_the_file():
    done = run_tool_here("_minqwen.py", "heads", "--help")
    assert done.code == 0 and done.out.startswith("usage: minqwen heads ")
    assert "minqwen heads plan MODEL" in done.out and "tools/" not in done.out
    done = run_tool_here("_minqwen.py", "trace", "show", "x", "--names", "nothing")
    assert done.code == 2 and "`minqwen trace points` lists them" in done.err
    done = run_tool_here("trace.py", "show", "x", "--names", "nothing")
    assert done.code == 2 and "`tools/trace.py points` lists them" in done.err


@pytest.mark.parametrize(
    "text, called",
    [
        ("python tools/heads.py plan MODEL --tp 8", "minqwen heads plan MODEL --tp 8"),
        ("`tools/trace.py points` lists them", "`minqwen trace points` lists them"),
        ("python tools/make_checkpoint.py DST", "minqwen make-checkpoint DST"),
        (
            "torchrun --nproc-per-node 4 tools/generate.py --chat",
            "torchrun --nproc-per-node 4 -m minqwen generate --chat",
        ),
        ("/home/me/tools/heads.py: no such file", "/home/me/tools/heads.py: no such file"),
        ("my-tools/heads.py: no such file", "my-tools/heads.py: no such file"),
        ("apt install build-tools", "apt install build-tools"),
    ],
)
def test_a_text_names_tools_as_they_are_called_here(monkeypatch, text, called):
    assert as_called_here(text) == str(MinqwenError(text)) == text
    monkeypatch.setattr(sys, "argv", ["minqwen heads"])
    assert as_called_here(text) == str(MinqwenError(text)) == called
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    monkeypatch.setattr(commands, "INSTALLED", True)
    assert as_called_here(text) == called


def test_a_tool_does_not_find_its_neighbours_in_place_of_pythons_modules(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), "/elsewhere"])
    forget_tools()
    assert sys.path == ["/elsewhere"]
    for first in (str(ROOT), str(ROOT / "tools" / "train_embedded"), ""):
        monkeypatch.setattr(sys, "path", [first, "/elsewhere"])
        forget_tools()
        assert sys.path == [first, "/elsewhere"]


def test_two_ranks_run_a_command_as_a_module():
    flags = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "4")
    done = torchrun(2, Path("-m"), ["minqwen", "generate", "And God said", *flags])
    alone = run_tool_here("generate.py", "And God said", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out and alone.out
