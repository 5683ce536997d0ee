"""A small share of the fuzzing of files: tests/support/hostile/fuzz.py has the long run."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hostile.fuzz import Case, fuzz
from support.hostile.mutations import mutated
from support.hostile.targets import TARGETS, Target, anything, make_all

SOUND = {"refused", "same", "as written"}
EXAMPLES = 6  # of each target


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    make_all(root)
    return root


@pytest.fixture(scope="module")
def case_of(bases):
    """One directory for each target, made once."""
    made = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(TARGETS[name], name, bases, bases / "works" / name, seed=0)
        return made[name]

    (bases / "works").mkdir()
    return case


@pytest.mark.parametrize("name", TARGETS)
@settings(
    derandomize=True,
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(number=st.integers(0, 2**32))
def test_a_changed_file_is_refused_in_one_line_or_read_as_it_is_written(case_of, name, number):
    kind, text = case_of(name).outcome(number)
    assert kind in SOUND, (name, number, kind, text)


def hang(path):
    while path.exists():
        pass


@pytest.mark.parametrize(
    "act, kind",
    [
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: "another text", "wrong"),
        (lambda path: os.write(1, b"x") - 1 or None, "prints"),
        (hang, "ends"),
    ],
)
def test_what_must_not_happen_is_found(bases, monkeypatch, act, kind):
    """The reader of the sound file is right, and of changed ones it does what it must not."""
    sound = (bases / "one" / "config.json").read_bytes()

    def read(path):
        return None if (path / "config.json").read_bytes() == sound else act(path)

    def judge(path, read, before):
        return None if read == before else "other"

    monkeypatch.setitem(TARGETS, "broken", Target("one", "config.json", read, judge))
    monkeypatch.setattr("support.hostile.fuzz.CPU_SECONDS", 0.2)
    found = fuzz(["broken"], 1, 0, bases)
    assert [(one["kind"], one["case"]) for one in found] == [(kind, 0)]


def test_a_broken_off_run_goes_on_where_it_was(bases, tmp_path, monkeypatch):
    tried = tmp_path / "tried"

    def read(path):
        with tried.open("ab") as file:
            file.write(b"x")

    monkeypatch.setitem(TARGETS, "slow", Target("one", "config.json", read, anything))
    fuzz(["slow"], 5, 0, bases, tmp_path / "state")
    once = tried.stat().st_size
    fuzz(["slow"], 5, 0, bases, tmp_path / "state")
    assert tried.stat().st_size == once + 1  # the sound file, to compare with
    fuzz(["slow"], 7, 0, bases, tmp_path / "state")
    assert tried.stat().st_size == once + 4


def test_a_case_can_be_made_again(bases):
    a, b = (Case(TARGETS["index"], "index", bases, bases / w, seed=3) for w in ("a", "b"))
    assert [a.bytes(n) for n in range(9)] == [b.bytes(n) for n in range(9)]
    assert len({mutated(a.sound, random.Random(n), is_json=True) for n in range(50)}) > 40
