"""tools/torchrun.py: torchrun, without tracebacks. The ranks here are programs without torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.tool import run_tool

RANK = """
import os, signal, sys, time
deed = sys.argv[1]
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, wherever the signal meets it
os.write(1, f"rank {os.environ['RANK']}\\n".encode())  # in one piece: all ranks write to one file
if deed == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "wait":
    time.sleep(10**6)
sys.exit(int(deed))
"""


@pytest.fixture
def rank(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def test_a_run_that_is_well_is_torchruns(rank):
    done = run_tool("torchrun.py", "--nproc-per-node", 2, rank, 0)
    assert sorted(done.out.splitlines()) == ["rank 0", "rank 1"] and done.code == 0
    assert "error" not in done.err


@pytest.mark.parametrize(
    ("deed", "code", "line"),
    [("kill", 137, "error: rank 0 (pid "), ("3", 3, None)],
)
def test_a_rank_that_fails_gives_its_status(rank, deed, code, line):
    done = run_tool("torchrun.py", "--nproc-per-node", 1, rank, deed)
    assert done.code == code and "Traceback" not in done.err
    errors = [text for text in done.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == (line is not None)
    assert line is None or errors[0].startswith(line) and errors[0].endswith("SIGKILL")


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_tool("torchrun.py", "--nproc-per-node", 1, "--master-port", port, "x.py")
    assert (
        done.code == 2 and f"--master-port {port}" in done.err and "is the port taken?" in done.err
    )
    assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_status_of_shells(rank, number):
    command = [sys.executable, ROOT / "tools/torchrun.py", "--nproc-per-node", "1", rank, "wait"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout.readline() == "rank 0\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in err
