"""docs/debugging.md: its commands run as they stand there, in one process."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.tool import run_tool_here
from transformers.models.qwen2 import modeling_qwen2

PAGE = (ROOT / "docs" / "debugging.md").read_text()
FOLDER = "/tmp/minqwen-debug"


def run_script(path: str) -> None:
    """A script of the reader, with what it changes in transformers taken back."""
    right = modeling_qwen2.repeat_kv
    sys.path.insert(0, path.rpartition("/")[0])
    try:
        runpy.run_path(path)
    finally:
        modeling_qwen2.repeat_kv = right
        sys.path.pop(0)
        sys.modules.pop("dump", None)


def run(block: str, folder: str) -> list[tuple[int, str]]:
    """The exit code and the output of each tool that a block calls."""
    block = block.replace(FOLDER, folder).replace("max_length=300", "max_length=120")  # quicker
    told = []
    for command in re.findall(r"^cat > .*?^END$|^[^\n]+$", block, re.M | re.S):
        words = shlex.split(command.partition("\n")[0])
        if words[0] != "python":
            subprocess.run(["bash", "-e", "-c", command], check=True)
        elif words[1].startswith("tools/"):
            done = run_tool_here(words[1].removeprefix("tools/"), *words[2:])
            assert done.code < 2, done.err
            told.append((done.code, done.out))
        else:
            run_script(words[1])
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the tools say, in the page's order."""
    folder = str(tmp_path_factory.mktemp("debug") / "minqwen-debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = []
        for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S):
            if "rm -rf" in block:  # never that of the reader
                assert block.startswith(f"rm -rf {FOLDER} && mkdir {FOLDER} && ")
            found += run(block, folder)
    return found


def shape(sentence: str) -> str:
    """A sentence without its numbers, which other weights change."""
    return re.sub(r"\d+(\.\d+)?", "0", sentence)


def promised(text: str) -> list[str]:
    """The lines of output that a text shows."""
    return re.findall(r"^    (\S.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def test_diff_names_the_mistake_and_the_page_mends_it(told):
    make, diff, explain, mended, *_ = told
    assert (make[0], diff[0], explain[0], mended[0]) == (0, 1, 0, 0)
    wrong, right = diff[1].splitlines()[-1], mended[1].splitlines()[-1]
    assert wrong.startswith("first wrong: layer 0, attention scores (")
    assert "most like `heads-tiled`" in wrong
    assert shape(wrong) == shape(promised(PAGE)[0])
    assert shape(right) == shape(promised(PAGE)[1])
    assert "heads-tiled" in explain[1]


def test_the_audit_names_it_from_log_probabilities_alone(told):
    audit, pairs = told[4:]
    assert audit[0] == pairs[0] == 1
    said, expected = audit[1].splitlines()[0], promised(PAGE)[2]
    assert "most like heads-tiled (" in said
    assert shape(said).partition("; next is")[0] == shape(expected).partition("; next is")[0]
    assert shape(pairs[1].splitlines()[0]) == shape(promised(PAGE)[3])
    assert "the trainer is nearer the truth" in pairs[1]


def test_it_is_short():
    assert len(PAGE.splitlines()) <= 150
