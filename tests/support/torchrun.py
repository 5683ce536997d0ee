"""Runs a snippet on several ranks the way a user does, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from support.paths import ROOT

MARK = "MINQWEN_TEST_RUN"  # every process of a run inherits this variable


def torchrun(
    nproc: int,
    script: str | Path,
    args: Sequence[object] = (),
    env: dict[str, str | None] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`script` (Python source, or the Path of a file) on `nproc` ranks over gloo.

    env changes this process's environment (None removes a variable). Unless it says otherwise,
    OMP_NUM_THREADS is 1, and a rank may be silent for ten minutes, which no loaded machine reaches.
    Raises subprocess.TimeoutExpired after `timeout` seconds, AssertionError if a process outlives
    torchrun; either way every process is gone when it returns.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(script, str):
            path = Path(directory, "snippet.py")
            path.write_text(script)
        else:
            path = script
        out, err = Path(directory, "out"), Path(directory, "err")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", nproc, path, *args]
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env=environment(mark, env or {}),
                start_new_session=True,
            )
        try:
            code = process.wait(timeout)
            left = marked(mark)
            assert not left, f"processes outlived torchrun: {left}"
        except subprocess.TimeoutExpired as error:
            error.stdout, error.stderr = out.read_text(), err.read_text()
            raise
        finally:
            # Each rank has a session of its own: killing torchrun's process group would miss it.
            for process_left in marked(mark):
                process_left.kill()
            process.wait()
        return subprocess.CompletedProcess(process.args, code, out.read_text(), err.read_text())


def environment(mark: str, changes: dict[str, str | None]) -> dict[str, str]:
    """This process's environment, with what the ranks need and with the caller's changes."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    wanted: dict[str, str | None] = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MINQWEN_TIMEOUT": "600",
        "PYTHONPATH": python_path,
        MARK: mark,
        **changes,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def marked(mark: str) -> list[psutil.Process]:
    """The processes of one run that are still there, running or stopped.

    Those of support/forked.py have the mark as their name; what they start has it as a variable.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and mark in (process.name(), process.environ().get(MARK)):
                found.append(process)
    return found
