"""benchmarks/mutants.py: what is changed, and what is not."""

from __future__ import annotations

import runpy

import pytest
from support.paths import ROOT

SOURCE = '''
"""A text that nobody changes."""
def f(a: int = 3, b: bool = True) -> int:
    """Neither this."""
    if a < 2 and not b:
        raise ValueError(f"no {a + 1}")
    total = 0
    for i in range(a):
        total += i * 2
        if i == 7:
            break
    self.x = total
    del self.y
    g(total)
    assert total > 1
    return total // 2
'''


@pytest.fixture(scope="module")
def mutants():
    return runpy.run_path(str(ROOT / "benchmarks" / "mutants.py"))


def test_every_kind_of_change_is_made_once(mutants):
    found = [(m.before, m.after) for m in mutants["mutants_of"]("room", "file", SOURCE)]
    assert len(found) == len(set(found)) or found.count(("2", "3")) == 3
    for change in (
        ("a < 2", "a <= 2"),
        ("a < 2 and (not b)", "a < 2 or not b"),
        ("not b", "b"),
        ("True", "False"),
        ("3", "4"),
        ("raise ValueError(f'no {a + 1}')", "pass"),
        ("total += i * 2", "pass"),
        ("i * 2", "i + 2"),
        ("i == 7", "i != 7"),
        ("break", "pass"),
        ("self.x = total", "pass"),
        ("del self.y", "pass"),
        ("g(total)", "pass"),
        ("return total // 2", "return None"),
        ("total // 2", "total * 2"),
    ):
        assert change in found, change
    assert not [one for one in found if "text" in one[0] or "a + 1" == one[0] or "> 1" in one[0]]


def test_each_mutant_is_another_program(mutants):
    count = len(mutants["mutants_of"]("room", "file", SOURCE))
    programs = {mutants["mutated"](SOURCE, n) for n in range(count)}
    assert len(programs) == count > 20
    for program in programs:
        compile(program, "mutant", "exec")


def test_a_larger_sample_has_the_mutants_of_a_smaller_one(mutants):
    sample = mutants["sample"]
    assert sample(["cache", "heads"], 20, 0)[:10] == sample(["cache", "heads"], 10, 0)
    of_one = sample(["heads"], 5, 0)
    assert of_one == [m for m in sample(["cache", "heads"], 10, 0) if m.room == "heads"]
    assert sample(["heads"], 5, 1) != of_one


def test_every_room_has_files_and_tests(mutants):
    for room in mutants["ROOMS"].values():
        for pattern in room.files:
            assert list(ROOT.glob(pattern)), pattern
        for pattern in room.tests:
            assert list((ROOT / "tests").glob(pattern)), pattern
