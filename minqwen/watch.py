"""Ends a broken run: when a rank fails or does not go on, all ranks end, with one line that names
it and the reason.

Without this the other ranks would wait in a collective until it times out, and its error would not
say which rank is to blame.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from minqwen.board import Board
from minqwen.errors import ParallelError
from minqwen.files import printable
from minqwen.interrupts import SIGNALS, terminate

NEVER = float("inf")
DIED = "died (killed, crashed or out of memory)"
SILENT = "has been silent"
MISSED = "left while it was still needed (by sys.exit, or at the end of its script)"
TORCHRUN = -1  # stands for torchrun's own process where ranks are numbered
STARTING = 60  # seconds that a rank has at least to arrive, and from there to its first collective
FAREWELL = 5  # seconds that a process which ends gives the others to say that they need it

Handler = Callable[[int, FrameType | None], object] | int | None


class Progress:
    """What this process does besides collectives, such as reading weights.

    pieces: how many pieces of it are done. Each takes some seconds at most, so that who works
    slowly is not taken for one who does nothing.
    """

    pieces = 0


def goes_on() -> None:
    """One more piece of work is done."""
    Progress.pieces += 1


class Process(NamedTuple):
    """A process on some node. Two processes of one `space` give the same pid to the same process;
    `space` is empty where that is unknown. `node` is torchrun's number of the node. `board` is
    what the process calls the board that it has made."""

    pid: int
    space: str
    node: int
    board: int = -1


class Word(NamedTuple):
    """What a rank writes to the store at every beat."""

    beats: int = 0
    left: bool = False  # the rank ends of its own accord
    joined: int = 0  # how many collectives of its replica it has joined
    joined_all: int = 0  # how many of all ranks
    pieces: int = 0  # how much other work it has done, as `goes_on` counts it
    place: str = ""  # where its main thread is: "file.py:12 in function"

    @property
    def progress(self) -> tuple[int, ...]:
        """What changes while the main thread goes on."""
        return self.joined, self.joined_all, self.pieces


class Awaited(NamedTuple):
    """What a rank waits for: the peers that are furthest behind in its collective `number`."""

    of_all: bool  # it is a collective of all ranks, not of one replica
    number: int
    peers: frozenset[int]


class Watch(threading.Thread):
    """A thread in every rank that watches all other ranks, which are called its peers.

    The first rank that notices a lost peer prints the line; then all ranks exit with status 1. A
    node that no longer reaches the store prints a line of its own. A rank that ends because of what
    it has noticed, or of a signal, leaves a word on the board of its node before it does: its
    neighbours, who may notice its end first, do not take that for a cause. And it stays until the
    ranks of other nodes know that the run has ended, since the store may end with it. What the
    watch notices:

    - A peer is killed or crashes. The pidfd of every peer on this node, and of torchrun, becomes
      readable when that process ends. Only Linux has pidfds.
    - A peer is stopped, hangs in the kernel or is cut off. Every rank keeps a `Word` in torchrun's
      store, with a count that it raises at every beat (at least once a second). When a peer's word
      has stood still for `timeout` seconds, the peer is lost. If it is on this node it is killed
      too, because torchrun would wait 30 s for it.
    - A peer lives but does not go on to the collective in which this rank has waited for `timeout`
      seconds: it sleeps or runs in a circle in its own code. Words say how many collectives a rank
      has joined, and how many pieces of other work it has done (`goes_on`). Of several peers that
      are behind, those that are furthest behind are to blame. To its first collective a peer has
      STARTING seconds at least. A rank that waits for its user counts as one that has joined
      already (`Mesh.join_early`). In a patient collective a rank may wait for ever. Where
      there are several replicas (parallel.py), a rank that waits for all ranks waits for as long as
      the other replicas go on: their collectives are counted by themselves.
    - A peer ends of its own accord, for whatever reason. Its last word says so. That alone is no
      loss, but it becomes one when this rank waits in a collective that the peer has not joined, or
      when a collective of this rank fails.
    - The store, which is on one of the nodes, fails or does not answer for `timeout` seconds. The
      peers on other nodes are lost then, because nothing is known of them any more. A question to
      the store that gets no answer may last for hours, so a second thread, the guard, counts how
      long each question lasts.

    A rank whose main thread ends with an exception prints the line itself. Where all ranks fail
    alike, rank 0 does.

    When a rank fails, torchrun sends SIGTERM to the other ranks; after Ctrl-C it sends SIGINT.
    Either signal raises SystemExit in the main thread, after half a second in which this thread can
    name the reason. A main thread that is stuck in a collective cannot raise it, so this thread
    ends the process two seconds after the signal.

    Raises ParallelError when a peer does not arrive within the timeout or within STARTING seconds,
    whichever is longer.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float,
        store: dist.Store,
        node: int = 0,
        ranks_of_replica: int | None = None,
    ) -> None:
        super().__init__(name="minqwen-watch", daemon=True)
        self.ranks_of_replica = ranks_of_replica or size
        self.rank, self.size, self.timeout, self.store, self.node = rank, size, timeout, store, node
        self.beat = min(1.0, timeout / 8)  # seconds from one look at the others to the next
        self.beats = 0
        self.leaving = False  # this rank ends of its own accord
        self.failing = False  # this rank ends with an exception
        self.joined = self.joined_all = 0  # the main thread's collectives, as in its word
        self.waiting = self.patient = False  # in one of them now, and for as long as it takes
        self.of_all = False  # that one is of all ranks
        self.ended = False  # some rank has printed the line
        self.failed_at = NEVER  # when a collective of this rank failed
        self.exit_at = NEVER  # when to end this process because a signal came
        self.exit_code = 1
        self.left: set[int] = set()  # peers that ended of their own accord, or are about to
        self.lost: dict[int, str] = {}  # other peers that are gone, or torchrun, and what happened
        self.questions: dict[int, int] = {}  # of each thread: its unanswered question to the store
        self.asked = itertools.count()
        self.spoken = itertools.count()  # how often this rank was about to print the line
        self.board = Board()
        self.peers = self._meet(max(timeout, STARTING))
        self._share_board()
        self.looked = self.seen = time.monotonic()  # when the last look began, and one that is done
        self.words = dict.fromkeys(self.peers, Word(-1))  # the last word of each peer ...
        self.heard = dict.fromkeys(self.peers, self.looked)  # ... when it was new ...
        self.moved = dict.fromkeys(self.peers, self.looked)  # ... and when it had gone on
        self.awaited: Awaited | None = None  # what this rank waits for ...
        self.awaited_since = self.looked  # ... and since when
        self.poll = select.poll()
        self.pidfds: dict[int, int] = {}
        torchrun = Process(os.getppid(), _pid_space(), node)
        for r, process in {**self.peers, TORCHRUN: torchrun}.items():
            self._open_pidfd(r, process)
        self.waker, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        self.poll.register(self.waker, select.POLLIN)
        self.handlers = self._catch_signals()
        self.excepthook, sys.excepthook = sys.excepthook, self._report
        self.gone = threading.Event()  # this rank has left and asks the store nothing more
        threading.Thread(target=self._guard, name="minqwen-guard", daemon=True).start()
        self.start()

    def _meet(self, patience: float) -> dict[int, Process]:
        """Waits until every rank has written who it is. Returns each peer's process."""
        deadline = time.monotonic() + patience
        peers = [r for r in range(self.size) if r != self.rank]
        with self._sigterm_is_explained(peers):
            who = Process(os.getpid(), _pid_space(), self.node, self.board.fd)
            self.store.set(f"who/{self.rank}", json.dumps(who))
            self.store.set(f"word/{self.rank}", json.dumps(Word()))
            for r in peers:
                if not self._arrives(r, deadline):
                    raise ParallelError(
                        f"rank {r} of {self.size} did not arrive within {patience:g} s: see "
                        "its messages, or set MINQWEN_TIMEOUT (seconds) higher"
                    )
        return {r: Process(*json.loads(self.store.get(f"who/{r}"))) for r in peers}

    @contextlib.contextmanager
    def _sigterm_is_explained(self, peers: list[int]) -> Iterator[None]:
        """When a rank fails before it has arrived, torchrun ends those that wait for it."""

        def explain(number: int, frame: FrameType | None) -> NoReturn:
            missing = [r for r in peers if not self.store.check([f"who/{r}"])]
            if missing and self.store.add("ended", 1) == 1:
                os.write(2, f"error: {self._never_arrived(missing)}: all ranks stop\n".encode())
            terminate(number, frame)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, explain)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _never_arrived(self, missing: list[int]) -> str:
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {self.size}"
        return f"{ranks} had not arrived when SIGTERM came (torchrun sends it when a rank fails)"

    def _arrives(self, r: int, deadline: float) -> bool:
        """Waits until rank r has written to the store. (store.wait would hold up signals.)"""
        while not self.store.check([f"who/{r}", f"word/{r}"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _share_board(self) -> None:
        """All ranks of this node use the board of the lowest of them."""
        space = _pid_space()
        here = [r for r, process in self.peers.items() if space and process.space == space]
        lowest = min(here, default=self.rank)
        if lowest < self.rank:
            self.board.share(self.peers[lowest].pid, self.peers[lowest].board)

    def _open_pidfd(self, r: int, process: Process) -> None:
        """Lets the poll report the end of a process on this node."""
        if not process.space or process.space != _pid_space():
            return
        try:
            self.pidfds[r] = os.pidfd_open(process.pid)
            self.poll.register(self.pidfds[r], select.POLLIN)
        except ProcessLookupError:
            self.lost[r] = DIED
        except (AttributeError, OSError):
            pass  # this system has no pidfds: a dead peer is noticed by its silence

    def _catch_signals(self) -> dict[signal.Signals, Handler]:
        """Lets signals wake the poll and unwind the main thread. Returns the replaced handlers."""
        replaced: dict[signal.Signals, Handler] = {}
        if threading.current_thread() is not threading.main_thread():
            return replaced  # Python lets no other thread do this
        self.woken = signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        free = (signal.SIG_DFL, signal.default_int_handler, terminate)
        for number in SIGNALS:
            if signal.getsignal(number) in free:
                replaced[number] = signal.signal(number, _unwind)
        return replaced

    def run(self) -> None:
        """Looks at the others once a beat, until this rank leaves or the run is broken."""
        while not self.leaving:
            self._look(self.beat)
            if self.lost or (self.ended and not self.failing):
                time.sleep(0.1)
                self._look(0)  # peers that died at the same time are named in the same line
                self._wait_for_words()
                self._end()

    def _wait_for_words(self) -> None:
        """When a peer is silent, the others say something new, or are lost too: those that became
        silent at the same time had spoken last at different times."""
        now = time.monotonic()
        while any(why.startswith(SILENT) for why in self.lost.values()):
            others = self.peers.keys() - self.lost.keys() - self.left
            if self.ended or TORCHRUN in self.lost or all(self.heard[r] > now for r in others):
                return
            self._look(self.beat)

    def _look(self, wait: float) -> None:
        """Waits up to `wait` seconds for something to happen, then updates `left` and `lost`."""
        ready = {fd for fd, _ in self.poll.poll(1000 * wait)}
        now = time.monotonic()
        self._forgive_own_pause(now, wait)
        self._note_signals(ready, now)
        if self.pidfds.get(TORCHRUN) in ready:
            self.lost[TORCHRUN] = "torchrun " + DIED
        if TORCHRUN not in self.lost:  # the store is torchrun's and ends with it
            self._exchange_words(now)
        self.ended = self.ended or self.board.is_claimed()
        # After the exchange: a peer that leaves writes so before its process ends.
        self._note_ended(ready)
        self._note_silent(now)
        self._note_missed(now)
        self._note_absent(now)
        if now > self.exit_at and not self.lost:  # else this rank ends after the line
            self._exit(self.exit_code)
        self.seen = now

    def _forgive_own_pause(self, now: float, wait: float) -> None:
        """When this process itself did not run for a while, no peer is blamed for that time."""
        pause = now - self.looked - wait
        self.looked = now
        if pause > self.beat:
            self.failed_at += pause
            self.heard = {r: then + pause for r, then in self.heard.items()}
            self.moved = {r: then + pause for r, then in self.moved.items()}
            self.awaited_since += pause

    def _note_signals(self, ready: set[int], now: float) -> None:
        """After a signal the main thread has two seconds to end this process."""
        if self.waker not in ready:
            return
        for number in os.read(self.waker, 64):
            if number:  # a 0 only wakes the poll
                self.exit_at, self.exit_code = now + 2, 128 + number

    def _exchange_words(self, now: float) -> None:
        """Writes this rank's word to the store and reads those of its peers."""
        self.beats += 1
        try:
            with self._asking():
                own = self._own_word()
                self.store.set(f"word/{self.rank}", json.dumps(own))
                words = self.store.multi_get([f"word/{r}" for r in self.peers])
                self.ended = self.ended or self.store.check(["ended"])
        except RuntimeError:
            self._lose_store("torchrun's store does not answer")
            return
        for r, word in zip(self.peers, words):
            self._hear(r, Word(*json.loads(word)), now)

    def _own_word(self) -> Word:
        collectives = self.joined, self.joined_all
        return Word(self.beats, self.leaving, *collectives, Progress.pieces, _place())

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """What is done within is a question to the store, which the guard does not let last."""
        thread = threading.get_ident()
        self.questions[thread] = next(self.asked)
        try:
            yield
        finally:
            del self.questions[thread]

    def _guard(self) -> None:
        """Ends this process when the store does not answer a question for `timeout` seconds.

        It counts its own beats: the time in which this whole process is stopped does not count.
        """
        waited: dict[int, float] = {}  # how long each unanswered question has lasted
        while not self.gone.wait(self.beat):
            unanswered = list(self.questions.values())
            waited = {question: waited.get(question, 0) + self.beat for question in unanswered}
            if max(waited.values(), default=0) > self.timeout:
                silence = f"torchrun's store has not answered for {self.timeout:g} s"
                self._lose_store(f"{silence} (is the network cut?)")
                self._end()

    def _lose_store(self, reason: str) -> None:
        """Without the store nothing is known of the peers on other nodes."""
        for r, process in self.peers.items():
            if process.node != self.node and r not in self.left:
                self.lost.setdefault(r, f"on node {process.node} cannot be reached")
        self.lost[TORCHRUN] = reason

    def _hear(self, r: int, word: Word, now: float) -> None:
        before = self.words[r]
        if word.beats != before.beats:
            self.words[r], self.heard[r] = word, now
        if word.progress != before.progress:
            self.moved[r] = now
        if word.left:
            self.left.add(r)

    def _note_ended(self, ready: set[int]) -> None:
        """A peer whose process ended is lost, unless it left of its own accord, or because it had
        noticed before this rank what ends the run."""
        ended = [r for r in self.peers.keys() & self.pidfds.keys() if self.pidfds[r] in ready]
        lines = self.board.lines() if ended else []
        for r in ended:
            self.poll.unregister(self.pidfds[r])
            if f"rank {r} ends" in lines:
                self.left.add(r)
            elif r not in self.left:
                self.lost[r] = _how_it_ended(self.peers[r].pid)

    def _note_silent(self, now: float) -> None:
        """A peer is lost when its word stands still. After a failed collective, 5 s are enough."""
        patience = self.timeout if self.failed_at == NEVER else min(self.timeout, 5)
        for r, then in self.heard.items():
            if now - then > patience and r not in self.left:
                self.lost.setdefault(r, f"{SILENT} for {patience:g} s (stopped, hung or cut off)")

    def _note_missed(self, now: float) -> None:
        """Peers that left are lost if they have not joined the collective in which this rank waits,
        and a second after a failed one. But when a signal ends this rank, the run is ending anyway
        and nobody is to blame."""
        if self.exit_at != NEVER:
            return
        missed = self.left
        if now <= self.failed_at + 1:
            missed = self.left & self._behind()
        self.lost |= dict.fromkeys(missed, MISSED)

    def _note_absent(self, now: float) -> None:
        """Peers are lost when this rank has waited for them, in one collective, for too long."""
        awaited = self._awaited()
        if awaited != self.awaited:
            self.awaited, self.awaited_since = awaited, now
        if awaited is None:
            return
        for r in awaited.peers:
            word = self.words[r]
            starting = not any(word.progress)
            patience = max(self.timeout, STARTING) if starting else self.timeout
            if now - max(self.awaited_since, self.moved[r]) > patience:
                self.lost.setdefault(
                    r,
                    f"has not joined the others for {patience:g} s (it is busy at {word.place})",
                )

    def _awaited(self) -> Awaited | None:
        """The peers that are furthest behind the collective in which this rank waits: in each
        replica those whom the rest of it waits for."""
        behind = self._behind()
        if not behind or self.patient:
            return None
        least: dict[int, int] = {}
        for r in behind:
            replica = self._replica(r)
            least[replica] = min(self.words[r].joined, least.get(replica, self.words[r].joined))
        number = self.joined_all if self.of_all else self.joined
        furthest = frozenset(r for r in behind if self.words[r].joined == least[self._replica(r)])
        return Awaited(self.of_all, number, furthest)

    def _behind(self) -> set[int]:
        """The peers that have not joined the collective in which this rank waits."""
        if not self.waiting:
            return set()
        if self.of_all:
            return {r for r, word in self.words.items() if word.joined_all < self.joined_all}
        mine = self._replica(self.rank)
        return {
            r
            for r, word in self.words.items()
            if self._replica(r) == mine and word.joined < self.joined
        }

    def _replica(self, r: int) -> int:
        return r // self.ranks_of_replica

    def _end(self) -> NoReturn:
        """Prints the line if no other rank does, kills the lost ranks of this node, and exits."""
        if self._is_first():
            os.write(2, f"error: {self._reasons()}: all ranks stop\n".encode())
        for r in (self.peers.keys() & self.pidfds.keys() & self.lost.keys()) - self.left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfds[r], signal.SIGKILL)
        self._let_other_nodes_hear()
        self._exit(1)

    def _exit(self, status: int) -> NoReturn:
        self._pin_end()
        os._exit(status)

    def _pin_end(self) -> None:
        """From now on the end of this process is no death."""
        self.board.pin(f"rank {self.rank} ends")

    def _let_other_nodes_hear(self) -> None:
        """Stays until the ranks of other nodes know that the run has ended. The store may be on
        this node and end with it, and they would say that this node is lost."""
        nodes = {r: process.node for r, process in self.peers.items()}
        far = {r for r, node in nodes.items() if node != self.node} - self.left - self.lost.keys()
        if TORCHRUN in self.lost or not far:
            return
        deadline = time.monotonic() + FAREWELL
        with contextlib.suppress(RuntimeError):  # the store is lost, and there was a line
            with self._asking():
                self.store.set(f"over/{self.rank}", "")
            while not self._know(far) and time.monotonic() < deadline:
                time.sleep(0.02)

    def _know(self, ranks: set[int]) -> bool:
        with self._asking():
            return self.store.check([f"over/{r}" for r in ranks])

    def _is_first(self) -> bool:
        """Whether this rank prints the line, which it does once: the first of its node does, if the
        store says that it is the first of all nodes too, or if the store is lost."""
        if not self.board.claim():
            return False
        # The store may hold up one thread while another, the guard, finds that it is lost.
        first = TORCHRUN in self.lost or self._is_first_of_all()
        return first and next(self.spoken) == 0

    def _is_first_of_all(self) -> bool:
        try:
            with self._asking():
                return self.store.add("ended", 1) == 1
        except RuntimeError:
            return True  # two lines are better than none

    def _reasons(self) -> str:
        """What happened to each lost peer, in the order of their ranks."""
        reasons = []
        for r, reason in sorted(self.lost.items()):
            if r != TORCHRUN:
                reason = f"{self._who(r, self.peers[r].pid)} {reason}"
            reasons.append(reason)
        return "; ".join(reasons)

    def _who(self, r: int, pid: int) -> str:
        return f"rank {r} of {self.size} (pid {pid})"

    def _report(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """As sys.excepthook: an exception ends this rank. Without a traceback, which cli.run does
        not give, only the line is printed. (torch.distributed puts a hook of its own around this
        one, so it stays, and does nothing once this rank has left.)"""
        if trace is not None:
            self.excepthook(kind, error, trace)
        if self.leaving or issubclass(kind, KeyboardInterrupt):
            return  # the others do not need this rank, or torchrun says that it was interrupted
        self.failing = True
        if self.rank:
            self._let_rank_0_speak(time.monotonic() + FAREWELL)
        if self._is_first():
            said = printable((str(error).splitlines() or [""])[0][:500])
            name = self._who(self.rank, os.getpid())
            os.write(2, f"error: {name} raised {kind.__name__}: {said}: all ranks stop\n".encode())

    def _let_rank_0_speak(self, deadline: float) -> None:
        """Waits until rank 0 has failed too, or waits in a collective without this rank."""
        while not self.ended and not self._rank_0_is_ahead():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)

    def _rank_0_is_ahead(self) -> bool:
        word = self.words[0]
        ahead = self._replica(self.rank) == 0 and word.joined > self.joined
        return ahead or word.joined_all > self.joined_all

    def begin(self, patient: bool = False, of_all: bool = False) -> None:
        """The main thread joins its next collective. patient: however late the others are. of_all:
        it is one of all ranks, not of this rank's replica."""
        self.patient, self.of_all = patient, of_all
        self.note(of_all)
        self.waiting = True

    def note(self, of_all: bool = False) -> None:
        """The main thread goes on."""
        if of_all:
            self.joined_all += 1
        else:
            self.joined += 1

    def finish(self) -> None:
        """The collective has returned. Those on a GPU return before they are done, and are then
        waited for until the next one begins."""
        self.waiting = False

    def investigate(self) -> None:
        """The main thread calls this when a collective failed. If a peer is to blame, this process
        ends meanwhile; it returns only if the watch, which may be late, finds none in 7 s."""
        self.failed_at = time.monotonic()
        while self.is_alive() and self.seen <= self.failed_at + 7:
            time.sleep(0.1)
        self.failed_at = NEVER

    def leave(self, linger: float) -> None:
        """Tells the others that this rank leaves, waits up to `linger` seconds for them to leave
        too, and stops watching. If a peer is lost meanwhile, this process ends."""
        self.leaving = True
        with contextlib.suppress(OSError, ValueError):  # this process may end without doing it
            sys.stdout.flush()
        self._pin_end()
        os.write(self.wake, b"\0")
        self.join()
        self._look(0)  # this writes the last word
        if self.exit_at == NEVER:
            self._wait_for_others(time.monotonic() + linger)
        self.gone.set()
        if self.handlers and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.woken)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def _wait_for_others(self, deadline: float) -> None:
        """Until all have left. If somebody has printed the line, this rank does not end as if all
        were well."""
        while not self.lost and self.left != self.peers.keys() and time.monotonic() < deadline:
            if self.ended and self.failing:
                self._let_other_nodes_hear()
                return  # its status says so already
            if self.ended:
                self._end()
            self._look(0.02)
        if self.lost:
            self._end()


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the main thread, after the watch has had time to name the reason."""
    time.sleep(0.5)
    terminate(number, frame)


def _how_it_ended(pid: int) -> str:
    """What happened to a process of this node that has just ended.

    The kernel knows its status until its parent has asked for it, which torchrun soon does.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = int(file.read().rsplit(None, 1)[1])
    except (OSError, ValueError, IndexError):
        return DIED
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"died (it ended with status {code}, and said nothing)"
    return f"died ({signal.Signals(-code).name}: killed, crashed or out of memory)"


def _place() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def _pid_space() -> str:
    """The `space` of this process: this boot of this machine, and the process's pid namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
