"""What the ranks of one machine leave behind for each other."""

from __future__ import annotations

import os

import pytest

from minqwen.board import Board


@pytest.fixture
def board():
    made = Board()
    yield made
    os.close(made.fd)


def in_a_process_that_ends(board: Board, deed) -> int:
    """`deed` of a board that another process shares, in that process: its status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            own = Board()
            own.share(os.getppid(), board.fd)
            status = int(deed(own))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_process_has_pinned_stays_when_it_has_ended(board):
    assert board.lines() == []
    assert in_a_process_that_ends(board, lambda own: own.pin("rank 3 ends") or 7) == 7
    board.pin("rank 2 ends")
    assert board.lines() == ["rank 3 ends", "rank 2 ends"]
    assert in_a_process_that_ends(board, lambda own: own.lines() == board.lines()) == 1


def test_of_all_processes_one_is_first_and_stays_it(board):
    assert not board.is_claimed()
    assert board.claim() and board.is_claimed()
    assert in_a_process_that_ends(board, lambda own: own.claim()) == 0
    assert board.claim()


def test_a_claim_of_a_process_that_has_ended_stands(board):
    assert in_a_process_that_ends(board, lambda own: own.claim()) == 1
    assert board.is_claimed() and not board.claim()


def test_without_a_board_to_share_a_process_has_its_own(board):
    board.share(2**22 + 1, 3)  # no process has this number
    assert board.claim() and board.is_claimed()


def test_where_there_is_no_memory_with_a_name_it_is_a_file_without_one(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    board = Board()
    assert in_a_process_that_ends(board, lambda own: own.claim()) == 1
    assert not board.claim()
    os.close(board.fd)
