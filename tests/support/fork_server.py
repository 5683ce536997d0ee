"""The process that support/forked.py starts: it imports torch once, and forks ranks."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from typing import NamedTuple

import torch
from torch.distributed import TCPStore

import minqwen  # noqa: F401 (so that no rank has to import it)


class Request(NamedTuple):
    nproc: int
    words: list[str]  # the path of the script, and its arguments
    env: dict[str, str]
    directory: str  # the working directory
    out: str  # files for what the ranks print
    err: str


def serve() -> None:
    """Answers each line of stdin, a Request, with two: the session of its processes, which is a
    process number, and the exit status when all have ended."""
    answers = os.dup(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            sys.exit(launch(Request(**json.loads(line))))
        os.write(answers, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def launch(request: Request) -> int:
    """What torchrun does: keeps the store and waits for the ranks."""
    os.setsid()
    _redirect(0, os.devnull, os.O_RDONLY)
    _redirect(1, request.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _redirect(2, request.err, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    pids = []
    for rank in range(request.nproc):
        pids.append(os.fork())
        if pids[-1] == 0:
            listener.close()
            run_rank(request, rank, port)
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


def _redirect(fd: int, path: str, flags: int) -> None:
    file = os.open(path, flags, 0o600)
    os.dup2(file, fd)
    os.close(file)


def run_rank(request: Request, rank: int, port: int) -> None:
    """The script, as Python runs it from a command line."""
    os.environ.clear()
    os.environ.update(request.env)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(request.nproc))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(request.nproc))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    os.chdir(request.directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = request.words
    runpy.run_path(request.words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
