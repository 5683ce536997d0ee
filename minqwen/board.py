"""What the ranks of one machine tell each other without torchrun's store, and leave behind.

The store may be lost, and a process that has ended answers nobody. But what it has pinned to the
board stays there: whoever finds that a neighbour has ended, and then reads the board, knows why.
"""

from __future__ import annotations

import fcntl
import os
import tempfile


class Board:
    """Lines in memory that several processes share. Each stays, and none is ever waited for.

    A line is appended in one step, so all readers see the lines in one order.
    """

    def __init__(self) -> None:
        try:
            self.fd = os.memfd_create("minqwen-board")
        except (AttributeError, OSError):  # this system has none
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        self._append_only()

    def _append_only(self) -> None:
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_APPEND)

    def share(self, pid: int, fd: int) -> None:
        """From now on this is the board that process `pid` made, and knows as `fd`. Where the
        system does not allow that, it remains this process's own."""
        try:
            shared = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError:
            return
        os.close(self.fd)
        self.fd = shared
        self._append_only()

    def pin(self, line: str) -> None:
        os.write(self.fd, f"{line}\n".encode())

    def lines(self) -> list[str]:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0).decode().splitlines()

    def claim(self) -> bool:
        """Whether this process is the first of all to claim. It remains that, however often it
        asks, also when it has ended."""
        own = f"claim {os.getpid()}"
        self.pin(own)
        return next(line for line in self.lines() if line.startswith("claim ")) == own

    def is_claimed(self) -> bool:
        return any(line.startswith("claim ") for line in self.lines())
