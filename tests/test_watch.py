"""What becomes of a run that loses a rank: one line that names the rank, and no process is left."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import pytest
from support.forked import forked, forked_torchrun

# After 20 of `steps` sums rank `victim` prints its pid and does `deed`.
SUMS = """
import os, signal, subprocess, sys, time, torch
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


def run(
    start: Callable[..., subprocess.CompletedProcess[str]],
    size: int,
    victim: int,
    deed: str,
    steps: int = FOR_EVER,
    **env: str,
) -> Ending:
    """How the run ends. That it ends at all, and leaves no process, is checked by `start`.

    start: forked_torchrun, which sees that a rank has failed and ends the others, while they find
    out who is to blame; forked where the ranks must end by themselves.
    """
    done = start(size, SUMS, [victim, deed, steps], dict(env))
    assert done.stdout, done.stderr
    lines = done.stderr.splitlines()
    return Ending(
        done.returncode,
        int(done.stdout),
        [line for line in lines if line.startswith("error: ")],
        [line for line in lines if re.match(r"\[rank\d", line)],
    )


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL: killed, crashed or out of memory"),
        ("os._exit(3)", "it ended with status 3, and said nothing"),
    ],
)
def test_a_rank_that_dies_ends_all(deed, reason):
    end = run(forked_torchrun, 3, 0, deed)
    # torchrun may have asked for the status first: then nobody else learns it.
    reason = rf"died \(({reason}|killed, crashed or out of memory)\)"
    [error] = end.errors
    assert re.fullmatch(rf"error: rank 0 of 3 \(pid {end.pid}\) {reason}: all ranks stop", error)
    assert end.code != 0 and not end.tracebacks


def test_a_stopped_rank_ends_all_after_the_timeout():
    end = run(forked, 3, 1, "os.kill(os.getpid(), signal.SIGSTOP)", MINQWEN_TIMEOUT="4")
    reason = "has been silent for 4 s (stopped, hung or cut off)"
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
    end = run(forked, 2, 1, PAUSE, steps=40)
    assert end.code == 0 and not end.errors and not end.tracebacks


LEFT = "left while it was still needed (by sys.exit, or at the end of its script)"


def test_a_rank_that_leaves_early_ends_all():
    end = run(forked, 2, 1, "sys.exit(0)")
    reason = LEFT
    assert end.errors == [f"error: rank 1 of 2 (pid {end.pid}) {reason}: all ranks stop"]
    assert end.code != 0 and not end.tracebacks


def name(rank: int, size: int, end: Ending) -> str:
    return f"rank {rank} of {size} (pid {end.pid})"


STOP = "all ranks stop"


def test_a_rank_that_exits_with_a_status_ends_all():
    end = run(forked_torchrun, 3, 1, "sys.exit(3)")
    assert end.errors == [f"error: {name(1, 3, end)} {LEFT}: {STOP}"]
    assert end.code != 0 and not end.tracebacks


def test_a_rank_that_raises_says_so_once():
    end = run(forked_torchrun, 3, 2, "raise ValueError('no such token\\nsecond line')")
    said = f"error: {name(2, 3, end)} raised ValueError: no such token: {STOP}"
    assert end.errors == [said]
    assert end.code != 0 and {line[5] for line in end.tracebacks} == {"2"}


ALL_RAISE = """
import os
from minqwen.parallel import Mesh
mesh = Mesh.from_env("cpu")
os.write(1, f"{mesh.rank} {os.getpid()}\\n".encode())  # in one piece: all ranks write to one file
mesh.barrier()
raise KeyError("the same for all")
"""


def test_where_all_raise_alike_one_speaks():
    done = forked_torchrun(3, ALL_RAISE)
    pids = dict(line.split() for line in done.stdout.splitlines())
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = [
        f"error: rank {r} of 3 (pid {pids[r]}) raised KeyError: 'the same for all': {STOP}"
        for r in "012"
    ]
    assert error in expected


ONE_MISTAKE = """
import sys
from minqwen.cli import run
from minqwen.errors import CheckpointError
from minqwen.parallel import Mesh

def main():
    mesh = Mesh.from_env("cpu")
    mesh.barrier()
    if str(mesh.rank) in sys.argv[1]:
        raise CheckpointError("the file is damaged")
    mesh.barrier()

run(main)
"""


@pytest.mark.parametrize("ranks", ["1", "01"])
def test_a_mistake_that_cli_run_reports_is_one_line_whoever_makes_it(ranks):
    done = forked_torchrun(2, ONE_MISTAKE, [ranks])
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    said = rf"rank [{ranks}] of 2 \(pid \d+\) raised CheckpointError: the file is damaged: {STOP}"
    assert re.fullmatch(f"error: {said}", error)
    assert done.returncode != 0 and "[rank" not in done.stderr


