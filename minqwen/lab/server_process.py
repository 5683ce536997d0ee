"""A server in a process of its own, for what is measured from outside."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from minqwen.errors import MinqwenError

SECONDS_TO_BEGIN = 300
SECONDS_TO_END = 60


@contextlib.contextmanager
def server_process(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The address and the process id of a tools/serve.py, which ends with the block.

    command: with --port 0. Raises MinqwenError, with what it said, if it does not begin. What it
    has said on stderr besides its address is printed before it is told to end.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stderr=said)
        try:
            yield _address(said, process), process.pid
        finally:
            for line in _all_of(said).splitlines():
                if not line.startswith("serving "):
                    print(f"the server said: {line}", flush=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            process.kill()
            process.wait()


def _address(said: TextIO, process: subprocess.Popen[bytes]) -> str:
    for _ in range(SECONDS_TO_BEGIN * 10):
        found = re.search(r"^serving .* at (http://\S+)$", _all_of(said), re.MULTILINE)
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise MinqwenError(f"the server did not begin: {_all_of(said)}")


def _all_of(said: TextIO) -> str:
    said.seek(0)
    return said.read()
