"""tools/evaluate.py: the tasks of docs/evaluate.md, on one rank and on several."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys

import pytest
from support.forked import forked
from support.paths import ROOT
from support.tool import run_tool_here

COMMAND = re.search(
    r"^python tools/evaluate.py (.*)", (ROOT / "docs" / "evaluate.md").read_text(), re.M
)[1]
TASKS = ("sums", "texts", "verses")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # the tasks name their data from there


@pytest.fixture(autouse=True, scope="module")
def each_directory_is_read_once():
    """The harness has thousands of task files, which take seven seconds each time."""
    try:
        index = importlib.import_module("lm_eval.tasks._index").TaskIndex
    except ImportError:  # no harness, or one that reads them elsewhere
        yield
        return
    original = index.build
    found = functools.cache(lambda root: original([root]))

    def build(paths):
        return {name: task for root in paths for name, task in found(root).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "build", staticmethod(build))
        yield


def needs_harness() -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "minqwen[eval]"')


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The page's command in this process: (what it printed, the file that it wrote)."""
    needs_harness()
    path = tmp_path_factory.mktemp("alone") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        done = run_tool_here("evaluate.py", *shlex.split(COMMAND), "--output-path", path)
    assert done.code == 0, done.err
    return done.out, json.loads(path.read_text())


def test_the_pages_command_prints_a_table(alone):
    printed, results = alone
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in printed.splitlines() if line]
    assert rows[0][0] == "Tasks" and [row[0] for row in rows[2:] if row[0]] == list(TASKS)
    assert results["config"]["model"] == "minqwen embedded"
    assert results["config"]["arithmetic"] == "native"
    assert {name: len(samples) for name, samples in results["samples"].items()} == {
        name: len((ROOT / "docs" / "tasks" / f"{name}.jsonl").read_text().splitlines())
        for name in TASKS
    }


def test_two_replicas_give_the_same(alone, tmp_path):
    path = tmp_path / "results.json"
    words = [*shlex.split(COMMAND), "--tensor-parallel-size", 1, "--output-path", path]
    done = forked(2, ROOT / "tools" / "evaluate.py", words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|Tasks") == 1  # rank 0 alone prints
    results = json.loads(path.read_text())
    for name in TASKS:
        for mine, other in zip(results["samples"][name], alone[1]["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for one, two in zip(flat(mine["resps"]), flat(other["resps"]), strict=True):
                assert one == (pytest.approx(two, abs=1e-5) if isinstance(two, float) else two)


def flat(values) -> list:
    """What lists of lists hold in the end."""
    if not isinstance(values, list):
        return [values]
    return [one for value in values for one in flat(value)]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tasks", "sumz", "--include-path", "docs/tasks"], ["sumz", "did you mean 'sums'"]),
        (["--tasks", "hellaswag"], ["hellaswag", "the network is not used"]),
        (["--tasks", "sums", "--include-path", "nowhere"], ["--include-path", "nowhere"]),
        (["--tasks", "sums", "--output-path", "no/such/file"], ["--output-path", "no directory"]),
        (["--tasks", "sums", "--limit", "-1"], ["--limit"]),
    ],
)
def test_a_mistake_is_one_line(words, said):
    needs_harness()
    done = run_tool_here("evaluate.py", *words)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    for word in said:
        assert word in line, line


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    for name in ["lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "minqwen.lab.evaluate", raising=False)
    done = run_tool_here("evaluate.py", "--tasks", "sums")
    assert done.code == 2 and done.out == ""
    assert "error: this tool needs lm_eval" in done.err and "minqwen[eval]" in done.err
