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


def test_the_lines_of_a_change_are_its_statement_or_the_head_of_one(mutants):
    found = mutants["mutants_of"]("room", "file", SOURCE)
    lines = {one.before: mutants["statement_lines"](SOURCE, one.index) for one in found}
    assert lines["a < 2"] == lines["a < 2 and (not b)"] == range(5, 6)
    assert lines["raise ValueError(f'no {a + 1}')"] == range(6, 7)
    assert lines["True"] == range(3, 4) and lines["total // 2"] == range(16, 17)
    spread = "def f(a):\n    if (a and\n        a > 1):\n        return g(a,\n            a + 1)\n"
    found = mutants["mutants_of"]("room", "file", spread)
    lines = {one.before: mutants["statement_lines"](spread, one.index) for one in found}
    assert lines["a > 1"] == range(2, 4) and lines["a + 1"] == range(4, 6)


def test_who_executes_the_change_is_asked_first_the_fastest_before_the_others(mutants):
    known = {
        name: mutants["Known"](seconds, {"f.py": lines})
        for name, seconds, lines in (("slow", 2.0, [1, 5]), ("quick", 0.5, [5]), ("no", 0.1, [6]))
    }
    assert mutants["by_time"](known, "f.py", range(4, 6)) == ["quick", "slow"]
    assert mutants["by_time"](known, "g.py", range(4, 6)) == []


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
