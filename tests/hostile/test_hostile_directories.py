"""Every damaged directory is refused in one line; every odd but sound one is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostile.bases import Reader, make_bases
from support.hostile.cases import CASES, CONFIG, TOKENIZER, VALID, both, code, edit, instead, text
from support.tool import run_tool_here

MEGABYTES = 1000  # that one directory may cost
NOISY = "backtracks"  # the expressions' own library prints its panic; nothing can keep it from that


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    make_bases(root)
    return root


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.mark.parametrize("name", VALID)
def test_a_sound_directory_is_taken_however_odd_it_is(bases, reader, name):
    got = reader.read(VALID[name], bases, bases / "work")
    assert got["kind"] == "taken", got
    assert not got["canary"] and got["megabytes"] < MEGABYTES and got["printed"] == ""


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_directory_is_refused_in_one_line(bases, reader, name):
    case = CASES[name]
    got = reader.read(case, bases, bases / "work")
    assert got["kind"] == "refused", got
    line = got["text"]
    assert line.isprintable() and len(line) <= 490
    assert not [word for word in case.words if word not in line], line
    assert not got["canary"] and not got["out"] and got["megabytes"] < MEGABYTES
    assert got["printed"] == "" or NOISY in name


def test_there_are_as_many_kinds_as_promised():
    assert len(CASES) >= 150 and len(VALID) >= 10


@pytest.mark.parametrize(
    "change, words",
    [
        (instead(CONFIG, os.mkfifo), "not a regular file"),
        (edit(CONFIG, torch_dtype="x\x1b[2J\n" * 999), "torch_dtype is 'x\\x1b[2J\\n"),
        (text(TOKENIZER, "{"), "tokenizer.json: damaged"),
        (both(code, edit(CONFIG, model_type="evil")), "model_type"),
    ],
)
def test_a_tool_says_the_same_and_ends_with_2(bases, tmp_path, change, words):
    path = tmp_path / "c\x1b[2J\nd"
    shutil.copytree(bases / "one", path)
    change(path)
    for args in (
        ["generate.py", "x", "--model", path],
        ["heads.py", "extend", path, tmp_path / "o"],
    ):
        if args[0] == "heads.py" and "tokenizer" in words:
            continue  # it is copied as it is
        done = run_tool_here(*args)
        assert done.code == 2 and done.out == "", done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert done.err[:-1].isprintable() and len(done.err) <= 500 and words in done.err, done.err
