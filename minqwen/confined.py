"""Work on what a stranger wrote, in a small process of its own, which the operating system limits.

A chat template and a grammar are programs that arrive from outside. Nothing inside a Python process
can stop a C function that runs for minutes, takes all memory, or overflows the stack. So `Confined`
runs this very file as a script, `python -I -S confined.py PROGRAM`, where PROGRAM is a file of this
package that says what to do with a question. The process may use so many seconds of processor time
for a question (the kernel then ends it, whatever it is doing) and MEMORY_BYTES of memory, and no
files, sockets or processes at all. It starts once, in a tenth of a second, and then answers in a
fraction of a millisecond what needs no more.

A program has `prepare`, which imports all that it needs and returns the function that makes a dict,
the answer, of a dict, the question. STACK_BYTES, if it has that, is how much stack the function
gets. One question a line on stdin, [seconds, question]; one reply a line on stdout, {"answer": ...}
or {"error": str}. As a script this file has no package around it.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

MEMORY_BYTES = 1 << 30
CLOCK_SECONDS = 30.0  # then the process is ended, for systems that cannot limit processor time
CONFINED = "confined"  # the name that a program has in the process; elsewhere it has its package's

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Gone(Exception):
    """There is no answer. The text says why, of "it": what the question was about."""


class Confined:
    """The asking end of one process, which starts at the first question and again after a failure.

    program: the path of its file. doing: what it does with what it is given, for messages:
    "rendered". Threads may share it.
    """

    def __init__(self, program: str, doing: str) -> None:
        self.program, self.doing = program, doing
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end_process: Callable[[], object] = _nothing

    def start(self) -> None:
        """Start the process, if it does not run, so that the first question need not wait."""
        with self._lock:
            self._running_process()

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, after at most so many seconds of processor time.

        Raises Gone if there is none, and what json raises for a question that is not JSON.
        """
        request = json.dumps([seconds, question]).encode() + b"\n"
        with self._lock:
            reply = self._exchange(request, seconds)
        if "error" in reply:
            raise Gone(reply["error"])
        answer: dict[str, Any] = reply["answer"]
        return answer

    def _exchange(self, request: bytes, seconds: float) -> dict[str, Any]:
        process = self._running_process()
        reply = b""
        clock = threading.Timer(CLOCK_SECONDS, process.kill)
        clock.daemon = True
        clock.start()
        try:
            reply = _ask(process, request)
        finally:
            clock.cancel()
            # Without a whole reply the process is dead, or this thread was interrupted. Then the
            # reply must not come later, as the answer to another question.
            if not reply.endswith(b"\n"):
                self._end_process()
        if reply.endswith(b"\n"):
            parsed: dict[str, Any] = json.loads(reply)
            return parsed
        return {"error": self._why_it_ended(process, seconds)}

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end_process()  # somebody may have killed it: its pipes are still open
            self._process = _start(self.program, self.doing)
            # It also runs when nobody has this object any more. A second call does nothing.
            self._end_process = weakref.finalize(self, _end, self._process)
        return self._process

    def _why_it_ended(self, process: subprocess.Popen[bytes], seconds: float) -> str:
        if process.returncode == -getattr(signal, "SIGPROF", 0):
            return f"it needs more than {seconds:g} s of processor time"
        return f"the process that {self.doing} it ended with status {process.returncode}"


def _nothing() -> None:
    """There is no process to end yet."""


def _start(program: str, doing: str) -> subprocess.Popen[bytes]:
    path = json.dumps([str(entry) for entry in sys.path])
    names = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), program, path],
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, TypeError) as error:
        why = f"cannot start {sys.executable}, by which it is {doing}: {error}"
        raise Gone(why) from None


def _ask(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The line that the process replies; without a line end if the process is gone."""
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:  # a broken pipe
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


# ---- what follows runs in the process -----------------------------------------------------------


def _confine() -> None:
    """Give up, for good, what no answer needs."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    for name, limit in (("AS", MEMORY_BYTES), ("NOFILE", 0), ("NPROC", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(number)[1]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        with contextlib.suppress(OSError, ValueError):  # macOS cannot limit memory
            resource.setrlimit(number, (limit, limit))


def _describe(error: BaseException) -> str:
    """One line about whatever was raised."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    words = " ".join(str(error)[:500].split())
    if type(error).__module__ == "builtins" or not words:
        words = f"{type(error).__name__}: {words}"
    line = getattr(error, "lineno", None)  # of a syntax error
    return f"line {line}: {words}" if line else words


def _serve(prepare: Callable[[], Answer]) -> None:
    answer = prepare()
    _confine()
    for request in sys.stdin.buffer:
        seconds, question = json.loads(request)
        _limit_processor_time(seconds)
        try:
            reply = json.dumps({"answer": answer(question)})
        except BaseException as error:
            reply = json.dumps({"error": _describe(error)})
        _limit_processor_time(0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_processor_time(seconds: float) -> None:
    """After so many seconds of work a signal, SIGPROF, ends this process. 0 means no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _main(program: str, path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for the process that asked
    sys.path[:] = json.loads(path)  # the asker's, so that both find the same libraries
    found = runpy.run_path(program, run_name=CONFINED)
    stack = found.get("STACK_BYTES")
    if stack is None:
        _serve(found["prepare"])
        return
    threading.stack_size(stack)
    thread = threading.Thread(target=_serve, args=[found["prepare"]])
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main(*sys.argv[1:])
