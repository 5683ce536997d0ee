"""Ranks that are forked from a process which has imported torch.

torchrun and each of its ranks take two seconds of processor time to import torch, which is most of
what a small test on ranks takes. Here one process imports it for all runs of a process of tests.

forked: the ranks are processes with torchrun's variables, a store and gloo, as they are under
torchrun, but nobody ends the other ranks when one fails, so only their own watch does.
forked_torchrun: torchrun's own code starts them, watches them, ends them and reports.

What is not the same: sets of strings have the same order on every rank; and no rank is started by a
command line. Tests of these use support/torchrun.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from support import fork_server
from support.paths import ROOT
from support.torchrun import environment, marked


class Server:
    """fork_server.py as a process, which makes one run after the other."""

    def __init__(self, enter: Sequence[str] = ()) -> None:
        """enter: a command that runs the command after it, somewhere else."""
        path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            [*enter, sys.executable, fork_server.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() sees no line that Python has read ahead
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )

    def start(
        self,
        nproc: int,
        words: Sequence[object],
        env: dict[str, str | None],
        out: Path,
        err: Path,
        launcher: Sequence[object] = (),
    ) -> str:
        """Returns a mark of the run's processes, which support/torchrun.py finds."""
        mark = uuid.uuid4().hex[:15]
        request = fork_server.Request(
            nproc=nproc,
            words=[str(word) for word in words],
            env=environment(mark, env),
            directory=os.getcwd(),
            name=mark,
            out=str(out),
            err=str(err),
            launcher=[str(word) for word in launcher],
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request._asdict()).encode() + b"\n")
        return mark

    def has_ended(self, timeout: float) -> bool:
        """Waits until the run has ended, but not for longer."""
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def code(self) -> int:
        """The exit status of a run, when it has ended."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def forked(
    nproc: int,
    script: str | Path,
    args: Sequence[object] = (),
    env: dict[str, str | None] | None = None,
    timeout: float = 600,
    launcher: Sequence[object] = (),
) -> subprocess.CompletedProcess[str]:
    """`script` on `nproc` ranks over gloo: what torchrun() takes, gives and raises.

    returncode: of the first rank that did not end with 0.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as directory:
        path = script
        if isinstance(script, str):
            path = Path(directory, "snippet.py")
            path.write_text(script)
        out, err = Path(directory, "out"), Path(directory, "err")
        mark = server.start(nproc, [path, *args], env or {}, out, err, launcher)
        try:
            ended = server.has_ended(timeout)
        finally:
            left = marked(mark)
            for process in left:
                process.kill()
        code = server.code()
        if not ended:
            raise subprocess.TimeoutExpired(str(path), timeout, out.read_text(), err.read_text())
        assert not left, f"processes outlived the run: {left}"
        return subprocess.CompletedProcess([path, *args], code, out.read_text(), err.read_text())


def forked_torchrun(
    nproc: int,
    script: str | Path,
    args: Sequence[object] = (),
    env: dict[str, str | None] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """The same under torchrun, whose exit status is the returncode."""
    launcher = ("--standalone", "--nproc-per-node", nproc)
    return forked(nproc, script, args, env, timeout, launcher)


@functools.cache
def _server() -> Server:
    """It is started once, and ends with this process."""
    server = Server()
    atexit.register(server.close)
    return server
