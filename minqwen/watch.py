"""What ends a broken run: a rank that is killed or stopped ends all ranks, with one line that names it.

Without this the others would sit in a collective for as long as its timeout, and then name nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time

import torch.distributed as dist

from minqwen.errors import ParallelError

NEVER = float("inf")
DIED = "died (killed, crashed or out of memory)"
TORCHRUN = -1  # in place of a rank


class Watch(threading.Thread):
    """The thread of each rank that watches the others; the first to notice prints the line, all then exit 1.

    Killed: the pidfd of every peer on this node (and of torchrun) becomes readable as the process ends; Linux
    only. Stopped, hung in the kernel or cut off: its word in torchrun's store, a count it raises every
    second, has stood still for `timeout` seconds; on this node it is then killed, or torchrun would wait 30 s
    for it. A rank that ends of its own accord, for whatever reason, says so, and is missed only by a
    collective that fails. Not noticed: a rank that lives but never joins a collective, for so does rank 0
    waiting for its user.

    When a rank fails torchrun sends the others SIGTERM; after Ctrl-C, SIGINT. They unwind by SystemExit, half
    a second later so that this thread can name the reason first. A main thread stuck in a collective cannot,
    so this one ends the process after two.

    Raises ParallelError when a peer does not arrive within the timeout or 60 s, whichever is longer.
    """

    def __init__(self, rank: int, size: int, timeout: float, store: dist.Store) -> None:
        super().__init__(name="minqwen-watch", daemon=True)
        self.rank, self.size, self.timeout, self.store = rank, size, timeout, store
        self.beat, self.count, self.done, self.ended = min(1.0, timeout / 8), 0, False, False
        self.failed_at, self.exit_at, self.exit_code = (
            NEVER,
            NEVER,
            1,
        )  # a collective failed; a signal came
        self.left: set[int] = set()  # peers that ended of their own accord, or are about to
        self.lost: dict[int, str] = {}  # peers that did not, and torchrun: what became of them
        self.pids, self.pidfds, self.poll = self._meet(max(timeout, 60)), {}, select.poll()
        self.looked = time.monotonic()
        self.heard = {
            r: (b"", self.looked) for r in self.pids
        }  # each peer's last word and when it was new
        for r, (pid, space) in {**self.pids, TORCHRUN: (os.getppid(), _pid_space())}.items():
            if space and space == _pid_space():
                try:
                    self.pidfds[r] = os.pidfd_open(pid)
                    self.poll.register(self.pidfds[r], select.POLLIN)
                except ProcessLookupError:
                    self.lost[r] = DIED
                except (AttributeError, OSError):
                    pass  # no pidfds on this system: silence will tell
        self.waker, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        self.poll.register(self.waker, select.POLLIN)
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.handlers[number] = signal.signal(number, _unwind)
        self.start()

    def _meet(self, patience: float) -> dict[int, tuple[int, str]]:
        """Waits until every rank has written who it is. Returns each peer's pid and pid space."""
        self.store.set(f"who/{self.rank}", json.dumps([os.getpid(), _pid_space()]))
        self.store.set(f"word/{self.rank}", "0")
        peers, deadline = (
            [r for r in range(self.size) if r != self.rank],
            time.monotonic() + patience,
        )
        for r in peers:
            while not self.store.check(
                [f"who/{r}", f"word/{r}"]
            ):  # store.wait would hold up signals
                if time.monotonic() > deadline:
                    raise ParallelError(
                        f"rank {r} of {self.size} did not arrive within {patience:g} s: see "
                        "its messages, or set MINQWEN_TIMEOUT (seconds) higher"
                    )
                time.sleep(0.02)
        return {r: json.loads(self.store.get(f"who/{r}")) for r in peers}

    def run(self) -> None:
        while not self.done:
            self._look(self.beat)
            if self.lost or self.ended:
                time.sleep(0.1)
                self._look(0)  # who else died at the same time?
                self._end()

    def _look(self, wait: float) -> None:
        """Waits up to `wait` seconds for something to happen, then brings left and lost up to date."""
        ready = {fd for fd, _ in self.poll.poll(1000 * wait)}
        now = time.monotonic()
        pause, self.looked = now - self.looked - wait, now
        if pause > self.beat:  # it was this process that did not run: blame nobody for it
            self.heard = {r: (word, then + pause) for r, (word, then) in self.heard.items()}
        for number in os.read(self.waker, 64) if self.waker in ready else b"":
            if number:  # a signal's; 0 only wakes
                self.exit_at, self.exit_code = now + 2, 128 + number
        if self.pidfds.get(TORCHRUN) in ready:
            self.lost[TORCHRUN] = "torchrun " + DIED
        if TORCHRUN not in self.lost:  # and its store with it
            self._exchange(now)
        for r in self.pids.keys() & self.pidfds.keys():
            if self.pidfds[r] in ready:
                self.poll.unregister(self.pidfds[r])
                if r not in self.left:
                    self.lost[r] = DIED
        patience = self.timeout if self.failed_at == NEVER else min(self.timeout, 5)
        for r, (_, then) in self.heard.items():
            if now - then > patience and r not in self.left:
                self.lost.setdefault(r, f"has been silent for {patience:g} s (stopped or hung)")
        if now > self.failed_at + 1 and self.exit_at == NEVER:
            self.lost |= {r: "left while it was still needed" for r in self.left}
        if now > self.exit_at:
            os._exit(self.exit_code)

    def _exchange(self, now: float) -> None:
        try:
            self.count += 1
            self.store.set(f"word/{self.rank}", "left" if self.done else str(self.count))
            for r, word in zip(self.heard, self.store.multi_get([f"word/{r}" for r in self.heard])):
                if word != self.heard[r][0]:
                    self.heard[r] = (word, now)
                if word == b"left":
                    self.left.add(r)
            self.ended = self.store.check(["ended"])
        except RuntimeError:
            self.lost[TORCHRUN] = "torchrun's store does not answer"

    def _end(self) -> None:
        try:
            if TORCHRUN not in self.lost:
                first = self.store.add("ended", 1) == 1
            else:
                first = self.rank == min(set(range(self.size)) - self.left - self.lost.keys())
        except RuntimeError:
            first = True
        if first:
            names = {
                r: f"rank {r} of {self.size} (pid {pid}) " for r, (pid, _) in self.pids.items()
            }
            what = "; ".join(names.get(r, "") + what for r, what in sorted(self.lost.items()))
            os.write(2, f"error: {what}: all ranks stop\n".encode())
        for r in (self.pids.keys() & self.pidfds.keys() & self.lost.keys()) - self.left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfds[r], signal.SIGKILL)
        os._exit(1)

    def investigate(self) -> None:
        """Called when a collective failed. Returns only if, after 7 s, no peer can be blamed for it."""
        self.failed_at = time.monotonic()
        time.sleep(7)
        self.failed_at = NEVER

    def leave(self, linger: float) -> None:
        """Says goodbye and stops watching; first waits up to `linger` seconds for the others to leave too."""
        self.done = True
        os.write(self.wake, b"\0")
        self.join()
        deadline = time.monotonic() + linger
        while True:
            self._look(0.02 if linger else 0)
            if self.lost and linger:
                self._end()
            if self.left >= self.pids.keys() or time.monotonic() >= deadline:
                break
        if self.handlers and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)


def _unwind(number: int, frame: object) -> None:
    time.sleep(0.5)
    raise SystemExit(128 + number)


def _pid_space() -> str:
    """Equal for two processes in which a pid means the same process; empty where that is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
