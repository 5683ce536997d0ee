"""Ctrl-C and SIGTERM end a program soon, whatever it does: also while torch is imported.

Some code that runs while torch is imported swallows every exception, KeyboardInterrupt too: at one
moment in eight Ctrl-C had no effect. So it is remembered, and raised again after the import. A
command line, or a rank, need not wait for that: there Ctrl-C ends the process as SIGTERM does, at
once, even within C code.

After the import a command line calls `end_on_signals`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from minqwen.commands import TOOLS

SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNWINDING = 3  # seconds in which the main thread may write what is finished, after a signal


class Interrupts:
    """From when it is made to `end`; only in the main thread, and where nobody handles Ctrl-C."""

    def __init__(self) -> None:
        self.came = self.taken = False
        if threading.current_thread() is not threading.main_thread():
            return
        # A shell's background jobs ignore Ctrl-C. torchrun, which passes it on to them, does not.
        free = [signal.default_int_handler, *([signal.SIG_IGN] if is_rank() else [])]
        if signal.getsignal(signal.SIGINT) in free:
            self.taken = True
            at_once = is_rank() or is_tool()
            signal.signal(signal.SIGINT, signal.SIG_DFL if at_once else self.remember)

    def remember(self, number: int, frame: FrameType | None) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """Raise KeyboardInterrupt if one was swallowed. From now on Ctrl-C is Python's again."""
        if self.taken and signal.getsignal(signal.SIGINT) in (self.remember, signal.SIG_DFL):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.came:
            raise KeyboardInterrupt


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_tool() -> bool:
    """Whether this process is one of our command lines."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # the module is being looked for
        return sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == ["minqwen"]
    return program.startswith("minqwen ") or TOOLS in Path(program).resolve().parents


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the main thread as a shell counts the ends by signals: 143 for SIGTERM."""
    raise SystemExit(128 + number)


def end_on_signals() -> None:
    """From now on SIGTERM unwinds the main thread, as Ctrl-C does. If that does not end the process
    in time, because a step or the end of a thread takes long, this does, with the same exit status.

    The watch of the ranks, and the server, take this over while they are there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end, args=(reader,), name="minqwen-signals", daemon=True).start()


def _end(reader: int) -> None:
    """Waits for a signal, and then lets the main thread have its time."""
    while True:
        for number in os.read(reader, 1):
            if number in SIGNALS and signal.getsignal(number) != signal.SIG_IGN:
                time.sleep(UNWINDING)
                os._exit(128 + number)


DURING_IMPORT = Interrupts()
