"""What a rank makes of its peers: who goes on, who has died, and who ended because of that.

There is one rank, without a thread; its peers are what it finds in the store, on the board and in
the poll. Nothing waits for the clock.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import threading
from types import SimpleNamespace

import pytest

from minqwen import watch
from minqwen.board import Board
from minqwen.watch import DIED, NEVER, TORCHRUN, Process, Watch, Word

PIDS = 5_000_000  # no process has one of these numbers


class Exited(Exception):
    pass


class Ready:
    """A poll that has seen these ends, and nothing else."""

    def __init__(self, *ended: int):
        self.ended, self.polls = ended, 0

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        ready, self.ended = self.ended, ()
        self.polls += 1
        assert self.polls < 50, "the rank goes on"
        return [(fd, select.POLLIN) for fd in ready]

    def unregister(self, fd: int) -> None:
        pass


class Store:
    """torchrun's store, of which ranks ask only this; `over` are those that know of the end."""

    def __init__(self, words: dict[int, Word], over: tuple[int, ...] = ()):
        self.words, self.kept = words, {f"over/{r}" for r in over}
        self.ended = 0

    def set(self, key, value):
        self.kept.add(key)

    def multi_get(self, keys):
        return [json.dumps(self.words[int(key.split("/")[1])]) for key in keys]

    def check(self, keys):
        return self.kept >= set(keys)

    def add(self, key, number):
        self.kept.add(key)
        self.ended += number
        return self.ended


class Lost(Store):
    def set(self, key, value):
        raise RuntimeError("connection reset by peer")


@pytest.fixture
def board():
    made = Board()
    yield made
    os.close(made.fd)


