"""Attention over the blocks of a cache gives what attention over whole sequences gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.paged import random_chunks, run_paged
from support.qwen2 import error, oracle, ours, tokens, yarn

from minqwen.model import Batch, attention

LENGTHS = (1, 5, 16, 17, 131)


@pytest.fixture(scope="module")
def dense():
    """Models in float64 and float32, sequences, and of each dense truth and float32's error."""
    with torch.no_grad():
        hf = oracle(num_attention_heads=8, rope_parameters=yarn(4.0, original=64))
        wide, narrow = ours(hf, torch.float64), ours(hf)
        sequences = [tokens(hf, T, seed=T) for T in LENGTHS]
        truths = [wide(ids[None])[0] for ids in sequences]
        errors = [error(narrow(ids[None])[0], truth) for ids, truth in zip(sequences, truths)]
        return wide, narrow, sequences, truths, errors


def check_blocks(dense, block_size, seed, largest_chunk=10**9, stale=None):
    """Over blocks only the order of the sums may differ.

    So there is no difference in float64's first 12 digits, and float32's error is of the size that
    dense attention has itself: both are rounded sums of the same terms.
    """
    wide, narrow, sequences, truths, native_errors = dense

    def run(model):
        chunk = random_chunks(seed, largest_chunk)
        return run_paged(model, sequences, block_size, chunk, seed, shuffled=True, stale=stale)

    for logits, truth in zip(run(wide), truths):
        assert error(logits, truth) < 1e-12
    for logits, truth, native_error in zip(run(narrow), truths, native_errors):
        assert error(logits, truth) < 4 * max(native_error, torch.finfo(torch.float32).eps)


def test_a_prompt_and_then_one_token_at_a_time(dense):
    model, _, sequences, truths, _ = dense
    chunk = lambda i, done: 1 if done else len(sequences[-1]) - 3
    (logits,) = run_paged(model, sequences[-1:], 16, chunk)
    assert error(logits, truths[-1]) < 1e-12


@pytest.mark.parametrize("rows", [10**9, 16, 3, 1], ids=lambda n: f"rows{n}")
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_blocks_change_nothing(dense, block_size, rows, monkeypatch):
    """Decodes, chunks and prompts mixed, several sequences at a time, in any order and blocks."""
    monkeypatch.setattr(attention, "tile_rows", lambda device, scores_per_row: rows)
    check_blocks(dense, block_size, seed=block_size, stale=1e30)


@pytest.mark.parametrize("largest", [1, 3])  # 1: nothing but decodes
def test_small_steps_change_nothing(dense, largest):
    check_blocks(dense, 16, seed=largest, largest_chunk=largest)


def test_what_blocks_held_before_is_never_seen(dense):
    """Not even a NaN that a failed request has left, or that a neighbour in the batch has."""
    check_blocks(dense, 16, seed=0, largest_chunk=1, stale=float("nan"))


def test_sequences_may_share_blocks():
    """What prefix caching does: a second sequence starts after the first one's full blocks."""
    hf = oracle()
    model, first = ours(hf, torch.float64), tokens(hf, 19)
    second = torch.cat([first[:12], tokens(hf, 9, seed=1)])
    cache = model.new_cache(9, 4)

    def step(ids, start, *tables):
        n, B = len(ids) // len(tables), len(tables)
        return model(ids, Batch.paged([n] * B, [start + n] * B, tables, 4), cache)

    mine, theirs = [5, 0, 7, 2, 3], [5, 0, 7, 8, 1, 6]
    assert error(step(first, 0, mine), model(first[None])[0]) < 1e-12
    whole = model(second[None])[0]
    assert error(step(second[12:19], 12, theirs), whole[12:19]) < 1e-12
    next_of_first = tokens(hf, 1, seed=2)
    both = step(torch.cat([next_of_first, second[19:20]]), 19, mine, theirs[:5])
    longer = model(torch.cat([first, next_of_first])[None])[0]
    assert error(both, torch.stack([longer[19], whole[19]])) < 1e-12


def test_only_the_wanted_logits():
    hf = oracle()
    model, ids = ours(hf), tokens(hf, 2, 9)
    wanted = torch.tensor([8, 17, 0])
    logits = model(ids.flatten(), dataclasses.replace(Batch.dense(2, 9), logits_at=wanted))
    assert error(logits, model(ids).flatten(0, 1)[wanted]) < 1e-6


def test_deterministic_mode_changes_nothing(dense):
    """There torch also fills fresh memory with NaN, so nothing that is read was left unwritten."""
    _, model, sequences, _, _ = dense
    chunked = {"block_size": 7, "chunk": lambda i, done: 5}
    whole, paged = model(sequences[-1][None]), run_paged(model, sequences, **chunked)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.equal(model(sequences[-1][None]), whole)
        assert all(map(torch.equal, run_paged(model, sequences, **chunked), paged))
    finally:
        torch.use_deterministic_algorithms(False)
