#!/usr/bin/env python3
"""What becomes of a run when one of its ranks fails, in every phase of it, again and again.

  python benchmarks/ranks.py                       # 20 runs of each case: half an hour
  python benchmarks/ranks.py --runs 2 --deeds kill stop --phases decode

Two ranks run tools/generate.py or tools/serve.py with the embedded model. In the midst of a phase
one of them, by turns rank 0 and rank 1, does a deed: it is killed, stops, raises, ... What must be:
all ranks end, none with status 0, within 10 s, or the timeout and 5 s where only time can tell; one
line names the rank; and no process and no shared memory is left. Exits with 1 if a run is not so.

The ranks are forked from this process, with a store as torchrun has one, and nobody ends them but
they themselves. What the kernel does for want of memory is what `kill` does.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import resource
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore

from minqwen.checkpoint import Checkpoint
from minqwen.cli import Parser, run
from minqwen.model.qwen2 import Layer
from minqwen.serve import server as server  # here, so that no rank has to import it

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SERVE = "--serve-cases"  # how this program starts itself
RANKS = 2
LAYERS = 4  # of the embedded model: so many calls of Layer.forward are a pass
QUICK = 10  # seconds in which a run must end where a death, or an exception, is noticed
GENEROUS = 120  # seconds after which a run is given up
LINGER = 2  # seconds after the last rank's end in which no process may be left


def raise_error() -> None:
    raise RuntimeError("a deed")


def run_out_of_memory() -> None:
    """An allocation fails. (Being killed for want of memory is `kill`.)"""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.zeros(1 << 30)


def spin() -> None:
    while True:
        pass


DEEDS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": raise_error,
    "memory": run_out_of_memory,
    "exit": lambda: sys.exit(3),
    "spin": spin,
    "sleep": lambda: time.sleep(10**6),
}
ONLY_TIME_TELLS = ("stop", "spin", "sleep")
GENERATE = ["generate.py", "And God said", "--max-tokens", "200", "--ignore-eos"]
PHASES: dict[
    str, tuple[list[str], type, str, int]
] = {  # what runs; after how many calls of what the deed is done
    "loading": (GENERATE, Checkpoint, "read", 20),
    "prefill": (GENERATE, Layer, "forward", 4),
    "decode": (GENERATE, Layer, "forward", 20 * LAYERS),
    "server": (["serve.py", "--port", "0"], Layer, "forward", 20 * LAYERS),
}


class Case(NamedTuple):
    phase: str
    deed: str
    victim: int


class Ending(NamedTuple):
    codes: list[int]  # the ranks' statuses
    seconds: float  # from the deed to the end of the last rank
    lines: list[str]  # that begin with "error: "
    left: int  # processes


# ---- the ranks ----------------------------------------------------------------------------------


def act(case: Case, directory: Path) -> None:
    """In the rank that is to fail: prepare the deed."""
    _, kind, method, calls = PHASES[case.phase]
    before, left = getattr(kind, method), [calls]

    def counted(self: object, *args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            (directory / "deed").write_text(str(time.time()))
            DEEDS[case.deed]()
        return before(self, *args, **options)

    setattr(kind, method, counted)


def run_rank(case: Case, rank: int, port: int, timeout: float, directory: Path) -> None:
    """One rank, to its end, as torchrun starts it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    os.environ.update(MINQWEN_TIMEOUT=f"{timeout:g}", TORCHELASTIC_RUN_ID="ranks")
    redirect(0, Path(os.devnull), os.O_RDONLY)
    redirect(1, directory / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    redirect(2, directory / "err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    torch.set_num_threads(1)
    if rank == case.victim:
        act(case, directory)
    words, *_ = PHASES[case.phase]
    sys.argv = [str(TOOLS / words[0]), *words[1:], "--device", "cpu"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def redirect(fd: int, path: Path, flags: int) -> None:
    file = os.open(path, flags, 0o600)
    os.dup2(file, fd)
    os.close(file)


def ask(directory: Path) -> None:
    """A client of the server: one long answer, as a stream."""
    found = None
    while not found:
        time.sleep(0.1)
        text = (directory / "err").read_text() if (directory / "err").exists() else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
    body = {"prompt": "And God said", "max_tokens": 400, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    with contextlib.suppress(OSError, http.client.HTTPException):  # the server breaks off
        connection.getresponse().read()


# ---- a run --------------------------------------------------------------------------------------


def serve() -> None:
    """For each line of stdin, a case, a run in a process of its own; then a line on stdout.

    In this process the ranks are forked at once, and end as any Python process does.
    """
    for line in sys.stdin:
        case, timeout, directory = json.loads(line)
        pid = os.fork()
        if pid == 0:
            launch(Case(*case), timeout, Path(directory))
            sys.exit(0)
        os.waitpid(pid, 0)
        print(pid, flush=True)


def launch(case: Case, timeout: float, directory: Path) -> None:
    """Ranks, a store, and a client for the server, in a session of their own."""
    os.setsid()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pids = []
    for rank in range(RANKS):
        pids.append(os.fork())
        if pids[-1] == 0:
            listener.close()
            run_rank(case, rank, port, timeout, directory)
            sys.exit(0)
    client = os.fork() if case.phase == "server" else None
    if client == 0:
        ask(directory)
        os._exit(0)
    store = TCPStore(
        *("127.0.0.1", port),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    codes = wait_for_all(pids)
    ended = time.time()
    if client is not None:
        os.kill(client, signal.SIGKILL)
        os.waitpid(client, 0)
    (directory / "codes").write_text(json.dumps({"codes": codes, "ended": ended}))
    del store


def wait_for_all(pids: list[int]) -> list[int]:
    """Their statuses; 0 for one that had to be given up. None is asked for its status before the
    watches of the others have seen its end."""
    deadline, codes = time.monotonic() + GENEROUS, dict.fromkeys(pids, 0)
    left = set(pids)
    while left and time.monotonic() < deadline:
        for pid in list(left):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                left.discard(pid)
        time.sleep(0.01)
    for pid in pids:
        if pid not in left:
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return list(codes.values())


def end_all(session: int) -> int:
    """How many processes of a session are left after LINGER seconds; they are killed.

    A rank's own helpers see the end of a pipe when it is killed, and need a moment to end.
    """
    deadline = time.monotonic() + LINGER
    while found := processes_of(session):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def processes_of(session: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getsid(int(name)) == session:
                found.append(int(name))
    return found


def run_case(case: Case, timeout: float, server: subprocess.Popen[str]) -> Ending:
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps([case, timeout, name]), file=server.stdin, flush=True)
        left = end_all(int(server.stdout.readline()))
        texts = {file.name: file.read_text() for file in Path(name).iterdir()}
    found = json.loads(texts["codes"])
    lines = [line for line in texts.get("err", "").splitlines() if line.startswith("error: ")]
    return Ending(found["codes"], found["ended"] - float(texts.get("deed", 0)), lines, left)


def wrong(case: Case, ending: Ending, most: float) -> str:
    """What is not as it must be; "" if all is."""
    if not ending.lines or f"rank {case.victim} of {RANKS}" not in ending.lines[0]:
        return f"no line names rank {case.victim}: {ending.lines}"
    if len(ending.lines) > 1:
        return f"{len(ending.lines)} lines: {ending.lines}"
    if ending.left:
        return f"{ending.left} processes are left"
    if 0 in ending.codes:
        return f"statuses {ending.codes}"
    return f"{ending.seconds:.1f} s" if ending.seconds > most else ""


class Tally:
    """What came of one deed in one phase."""

    def __init__(self, phase: str, deed: str, timeout: float):
        self.phase, self.deed = phase, deed
        self.most = timeout + 5 if deed in ONLY_TIME_TELLS else QUICK
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def add(self, case: Case, ending: Ending) -> None:
        self.seconds.append(ending.seconds)
        problem = wrong(case, ending, self.most)
        if problem:
            self.wrong.append(problem)
            print(f"{case}: {problem}", file=sys.stderr, flush=True)

    def row(self) -> str:
        count = len(self.seconds)
        right = f"{count - len(self.wrong)} of {count}"
        median = statistics.median(self.seconds)
        return f"| {self.deed} | {self.phase} | {right} | {median:.1f} | {max(self.seconds):.1f} |"


def run_all(tallies: Sequence[Tally], runs: int, timeout: float, seconds: float) -> None:
    """Each case once, then each once again: so all have as many runs when the time is over."""
    command, pipe = [sys.executable, __file__, SERVE], subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    deadline = time.monotonic() + seconds
    try:
        for i in range(runs):
            for tally in tallies:
                if time.monotonic() > deadline:
                    return
                case = Case(tally.phase, tally.deed, i % RANKS)
                tally.add(case, run_case(case, timeout, server))
    finally:
        server.kill()
        server.wait()


def shared_memory() -> set[str]:
    """What torch, its libraries and Python's locks have there. Others may have files of theirs."""
    ours = ("torch", "nccl", "gloo", "sem.", "psm_", "__KMP")
    return {name for name in os.listdir("/dev/shm") if name.startswith(ours)}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, default=20, metavar="N", help="of each case (default: 20)")
    add("--seconds", type=float, default=7200, metavar="S", help="of all runs (default: 7200)")
    add("--timeout", type=float, default=5, metavar="S", help="MINQWEN_TIMEOUT (default: 5)")
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="(default: all)")
    add("--deeds", nargs="+", choices=DEEDS, default=list(DEEDS), help="(default: all)")
    args = parser.parse_args()
    shared = shared_memory()
    tallies = [Tally(phase, deed, args.timeout) for deed in args.deeds for phase in args.phases]
    run_all(tallies, args.runs, args.timeout, args.seconds)
    print("| deed | phase | right | seconds: median | most |\n|---|---|---|---|---|")
    print(*(tally.row() for tally in tallies if tally.seconds), sep="\n")
    left = shared_memory() - shared
    if left:
        print(f"shared memory is left: {left}", file=sys.stderr)
    return 1 if left or any(tally.wrong for tally in tallies) else 0


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve()
    else:
        run(main)
