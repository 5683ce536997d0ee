#!/usr/bin/env python3
"""How long a run lasts after Ctrl-C or SIGTERM, in every phase of it, alone and under torchrun.

  python benchmarks/signals.py --runs 5

tools/generate.py, in a conversation too, and tools/serve.py run with the embedded model, slowed
down so that a phase lasts. What must be: no process is there after 5 s, no traceback of ours, and
the status is 130 or 143, or that of a process which the signal has ended. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import random
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minqwen.checkpoint import Checkpoint
from minqwen.cli import Parser, run
from minqwen.model.qwen2 import Layer

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SLOWLY = "--slowly"  # how this program starts itself
MARK = "MINQWEN_SIGNALS"  # every process of a run has this variable
ALLOWED = 5  # seconds
GENERATE = ["generate.py", "And God said", "--max-tokens", "400", "--ignore-eos"]
SLOW: dict[str, tuple[type, str, int, float]] = {  # a method, its calls before the phase, its pause
    "loading": (Checkpoint, "read", 5, 0.5),
    "prefill": (Layer, "forward", 2, 1),
    "decode": (Layer, "forward", 30, 0.2),
}
PHASES: dict[str, tuple[list[str], str]] = {  # what runs; what it prints when the phase has begun
    "importing": (GENERATE, ""),
    "loading": (GENERATE, "SLOW"),
    "prefill": (GENERATE, "SLOW"),
    "decode": (GENERATE, "SLOW"),
    "prompt": (["generate.py", "--chat"], "> "),
    "serving": (["serve.py", "--port", "0"], "serving"),
}


def slowly(phase: str, words: list[str]) -> None:
    """Run a tool in which, from some moment on, one method takes long."""
    if phase in SLOW:
        kind, method, calls, pause = SLOW[phase]
        before, left = getattr(kind, method), [calls]

        def slow(self: object, *args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                print("SLOW", file=sys.stderr, flush=True)
            time.sleep(pause if left[0] <= 0 else 0)
            return before(self, *args, **options)

        setattr(kind, method, slow)
    sys.argv = [str(TOOLS / words[0]), *words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def command_of(phase: str, ranks: int) -> list[str]:
    words, _ = PHASES[phase]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += [str(TOOLS / "torchrun.py"), "--nproc-per-node", str(ranks)]
    if phase == "importing":
        return [*launcher, str(TOOLS / words[0]), *words[1:]]
    return [*launcher, __file__, SLOWLY, phase, *words]


def left(mark: str) -> list[int]:
    """The processes of a run that are still there."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            ended = Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            if not ended and mark.encode() in Path("/proc", name, "environ").read_bytes():
                found.append(int(name))
    return found


@contextlib.contextmanager
def started(phase: str, ranks: int, errors: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process, and the terminal that it has."""
    keys, terminal = pty.openpty()
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command_of(phase, ranks),
        stdin=terminal,
        stdout=terminal,
        stderr=errors.open("wb"),
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    os.set_blocking(keys, False)
    try:
        yield process, keys
        while left(mark):
            time.sleep(0.02)
    finally:
        for pid in left(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        os.close(keys)


def wait_for(text: str, process: subprocess.Popen[bytes], keys: int, errors: Path) -> None:
    """Until the text is on the terminal or in the errors; "" is a moment of the first seconds."""
    seen = b""
    if not text:
        time.sleep(random.uniform(0, 6))
    while text.encode() not in seen + errors.read_bytes() and process.poll() is None:
        with contextlib.suppress(BlockingIOError):
            seen += os.read(keys, 4096)
        time.sleep(0.02)


def one(phase: str, ranks: int, number: int) -> tuple[float, str]:
    """Seconds to the end of the last process, and what is wrong with it."""
    found = None
    while found is None:
        found = attempt(phase, ranks, number)
    return found


def attempt(phase: str, ranks: int, number: int) -> tuple[float, str] | None:
    """The same; None if the run had ended before the signal came."""
    with tempfile.TemporaryDirectory() as directory:
        errors = Path(directory, "errors")
        with started(phase, ranks, errors) as (process, keys):
            wait_for(PHASES[phase][1], process, keys, errors)
            if process.poll() == 0:
                return None
            began = time.monotonic()
            process.send_signal(number)
            code = process.wait()
        seconds = time.monotonic() - began
        said = errors.read_text()
    if code not in (128 + number, -number):
        return seconds, f"status {code}: {said[-500:]}"
    if "minqwen" in said.partition("Traceback")[2]:
        return seconds, said[-1500:]
    return seconds, f"{seconds:.1f} s" if seconds > ALLOWED else ""


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each (default: 5)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    wrong = 0
    print("| phase | ranks | signal | right | seconds: median | most |\n|---|---|---|---|---|---|")
    for phase in args.phases:
        for ranks in args.ranks:
            for number in (signal.SIGINT, signal.SIGTERM):
                found = [one(phase, ranks, number) for _ in range(args.runs)]
                seconds, problems = [s for s, _ in found], [p for _, p in found if p]
                wrong += len(problems)
                right = f"{args.runs - len(problems)} of {args.runs}"
                times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
                print(f"| {phase} | {ranks} | {number.name} | {right} | {times} |", flush=True)
                print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == [SLOWLY]:
        slowly(sys.argv[2], sys.argv[3:])
    else:
        run(main)