@pytest.fixture
def ranks(monkeypatch, board):
    """(the rest of rank 0's state) -> rank 0, with peers 1, 2, 3 on its node and 4, 5 on another.
    The clock stands still, but while rank 0 sleeps."""
    clock = [100.0]
    # Not in `time` itself, by which a server's loop in this process waits.
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch.time.sleep = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    monkeypatch.setattr(watch.signal, "pidfd_send_signal", lambda *_: None)

    def leave(status):
        raise Exited(status)

    monkeypatch.setattr(watch.os, "_exit", leave)

    def make(**state):
        rank = object.__new__(Watch)  # it is no thread, and meets nobody
        peers = {r: Process(PIDS + r, "here" if r < 4 else "there", r // 4) for r in range(1, 6)}
        words = dict.fromkeys(peers, Word())
        vars(rank).update(
            rank=0, size=6, node=0, beat=1.0, timeout=8.0, leaving=False, failing=False,
            ended=False, peers=peers, pidfds={r: 1000 + r for r in (TORCHRUN, 1, 2, 3)},
            poll=Ready(), waker=-1, looked=100.0, left=set(), lost={}, words=dict(words),
            heard=dict.fromkeys(peers, 100.0), moved=dict.fromkeys(peers, 100.0), board=board,
            waiting=False, patient=False, awaited=None, awaited_since=100.0, exit_at=NEVER,
            exit_code=130, failed_at=NEVER, store=Store(words, over=(4, 5)), questions={}, beats=0,
            asked=itertools.count(), spoken=itertools.count(), joined=0, joined_all=0,
            of_all=False, ranks_of_replica=6,
        )  # fmt: skip
        vars(rank).update(state)
        return rank, clock

    return make


def line(rank, capfd, status=1) -> str:
    """The line that rank 0 prints before it ends, or ""."""
    with pytest.raises(Exited, match=rf"^{status}$"):
        rank.run()
    assert f"rank {rank.rank} ends" in rank.board.lines()
    return capfd.readouterr().err


def test_who_dies_is_named_and_who_ends_because_of_that_is_not(ranks, capfd):
    rank, _ = ranks(poll=Ready(1001, 1002))
    rank.board.pin("rank 2 ends")
    assert line(rank, capfd) == f"error: rank 1 of 6 (pid 5000001) {DIED}: all ranks stop\n"


def test_who_ends_because_the_store_is_lost_is_not_named(ranks, capfd):
    said = "error: torchrun's store does not answer; rank 4 of 6 (pid 5000004) on node 1 cannot be "
    said += "reached; rank 5 of 6 (pid 5000005) on node 1 cannot be reached: all ranks stop\n"
    rank, _ = ranks(poll=Ready(1001, 1003), store=Lost({}))
    rank.board.pin("rank 1 ends")
    rank.board.pin("rank 3 ends")
    assert line(rank, capfd) == said


def test_who_dies_when_the_store_is_lost_is_named(ranks, capfd):
    rank, _ = ranks(poll=Ready(1001, 1003), store=Lost({}))
    rank.board.pin("rank 1 ends")
    assert f"; rank 3 of 6 (pid 5000003) {DIED}; rank 4" in line(rank, capfd)


def test_a_neighbour_that_lost_the_store_speaks_for_one_that_did_not(ranks, capfd):
    rank, _ = ranks(poll=Ready(1001))
    rank.board.pin("claim 5000001")
    rank.board.pin("rank 1 ends")
    assert line(rank, capfd) == ""


def test_who_became_silent_a_beat_later_is_named_too_and_who_speaks_is_not(ranks, capfd):
    rank, clock = ranks()
    rank.peers = {r: rank.peers[r] for r in (1, 4, 5)}
    rank.heard = {1: 102.5, 4: 100.0, 5: 101.5}
    rank.moved = dict(rank.heard)

    def poll(milliseconds):
        clock[0] += milliseconds / 1000
        if clock[0] > 109.5:
            rank.store.words[1] = Word(beats=7)  # it is late
        return []

    rank.poll.poll = poll
    silent = "has been silent for 8 s (stopped, hung or cut off)"
    said = f"error: rank 4 of 6 (pid 5000004) {silent}; rank 5 of 6 (pid 5000005) {silent}"
    assert line(rank, capfd) == said + ": all ranks stop\n"


def test_of_two_neighbours_that_lost_torchrun_one_speaks(ranks, capfd):
    rank, _ = ranks(poll=Ready(1000 + TORCHRUN))
    assert line(rank, capfd) == "error: torchrun " + DIED + ": all ranks stop\n"
    assert os.pread(rank.board.fd, 100, 0) == b"claim %d\nrank 0 ends\n" % os.getpid()


def test_who_hears_of_a_loss_last_is_silent(ranks, capfd):
    rank, _ = ranks(poll=Ready(1000 + TORCHRUN))
    rank.board.pin("claim 5000002")
    assert line(rank, capfd) == ""


def test_of_all_nodes_one_speaks(ranks, capfd):
    rank, _ = ranks(poll=Ready(1001))
    rank.store.add("ended", 1)  # by rank 5
    assert line(rank, capfd) == "" and rank.board.is_claimed()


def test_a_store_that_is_lost_just_then_keeps_no_rank_from_speaking(ranks, capfd):
    rank, _ = ranks(poll=Ready(1001))

    def add(key, number):
        raise RuntimeError("connection reset by peer")

    rank.store.add = add
    assert line(rank, capfd) == f"error: rank 1 of 6 (pid 5000001) {DIED}: all ranks stop\n"


def test_the_watch_and_its_guard_do_not_both_speak(ranks, capfd):
    rank, _ = ranks(lost={TORCHRUN: "torchrun's store has not answered for 8 s"})
    for _ in range(2):
        with pytest.raises(Exited):
            rank._end()
    assert capfd.readouterr().err.count("\n") == 1


def test_a_signal_ends_a_rank_after_two_seconds_and_its_neighbours_do_not_call_that_death(
    ranks, capfd
):
    one, clock = ranks(exit_at=102.0)
    one._look(0)
    clock[0] = 102.5
    assert line(one, capfd, status=130) == ""
    two, _ = ranks(poll=Ready(1000), rank=1, exit_at=104.0)
    two.peers, two.pidfds = {0: Process(PIDS, "here", 0)}, {0: 1000}
    two.store.words[0] = two.words[0] = Word()
    two._look(0)
    assert not two.lost and two.left == {0}


def test_a_signal_does_not_keep_a_late_rank_from_saying_what_was_lost(ranks, capfd):
    rank, _ = ranks(exit_at=99.0, poll=Ready(1001))
    assert line(rank, capfd) == f"error: rank 1 of 6 (pid 5000001) {DIED}: all ranks stop\n"


def test_who_leaves_after_a_signal_says_so_to_its_neighbours_without_the_store_too(ranks, capfd):
    reader, writer = os.pipe()
    rank, _ = ranks(exit_at=102.0, store=Lost({}), wake=writer, join=lambda: None, handlers={})
    rank.gone = threading.Event()
    rank.leave(5)
    assert rank.board.lines() == ["rank 0 ends"] and rank.gone.is_set()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("deed", ["ends", "leaves"])
def test_it_stays_until_other_nodes_know_that_the_run_has_ended(ranks, monkeypatch, capfd, deed):
    rank, clock = ranks(poll=Ready(1001), store=Store({r: Word() for r in range(1, 6)}, over=(4,)))
    asked = []

    def sleep(seconds):
        clock[0] += seconds
        asked.append("over/0" in rank.store.kept)
        if len(asked) == 3:
            rank.store.kept.add("over/5")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    if deed == "ends":
        assert "rank 1 of 6 (pid 5000001) died" in line(rank, capfd)
        assert asked == [False, True, True]  # the first is the wait for who dies at the same time
    else:
        rank.ended = rank.failing = True
        rank._wait_for_others(200.0)
        assert asked == [True, True, True]


def test_a_node_that_does_not_hear_is_waited_for_five_seconds(ranks, capfd):
    rank, clock = ranks(poll=Ready(1001), store=Store({r: Word() for r in range(1, 6)}))
    assert "rank 1 of 6 (pid 5000001) died" in line(rank, capfd)
    assert 105 < clock[0] < 105.2


@pytest.mark.parametrize("state", ["lost", "left"])
def test_a_node_that_is_lost_or_has_left_is_not_waited_for(ranks, capfd, state):
    gone = dict.fromkeys((4, 5), "cannot be reached") if state == "lost" else {4, 5}
    words = {r: Word() for r in range(1, 6)}
    rank, clock = ranks(poll=Ready(1001), store=Store(words), **{state: gone})
    assert "rank 1 of 6 (pid 5000001) died" in line(rank, capfd)
    assert clock[0] < 100.2


def test_who_asks_whether_a_peer_is_to_blame_waits_until_the_watch_has_looked(ranks, monkeypatch):
    # The whole process was stopped for a minute, and the main thread is the first to go on.
    rank, clock = ranks(seen=100.0, is_alive=lambda: True)
    looks = []

    def sleep(seconds):
        if looks:
            rank._look(0)
        looks.append(rank.failed_at)
        clock[0] += 1 if len(looks) > 1 else 60

    monkeypatch.setattr(watch.time, "sleep", sleep)
    rank.investigate()
    assert looks == [100.0] + 9 * [160.0] and rank.failed_at == NEVER


class Words:
    """A store: of each beat the word of the one peer."""

    def __init__(self, words):
        self.words, self.beats, self.own = iter(words), 0, []

    def set(self, key, value):
        self.own.append(json.loads(value))

    def multi_get(self, keys):
        self.beats += 1
        return [json.dumps(next(self.words)._replace(beats=self.beats))]

    def check(self, keys):
        return False

    def add(self, key, number):
        return 1


@pytest.fixture
def waiting(monkeypatch, board):
    """(the words of rank 1, the rest of rank 0's state) -> the line with which rank 0 ends, or ""
    if it watches until there are no more words. It waits in its second collective, and looks once
    a second; the timeout is 8 s."""

    def watch_until_the_end(words, capfd, **state):
        clock = [100.0]
        now = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: None)
        monkeypatch.setattr(watch, "time", now)
        monkeypatch.setattr(watch.signal, "pidfd_send_signal", lambda *_: None)

        def leave(status):
            raise Exited(status)

        class Quiet:
            def poll(self, milliseconds):
                clock[0] += milliseconds / 1000
                return []

        monkeypatch.setattr(watch.os, "_exit", leave)
        rank = object.__new__(Watch)
        vars(rank).update(
            rank=0, size=2, node=0, beat=1.0, timeout=8.0, leaving=False, failing=False,
            ended=False, peers={1: Process(101, "here", 0)}, pidfds={}, poll=Quiet(), waker=-1,
            looked=100.0, left=set(), lost={}, words={1: Word(-1)}, heard={1: 100.0},
            moved={1: 100.0}, waiting=True, patient=False, awaited=None, awaited_since=100.0,
            exit_at=NEVER, failed_at=NEVER, store=Words(words), questions={}, beats=0,
            asked=itertools.count(), spoken=itertools.count(), joined=2, joined_all=0,
            of_all=False, ranks_of_replica=2, board=board,
        )  # fmt: skip
        vars(rank).update(state)
        with pytest.raises((Exited, StopIteration)):
            rank.run()
        return capfd.readouterr().err, clock[0] - 100

    return watch_until_the_end


def test_who_reads_weights_is_waited_for_and_who_stops_reading_is_not(waiting, capfd):
    reads = [Word(joined=1, pieces=i // 6) for i in range(60)]
    assert waiting(reads, capfd) == ("", 61)
    stops = [*reads, *[Word(joined=1, pieces=9, place="x.py:3 in f")] * 20]
    line, seconds = waiting(stops, capfd)
    assert "rank 1 of 2 (pid 101) has not joined the others for 8 s" in line
    assert "(it is busy at x.py:3 in f): all ranks stop" in line and 60 < seconds < 65


def test_before_its_first_piece_of_work_a_rank_has_a_minute(waiting, capfd):
    line, seconds = waiting([Word()] * 200, capfd)
    assert "has not joined the others for 60 s" in line and 60 <= seconds < 63


def test_whoever_counts_as_joined_early_is_not_blamed(waiting, capfd):
    thinks = [Word(joined=2, pieces=9)] * 200
    assert waiting(thinks, capfd) == ("", 201)
