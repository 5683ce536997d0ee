"""Runs a command line of tools/ the way a user does, in a process of its own or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from support.paths import ROOT


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int  # its exit status
    out: str
    err: str


def run_tool(name: str, *args: object, stdin: str = "", timeout: float = 600) -> Result:
    """`python tools/NAME ARGS` in a process of its own, with one thread."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_tool_here(name: str, *args: object) -> Result:
    """The same in this process, which saves the seconds that importing torch takes.

    It hands the tool no stdin, and the tool shares this process's settings and threads.
    """
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        mock.patch.object(sys, "argv", [name, *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # exit("message") prints it and exits with status 1
        err.write(code + "\n")
        code = 1
    return Result(code or 0, out.getvalue(), err.getvalue())
