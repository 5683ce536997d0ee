"""Runs a snippet on several ranks the way a user does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from support.paths import ROOT


def _alive(processes: Iterable[psutil.Process], mark: str | None = None) -> list[psutil.Process]:
    """Those that run or are stopped, and with `mark` only those that inherited it."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                if mark is None or process.environ().get("MINQWEN_TEST_RUN") == mark:
                    found.append(process)
    return found


def torchrun(
    nproc: int,
    script: str | Path,
    args: Sequence[object] = (),
    env: dict[str, str | None] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`script` (Python source, or the Path of a file) on `nproc` ranks over gloo: returncode, stdout, stderr,
    and ranks_ended, the time.time() at which the last rank was gone (torchrun itself takes longer).

    env changes this process's environment (None removes); OMP_NUM_THREADS is 1 unless it says otherwise.
    Raises subprocess.TimeoutExpired after `timeout` seconds, AssertionError if a process outlives torchrun;
    either way every process is gone when it returns.
    """
    mark = (
        uuid.uuid4().hex
    )  # each rank gets a session of its own: killing torchrun's group would miss it
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    changes = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MINQWEN_TEST_RUN": mark,
        "PYTHONPATH": python_path,
        **(env or {}),
    }
    environment = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(script, str):
            (path := Path(directory, "snippet.py")).write_text(script)
        else:
            path = script
        with open(Path(directory, "out"), "w+") as out, open(Path(directory, "err"), "w+") as err:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(nproc),
                    str(path),
                    *map(str, args),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
            started = ranks_ended = time.time()
            try:
                while process.poll() is None:
                    if _alive(psutil.Process(process.pid).children()):
                        ranks_ended = time.time()
                    if time.time() > started + timeout:
                        raise subprocess.TimeoutExpired(process.args, timeout)
                    time.sleep(0.05)
                left = _alive(psutil.process_iter(), mark)
                assert not left, f"processes outlived torchrun: {left}"
            except subprocess.TimeoutExpired as error:
                out.seek(0), err.seek(0)
                error.stdout, error.stderr = out.read(), err.read()
                raise
            finally:
                for orphan in _alive(psutil.process_iter(), mark):
                    orphan.kill()
                process.wait()
            out.seek(0), err.seek(0)
            done = subprocess.CompletedProcess(
                process.args, process.returncode, out.read(), err.read()
            )
            done.ranks_ended = ranks_ended
            return done
