"""Batch: how the tokens of a step are packed, by hand; and which of them attend together."""

from __future__ import annotations

import pytest
import torch

from minqwen import Batch
from minqwen.model.batch import MIN_PADDED_TOKENS, spans


def test_a_paged_batch_by_hand():
    """Blocks of 4 tokens: the end of a prompt of 6, one token after 9, and a whole prompt of 3."""
    batch = Batch.paged(
        query_lens=[2, 1, 3],
        context_lens=[6, 10, 3],
        blocks=[[5, 2], [0, 7, 3], [9]],
        block_size=4,
        num_logits=[1, 1, 2],
    )
    assert batch.positions.tolist() == [4, 5, 9, 0, 1, 2]
    assert batch.slots.tolist() == [2 * 4 + 0, 2 * 4 + 1, 3 * 4 + 1, 36, 37, 38]
    assert batch.block_tables.tolist() == [[5, 2, 0], [0, 7, 3], [9, 0, 0]]
    assert batch.query_starts.tolist() == [0, 2, 3, 6]
    assert batch.context_lengths.tolist() == [6, 10, 3]
    assert batch.logits_at.tolist() == [1, 2, 4, 5]
    assert (batch.query_lens, batch.context_lens) == ((2, 1, 3), (6, 10, 3))
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6 and {x.dtype for x in tensors} == {torch.int64}


def test_logits_of_all_tokens_unless_some_are_wanted():
    assert Batch.paged([2], [2], [[0]], 4).logits_at is None
    assert Batch.paged([2, 1], [2, 1], [[0], [1]], 4, num_logits=[0, 1]).logits_at.tolist() == [2]


def test_blocks_beyond_the_context_are_kept_in_the_table():
    batch = Batch.paged([1], [3], [[4, 6]], 4)
    assert batch.block_tables.tolist() == [[4, 6]] and batch.slots.tolist() == [4 * 4 + 2]


def test_a_dense_batch_has_whole_sequences_and_no_cache():
    batch = Batch.dense(2, 3)
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.query_lens == batch.context_lens == (3, 3)
    assert batch.query_starts.tolist() == [0, 3, 6] and batch.context_lengths.tolist() == [3, 3]
    assert batch.slots.numel() == batch.block_tables.numel() == 0 and batch.logits_at is None


# ---- spans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query_lens, context_lens, expected",
    [
        ([], [], []),
        ([1], [5], [(0, 1)]),
        ([7], [7], [(0, 1)]),
        ([1, 1, 1], [5, 9, 2], [(0, 3)]),  # neighbours with one token go together,
        ([3, 1, 1, 2, 2, 1], [3, 5, 5, 2, 8, 1], [(0, 1), (1, 2), (3, 1), (4, 1), (5, 1)]),
    ],
)
def test_neighbours_with_one_token_attend_together(query_lens, context_lens, expected):
    assert list(spans(query_lens, context_lens)) == expected


def test_short_contexts_may_be_padded_up_to_a_bound():
    """Padded to the longest: as many as fit in MIN_PADDED_TOKENS."""
    longest = MIN_PADDED_TOKENS // 4
    assert list(spans([1] * 6, [longest, 1, 1, 1, 1, 1])) == [(0, 4), (4, 2)]
    assert list(spans([1] * 3, [longest + 1, longest + 1, 1])) == [(0, 3)]
    assert list(spans([1] * 4, [longest + 1, 1, 1, 1])) == [(0, 3), (3, 1)]


def test_long_contexts_may_be_padded_to_twice_what_they_have():
    long = MIN_PADDED_TOKENS
    half = long // 2
    assert list(spans([1, 1, 1], [long, long, long])) == [(0, 3)]
    assert list(spans([1, 1], [long, 1])) == [(0, 2)], "2 long <= 2 (long + 1)"
    assert list(spans([1, 1, 1], [long, half, 1])) == [(0, 3)], "3 long <= 2 (1.5 long + 1)"
    assert list(spans([1, 1, 1], [long, half - 1, 0])) == [(0, 2), (2, 1)]
    assert list(spans([1, 1, 1], [1, 1, long])) == [(0, 2), (2, 1)], "3 long > 2 (long + 2)"


def test_a_batchs_spans_say_what_lies_beyond_a_context():
    batch = Batch.paged(
        query_lens=[1, 1, 3],
        context_lens=[6, 3, 3],
        blocks=[[5, 2], [0], [9]],
        block_size=4,
    )
    together, alone = batch.spans
    assert (together.first, together.count, together.query_len, together.length) == (0, 2, 1, 6)
    assert together.block_tables.tolist() == [[5, 2], [0, 0]]
    assert together.past.shape == (2, 1, 1, 3)  # of the last three of six positions
    assert together.past.flatten(1).tolist() == [[False] * 3, [True] * 3]
    assert (alone.first, alone.count, alone.query_len, alone.length) == (2, 1, 3, 3)
    assert alone.block_tables.tolist() == [[9, 0]] and alone.past is None


def test_contexts_of_one_length_need_no_mask():
    (span,) = Batch.paged([1, 1], [4, 4], [[0], [1]], 4).spans
    assert span.count == 2 and span.past is None
