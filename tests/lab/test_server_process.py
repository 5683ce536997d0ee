"""A server in a process of its own: begun, and ended with its block."""

from __future__ import annotations

import sys

import psutil
import pytest

from minqwen.errors import MinqwenError
from minqwen.lab.server_process import server_process

SAYS = "import sys, time; print(sys.argv[1], file=sys.stderr, flush=True); "


def test_it_runs_as_long_as_the_block(capsys):
    said = "warning: something\nserving it at http://127.0.0.1:8123"
    command = [sys.executable, "-c", SAYS + "time.sleep(3600)", said]
    with server_process(command) as (url, pid):
        assert url == "http://127.0.0.1:8123" and psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    assert capsys.readouterr().out == "the server said: warning: something\n"


def test_one_that_does_not_begin_is_told_with_what_it_said():
    command = [sys.executable, "-c", SAYS + "sys.exit(2)", "error: there is no such model"]
    with pytest.raises(MinqwenError, match="did not begin: error: there is no such model"):
        with server_process(command):
            raise AssertionError("it never served")
