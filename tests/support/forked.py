"""Ranks that are forked from a process which has imported torch.

torchrun and each of its ranks take two seconds of processor time to import torch, which is most of
what a small test on ranks takes. Here one process imports it for all runs of a process of tests.

The ranks are processes with torchrun's variables, a store and gloo, as they are under torchrun.
What is not the same: nobody ends the other ranks when one fails, so only their own watch does; sets
of strings have the same order on every rank; and no rank is started by a command line. Tests of
these three use support/torchrun.py.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from support import fork_server
from support.paths import ROOT
from support.torchrun import environment


def forked(
    nproc: int,
    script: str | Path,
    args: Sequence[object] = (),
    env: dict[str, str | None] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`script` on `nproc` ranks over gloo: what torchrun() takes, gives and raises.

    returncode: of the first rank that did not end with 0.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = script
        if isinstance(script, str):
            path = Path(directory, "snippet.py")
            path.write_text(script)
        request = fork_server.Request(
            nproc=nproc,
            words=[str(path), *map(str, args)],
            env=environment("", env or {}),
            directory=os.getcwd(),
            out=str(Path(directory, "out")),
            err=str(Path(directory, "err")),
        )
        code = _run(request, timeout)
        out, err = Path(request.out).read_text(), Path(request.err).read_text()
        return subprocess.CompletedProcess(request.words, code, out, err)


def _run(request: fork_server.Request, timeout: float) -> int:
    """The exit status of a run. No process of it is left."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request._asdict()).encode() + b"\n")
    session = int(server.stdout.readline())
    try:
        ready, _, _ = select.select([server.stdout], [], [], timeout)
    finally:
        left = _of_session(session)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
    code = int(server.stdout.readline())
    if not ready:
        raise subprocess.TimeoutExpired(request.words, timeout)
    assert not left, f"processes outlived the run: {left}"
    return code


def _of_session(session: int) -> list[psutil.Process]:
    """The processes of a run that are still there, running or stopped."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and os.getsid(process.pid) == session:
                found.append(process)
    return found


_servers: list[subprocess.Popen[bytes]] = []


def _server() -> subprocess.Popen[bytes]:
    """The process that has imported torch. It is started once, and ends with this one."""
    if not _servers:
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        server = subprocess.Popen(
            [sys.executable, fork_server.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() sees no line that Python has read ahead
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        _servers.append(server)
        atexit.register(server.wait)
        atexit.register(server.kill)  # it comes first
    return _servers[0]
