"""Ctrl-C while minqwen is imported, which is mostly torch, is not lost.

Some code that runs while torch is imported swallows every exception, KeyboardInterrupt too: at one
moment in eight Ctrl-C had no effect. So it is remembered, and raised again after the import.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn


class Interrupts:
    """From when it is made to `end`; only in the main thread, and where nobody handles Ctrl-C."""

    def __init__(self) -> None:
        self.came = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.remember)

    def remember(self, number: int, frame: FrameType | None) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """Raise KeyboardInterrupt if one was swallowed. From now on Ctrl-C is Python's again."""
        if signal.getsignal(signal.SIGINT) == self.remember:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.came:
            raise KeyboardInterrupt


DURING_IMPORT = Interrupts()
