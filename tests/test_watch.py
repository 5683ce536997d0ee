"""What becomes of a run that loses a rank: one line that names the rank, and no process is left."""

from __future__ import annotations

import re
from typing import NamedTuple

from support.torchrun import torchrun

# After 20 of `steps` sums rank `victim` prints its pid and does `deed`.
SUMS = """
import os, signal, subprocess, sys, torch
from minqwen.parallel import Mesh
mesh = Mesh.from_env("cpu")
victim, deed, steps = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for step in range(steps):
    mesh.all_reduce(torch.ones(1000))
    if step == 20 and mesh.rank == victim:
        print(os.getpid(), flush=True)
        exec(deed)
mesh.close()
"""
FOR_EVER = 10**9


class Ending(NamedTuple):
    code: int  # torchrun's exit status
    pid: int  # the victim's
    errors: list[str]  # lines that start with "error: "
    tracebacks: list[str]  # first lines of the ranks' tracebacks


def run(size: int, victim: int, deed: str, steps: int = FOR_EVER, **env: str) -> Ending:
    """How the run ends. That it ends at all, and leaves no process, is checked by torchrun()."""
    done = torchrun(size, SUMS, [victim, deed, steps], dict(env))
    assert done.stdout, done.stderr
    lines = done.stderr.splitlines()
    return Ending(
        done.returncode,
        int(done.stdout),
        [line for line in lines if line.startswith("error: ")],
        [line for line in lines if re.match(r"\[rank\d", line)],
    )


def test_a_killed_rank_ends_all():
    end = run(3, 0, "os.kill(os.getpid(), signal.SIGKILL)")
    reason = "died (killed, crashed or out of memory)"
    assert end.errors == [f"error: rank 0 of 3 (pid {end.pid}) {reason}: all ranks stop"]
    assert end.code != 0 and not end.tracebacks


def test_a_stopped_rank_ends_all_after_the_timeout():
    end = run(3, 1, "os.kill(os.getpid(), signal.SIGSTOP)", MINQWEN_TIMEOUT="4")
    reason = "has been silent for 4 s (stopped or hung)"
    assert end.errors == [f"error: rank 1 of 3 (pid {end.pid}) {reason}: all ranks stop"]
    assert end.code != 0 and not end.tracebacks


# The rank stops. A second process sees this, waits for longer than the 5 s that are enough after a
# failed collective, and wakes the rank.
PAUSE = """
wake = f'''while ! grep -q "State:.T" /proc/{os.getpid()}/status; do sleep 0.1; done
sleep 7; kill -CONT {os.getpid()}'''
waker = subprocess.Popen(["sh", "-c", wake])
os.kill(os.getpid(), signal.SIGSTOP)
waker.wait()
"""


def test_a_rank_that_is_stopped_for_less_than_the_timeout_is_waited_for():
    end = run(2, 1, PAUSE, steps=40)
    assert end.code == 0 and not end.errors and not end.tracebacks


def test_a_rank_that_leaves_early_ends_all():
    end = run(2, 1, "sys.exit(0)")
    reason = "left while it was still needed"
    assert end.errors == [f"error: rank 1 of 2 (pid {end.pid}) {reason}: all ranks stop"]
    assert end.code != 0 and not end.tracebacks


def test_ctrl_c_is_quiet():
    end = run(2, 0, "os.kill(os.getppid(), signal.SIGINT)")
    assert end.code != 0 and not end.errors and not end.tracebacks
