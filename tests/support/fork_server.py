"""The process that support/forked.py starts: it imports torch once, and forks ranks."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

import minqwen  # noqa: F401 (so that no rank has to import it)


class Request(NamedTuple):
    nproc: int
    words: list[str]  # the path of the script, and its arguments
    env: dict[str, str]
    directory: str  # the working directory
    name: str  # of every process of the run, at most 15 characters
    out: str  # files for what the ranks print
    err: str
    launcher: list[str]  # torchrun's options; none: the ranks are without torchrun


def serve() -> None:
    """Answers each line of stdin, a Request, when the run has ended: with its exit status."""
    answers = os.dup(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            sys.exit(launch(Request(**json.loads(line))))
        _, status = os.waitpid(pid, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def launch(request: Request) -> int:
    os.setsid()
    with open("/proc/self/comm", "w") as comm:  # forked processes inherit it
        comm.write(request.name)
    _redirect(0, os.devnull, os.O_RDONLY)
    _redirect(1, request.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _redirect(2, request.err, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return torchrun(request) if request.launcher else without_torchrun(request)


def _redirect(fd: int, path: str, flags: int) -> None:
    file = os.open(path, flags, 0o600)
    os.dup2(file, fd)
    os.close(file)


def without_torchrun(request: Request) -> int:
    """What torchrun does at least: keeps the store and waits for the ranks."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pids = []
    for rank in range(request.nproc):
        pids.append(os.fork())
        if pids[-1] == 0:
            listener.close()
            run_script(request.words, request.env | variables(request, rank, port), request)
            return 0
    # The store has a thread, so it starts when nothing is forked any more.
    store = TCPStore(
        *("127.0.0.1", port),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    del store
    return next((abs(code) for code in codes if code), 0)


def variables(request: Request, rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    size = str(request.nproc)
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }


def run_script(words: Sequence[str], env: dict[str, str], request: Request) -> None:
    """The script, as Python runs it from a command line."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(request.directory)
    torch.set_num_threads(1)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


class Fork:
    """A process that is forked before torchrun has threads, and waits for what it is to run.

    It has the methods of subprocess.Popen that torchrun calls.
    """

    def __init__(self, request: Request) -> None:
        self.returncode: int | None = None
        end, self.pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(end, 3)
            os.closerange(4, 4096)  # also torchrun's ends of other pipes
            self._wait_and_run(request)
            sys.exit()
        os.close(end)

    def _wait_and_run(self, request: Request) -> None:
        with open(3) as pipe:
            asked = pipe.read()
        if not asked:
            os._exit(0)  # there is no torchrun any more
        os.setsid()
        (_, _, *words), env = json.loads(asked)  # python -u SCRIPT ...
        raw = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, write_through=True)
        run_script(words, env, request)

    def begin(self, words: Sequence[str], env: dict[str, str]) -> Fork:
        with open(self.pipe, "w") as pipe:
            json.dump((words, env), pipe)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code


def torchrun(request: Request) -> int:
    """torchrun itself, but the ranks it starts are forked, with torch imported."""
    forks = [Fork(request) for _ in range(request.nproc)]
    os.environ.clear()
    os.environ.update(request.env)
    os.chdir(request.directory)
    SubprocessHandler._popen = lambda _, words, env: forks.pop(0).begin(words, env)
    run.main([*request.launcher, *request.words])
    return 0


if __name__ == "__main__":
    serve()