LATER = """
import os, select, sys
from torch.distributed import TCPStore
from minqwen import parallel
from minqwen.cli import run
from minqwen.errors import CheckpointError

def main():
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["RANK"] == "1":
        parallel.FAREWELL = 0  # it does not wait for rank 0
        store.set("pid", str(os.getpid()))
    else:
        select.select([os.pidfd_open(int(store.get("pid")))], [], [])
    raise CheckpointError("the file is damaged")

run(main)
"""


def test_rank_0_is_silent_where_another_did_not_wait_for_it():
    done = forked(2, LATER)
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(r"error: rank 1 of 2 \(pid \d+\): the file is damaged", error)
    assert done.returncode == 2


EARLY = """
import atexit, json, os, signal, sys
from torch.distributed import TCPStore
from minqwen.cli import run
from minqwen.errors import CheckpointError
from minqwen.parallel import Mesh

def end_rank_0():
    # What torchrun does when it sees that rank 1 has failed.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    who = json.loads(store.get("minqwen/0/watch/who/0"))  # once rank 0 has arrived
    os.kill(who[0], signal.SIGTERM)

def main():
    rank, deed = os.environ["RANK"], sys.argv[1]
    if rank == "1":
        print(os.getpid(), flush=True)
        if deed == "exit":
            end_rank_0()
            os._exit(3)
        if deed != "all":
            atexit.register(end_rank_0)
        raise KeyError("x") if deed == "error" else CheckpointError("the file is damaged")
    if deed == "all":
        raise CheckpointError("the file is damaged")
    Mesh.from_env("cpu")

run(main)
"""


SIGTERM = "had not arrived when SIGTERM came (torchrun sends it when a rank fails)"


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("mistake", "rank 1 of 2 (pid PID): the file is damaged"),
        ("error", "rank 1 of 2 (pid PID): it raised KeyError: 'x'"),
        ("exit", f"rank 1 of 2 {SIGTERM}: all ranks stop"),
        ("all", "rank 0 of 2 (pid 0): the file is damaged"),
    ],
)
def test_a_rank_that_fails_before_it_has_met_the_others_is_named(deed, said):
    done = forked(2, EARLY, [deed], timeout=100)
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    said = said.replace("PID", done.stdout.strip())
    assert re.sub(r"rank 0 of 2 \(pid \d+", "rank 0 of 2 (pid 0", error) == "error: " + said
    assert done.returncode != 0


@pytest.mark.parametrize(
    "size, victim, deed, place",
    [
        (3, 0, "while True: pass", "<string>:1 in <module>"),
        (2, 1, "time.sleep(10**6)", "<string>:1 in <module>"),
        (2, 0, "import threading\n\nthreading.Event().wait()", "threading.py:"),
    ],
    ids=["runs in a circle", "sleeps", "waits"],
)
def test_a_rank_that_lives_and_does_not_go_on_is_named_with_its_place(size, victim, deed, place):
    end = run(forked, size, victim, deed, MINQWEN_TIMEOUT="2")
    [error] = end.errors
    reason = f"has not joined the others for 2 s (it is busy at {place}"
    assert error.startswith(f"error: {name(victim, size, end)} {reason}") and error.endswith(STOP)
    assert end.code != 0 and not end.tracebacks


LATE = """
import os, sys, time, torch
from minqwen.parallel import Mesh
mesh = Mesh.from_env("cpu")
if mesh.rank == 1:
    time.sleep(4)  # reads its weights
mesh.barrier()
for turn in range(2):
    if mesh.rank == 0:
        if turn:
            mesh.join_early()
        time.sleep(4)  # its user thinks
    mesh.broadcast(torch.ones(1), patient=turn == 0)
os.write(1, b"done\\n")
"""


def test_a_rank_may_be_late_at_first_and_while_its_user_thinks():
    done = forked(2, LATE, env={"MINQWEN_TIMEOUT": "3"})
    assert done.returncode == 0 and done.stdout == "done\ndone\n" and "error" not in done.stderr


STUCK = """
import os, sys, time
from minqwen.parallel import Mesh, goes_on
mesh = Mesh.from_env("cpu")
if mesh.rank == 1:
    goes_on()  # it has read some of its weights
    print(os.getpid(), flush=True)
    while True:
        pass
if sys.argv[1] == "early":
    mesh.join_early()
    time.sleep(10**6)  # its user thinks
mesh.barrier()
"""


@pytest.mark.parametrize("how", ["in the collective", "early"])
def test_a_rank_that_stops_loading_is_named_also_while_the_user_thinks(how):
    done = forked(2, STUCK, [how], env={"MINQWEN_TIMEOUT": "2"})
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    reason = "has not joined the others for 2 s (it is busy at snippet.py:"
    assert error.startswith(f"error: rank 1 of 2 (pid {int(done.stdout)}) {reason}")
    assert done.returncode != 0


def test_ctrl_c_is_quiet():
    end = run(forked_torchrun, 2, 0, "os.kill(os.getppid(), signal.SIGINT)")
    assert end.code != 0 and not end.errors and not end.tracebacks
