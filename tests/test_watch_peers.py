"""What a rank makes of its peers: who goes on, and who must still notice that torchrun is gone.

The ranks are pipes: a process that ends is a pipe whose other end is closed. Nothing waits for the
clock.
"""

from __future__ import annotations

import itertools
import json
import os
import select

import pytest

from minqwen import watch
from minqwen.watch import NEVER, TORCHRUN, Process, Watch, Word


class Exited(Exception):
    pass


class Ready:
    """A poll that has seen torchrun end, and nothing else."""

    def __init__(self, torchrun: int):
        self.torchrun = torchrun

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        return [(self.torchrun, select.POLLIN)]


@pytest.fixture
def ranks(monkeypatch):
    """Rank 0 of four on one node, and what ends each of its peers. Rank 3 has left before."""
    pipes = {r: os.pipe() for r in (TORCHRUN, 1, 2, 3)}
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)

    def leave(status):
        raise Exited(status)

    monkeypatch.setattr(watch.os, "_exit", leave)
    rank = object.__new__(Watch)  # it is no thread, and meets nobody
    vars(rank).update(
        rank=0, size=4, node=0, beat=1.0, timeout=8.0, leaving=False, failing=False, ended=False,
        peers={r: Process(100 + r, "here", 0) for r in (1, 2, 3)},
        pidfds={r: ends[0] for r, ends in pipes.items()},
        poll=Ready(pipes[TORCHRUN][0]), waker=-1, looked=100.0,
        left={3}, lost={}, words={}, heard={}, moved={},
        waiting=False, patient=False, awaited=None, awaited_since=100.0,
        exit_at=NEVER, failed_at=NEVER,
    )  # fmt: skip
    still = {r: ends[1] for r, ends in pipes.items()}
    yield rank, clock, lambda r: os.close(still.pop(r))
    for fd in [*still.values(), *(ends[0] for ends in pipes.values())]:
        os.close(fd)


def test_it_stays_until_the_last_peer_has_ended(ranks, monkeypatch, capfd):
    rank, _, end = ranks
    to_come, asked = [1, 2], []
    really = select.select

    def after_one_has_ended(waiting, *others):
        asked.append(set(waiting))
        end(to_come.pop(0))
        return really(waiting, [], [], 0)

    monkeypatch.setattr(watch.select, "select", after_one_has_ended)
    with pytest.raises(Exited):
        rank.run()
    fds = rank.pidfds
    assert asked == [{fds[1], fds[2]}, {fds[2]}]
    error = capfd.readouterr().err
    assert error.startswith("error: torchrun ") and error.endswith(": all ranks stop\n")
    assert error.count("\n") == 1


def test_a_peer_that_does_not_notice_holds_it_for_two_beats(ranks, monkeypatch):
    rank, clock, end = ranks
    asked = []

    def in_vain(waiting, _, __, seconds):
        asked.append((clock[0] - 100, seconds))
        clock[0] += seconds if len(asked) > 1 else 0.5
        return [], [], []

    monkeypatch.setattr(watch.select, "select", in_vain)
    with pytest.raises(Exited):
        rank.run()
    assert asked == [(0.0, 2.0), (0.5, 1.5)]


def test_a_peer_that_is_lost_or_has_left_is_not_waited_for(ranks, monkeypatch):
    rank, _, end = ranks
    rank.left |= {1, 2}
    monkeypatch.setattr(
        watch.select, "select", lambda *_: pytest.fail("there is nobody to wait for")
    )
    with pytest.raises(Exited):
        rank.run()


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
def waiting(monkeypatch):
    """(the words of rank 1, the rest of rank 0's state) -> the line with which rank 0 ends, or ""
    if it watches until there are no more words. It waits in its second collective, and looks once
    a second; the timeout is 8 s."""

    def watch_until_the_end(words, capfd, **state):
        clock = [100.0]
        monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
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
            asked=itertools.count(), joined=2, joined_all=0, of_all=False, ranks_of_replica=2,
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
