"""docs/calls.md: its Python prints what stands there, and its tables are those of the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import pytest
from support.forked import forked_torchrun
from support.paths import EMBEDDED, ROOT
from support.tool import run_tool

from minqwen.engine.arguments import IDLE, OF_CALLS, ONLY, Only
from minqwen.sampling.params import OF_OTHERS

PAGE = (ROOT / "docs" / "calls.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
PYTHON = [i for i, (language, _) in enumerate(BLOCKS) if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if not language]
COMMAND_LINE = [text for language, text in BLOCKS if language == "bash"][1]


def without_texts(printed: str) -> list[str]:
    """Lines without what the model wrote: a sampled text in bfloat16 depends on the machine."""
    return re.sub(r"(And God said|In the beginning).*", r"\1", printed).splitlines()


def warnings_of(printed: str) -> list[str]:
    return re.findall(r"(?:UserWarning|warning): (.*)", printed)


def test_the_pasted_script_runs_on_four_ranks():
    done = forked_torchrun(4, BLOCKS[PYTHON[0]][1])
    assert done.returncode == 0, done.stderr
    assert warnings_of(done.stderr) == warnings_of(OUTPUTS[0]) != []
    said = [line for line in without_texts(OUTPUTS[0]) if line in without_texts(done.stdout)]
    assert said == without_texts(done.stdout) == ["And God said", "In the beginning"]


def test_the_pasted_command_line_runs():
    """On one process: the script above has run on four."""
    command = COMMAND_LINE.replace("\\\n", " ").replace("weights/embedded", str(EMBEDDED))
    flags = command.split("generate.py")[1].replace("parallel-size 4", "parallel-size 1")
    done = run_tool("generate.py", *shlex.split(flags))
    assert done.code == 0, done.err
    assert without_texts(done.out) == without_texts(OUTPUTS[1])[-1:] == ["And God said"]
    assert warnings_of(done.err) == warnings_of(OUTPUTS[1]) != []


def test_the_other_blocks_print_what_stands_under_them(capsys):
    names: dict[str, object] = {}
    for number in PYTHON[1:]:
        exec(compile(BLOCKS[number][1], "calls.md", "exec"), names)
        assert capsys.readouterr().out == BLOCKS[number + 1][1]


# ---- the tables ---------------------------------------------------------------------------------


def row(names: Iterable[str], *cells: str) -> str:
    return " | ".join(["| " + ", ".join(f"`{name}`" for name in names), *cells]) + " |"


def table_of_reasons(title: str, reasons: Mapping[str, str]) -> str:
    """Arguments with the same reason share a row."""
    rows = [
        row([name for name in reasons if reasons[name] == reason], reason)
        for reason in dict.fromkeys(reasons.values())
    ]
    return "\n".join([title, "|---|---|", *rows])


def table_of_values(title: str, table: Mapping[str, Only]) -> str:
    rows = []
    for only in dict.fromkeys((str(o.values), o.instead) for o in table.values()):
        names = [name for name, o in table.items() if (str(o.values), o.instead) == only]
        rows.append(row(names, taken(table[names[0]].values), only[1]))
    return "\n".join([title, "|---|---|---|", *rows])


def taken(values: Sequence[object]) -> str:
    return ", ".join(f"`{value!r}`" for value in values)


TABLES = [
    table_of_reasons("| argument | because |", IDLE),
    table_of_values("| argument | value that is taken | instead of another |", ONLY),
    table_of_values("| keyword | value that is taken | instead of another |", OF_CALLS),
    table_of_reasons("| field | instead |", OF_OTHERS),
]


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_the_tables_are_those_of_the_code(number):
    found = re.findall(r"(?:^\|.*\n)+", PAGE, re.M)[number]
    assert found.strip() == TABLES[number]
