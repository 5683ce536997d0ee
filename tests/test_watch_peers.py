"""Torchrun is gone: the rank that says so stays until its neighbours have noticed it too.

The ranks are pipes: a process that ends is a pipe whose other end is closed. Nothing waits for the
clock.
"""

from __future__ import annotations

import os
import select

import pytest

from minqwen import watch
from minqwen.watch import NEVER, TORCHRUN, Process, Watch


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
