"""tools/train_embedded as a user runs it: what it refuses, before it trains or writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tool import run_tool_here

VERSE = "In the beginning God created the heaven and the earth."


def refused(*args: object) -> str:
    result = run_tool_here("train_embedded", "--quiet", *args)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    return result.err


@pytest.fixture
def short_bible(tmp_path: Path) -> Path:
    """60 chapters: enough to hold one out, too little text for 2,038 tokens."""
    path = tmp_path / "bible.txt"
    path.write_text("".join(f"Ps{i}:1 {VERSE}\n" for i in range(60)))
    return path


def test_a_text_that_is_not_there_is_told_in_one_line(tmp_path):
    missing = tmp_path / "bible.txt"
    assert f"--text {missing}: does not exist" in refused("--text", missing)


@pytest.mark.parametrize(
    "text, says",
    [
        ("In the beginning\n", "line 1 of the text is 'In the beginning', expected a verse"),
        (f"Ge1:1 {VERSE}\n", "the text has 1 chapters, expected at least 50"),
    ],
)
def test_a_text_that_is_not_the_bible_is_refused(tmp_path, text, says):
    path = tmp_path / "bible.txt"
    path.write_text(text)
    assert says in refused("--text", path)


def test_a_text_that_is_too_short_for_the_tokenizer_is_refused(tmp_path, short_bible):
    out, run = tmp_path / "out", tmp_path / "run"
    error = refused("--text", short_bible, "--out", out, "--run", run)
    assert "expected 2,038" in error and "give a longer text" in error
    assert not out.exists() and not run.exists()


def test_a_place_that_holds_something_else_is_refused(tmp_path, short_bible):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    error = refused("--text", short_bible, "--out", tmp_path / "out", "--run", tmp_path / "run")
    assert f"--out {tmp_path / 'out'}: exists and is not a checkpoint" in error
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there_cannot_be_measured(tmp_path, short_bible):
    error = refused("--evaluate", "--text", short_bible, "--out", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in error


def test_a_number_that_is_not_positive_is_refused_by_its_flag(tmp_path):
    for flag in ("--minutes", "--steps", "--threads", "--muon-lr"):
        result = run_tool_here("train_embedded", flag, "0")
        assert result.code == 2 and f"argument {flag}: 0 is not" in result.err
