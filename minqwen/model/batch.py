"""What a forward pass must know of its tokens besides their ids. Made by hand, passed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

MIN_PADDED_TOKENS = 1 << 13  # so many tokens of context may always be padded together, see `spans`


@dataclass(frozen=True)
class Batch:
    """The tokens of one step: the new tokens of B sequences, packed one after another.

    Sequence i brings `query_lens[i]` new tokens, the last ones of its `context_lens[i]` tokens so
    far. Without a cache the two numbers are equal. With one, `slots` says where each token's key
    and value go, and `block_tables` which blocks hold each sequence's context, in order. `dense`
    and `paged` make batches.
    """

    positions: Tensor  # [T] int64, the position of each token in its own sequence
    query_lens: tuple[int, ...]  # B numbers that add up to T
    context_lens: tuple[int, ...]  # B numbers
    query_starts: Tensor  # [B + 1] int64, on the device: where each sequence's new tokens begin
    context_lengths: Tensor  # [B] int64, on the device: `context_lens` for kernels that read it
    slots: Tensor  # [T] int64, block * block_size + offset; [0] without a cache
    block_tables: Tensor  # [B, most blocks of a sequence] int64, padded with any valid block
    logits_at: Tensor | None = None  # [N] int64, the tokens whose logits are wanted; None: all
    # Where the lengths are known on the device only: none is shorter than this, and `context_lens`
    # says how long they may be.
    shortest_context: int | None = None

    @staticmethod
    def dense(num_sequences: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """`num_sequences` whole sequences of `length` tokens each, and no cache."""
        lens = (length,) * num_sequences
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return Batch(
            positions=torch.arange(length, device=device).repeat(num_sequences),
            query_lens=lens,
            context_lens=lens,
            query_starts=torch.arange(num_sequences + 1, device=device) * length,
            context_lengths=torch.full((num_sequences,), length, device=device),
            slots=nothing,
            block_tables=nothing.view(0, 0),
        )

    @staticmethod
    def paged(
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_size: int,
        *,
        num_logits: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """New tokens of sequences whose keys and values lie in `blocks` of `block_size` tokens.

        blocks[i]: the numbers of the blocks of sequence i, in order, enough for its context.
        num_logits[i]: of how many of its new tokens, the last ones, the logits are wanted; None:
        of all tokens of all sequences.
        """
        positions: list[int] = []
        slots: list[int] = []
        for count, end, own in zip(query_lens, context_lens, blocks):
            new = range(end - count, end)
            positions += new
            slots += [own[i // block_size] * block_size + i % block_size for i in new]
        ends = list(accumulate(query_lens))
        width = max(len(own) for own in blocks)
        tables = [[*own, *[0] * (width - len(own))] for own in blocks]

        def put(numbers: Sequence[object]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

        logits_at = None
        if num_logits is not None:
            logits_at = put([i for end, n in zip(ends, num_logits) for i in range(end - n, end)])
        return Batch(
            positions=put(positions),
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            query_starts=put([0, *ends]),
            context_lengths=put(context_lens),
            slots=put(slots),
            block_tables=put(tables),
            logits_at=logits_at,
        )

    @cached_property
    def spans(self) -> list[Span]:
        """The sequences that attend together; every layer asks for them."""
        return [self._span(*ends) for ends in spans(self.query_lens, self.context_lens)]

    def _span(self, first: int, count: int) -> Span:
        lengths = self.context_lens[first : first + count]
        shortest, longest = self.shortest_context or min(lengths), max(lengths)
        past = None
        if shortest < longest:
            ends = self.context_lengths[first : first + count].view(count, 1, 1, 1)
            past = torch.arange(shortest, longest, device=ends.device) >= ends
        tables = self.block_tables[first : first + count]
        return Span(first, count, self.query_lens[first], longest, tables, past)


@dataclass(frozen=True)
class Span:
    """`count` sequences from `first`: several with one new token, or one with more of them."""

    first: int
    count: int
    query_len: int
    length: int  # the longest context
    block_tables: Tensor  # [count, blocks]
    # [count, 1, 1, n] bool: which of the last n positions lie beyond a context; None: none of them
    past: Tensor | None


def spans(query_lens: Sequence[int], context_lens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the sequences that attend together.

    Neighbours with one new token go together as long as their contexts, padded to the longest one,
    take at most MIN_PADDED_TOKENS tokens or twice what they have. All others go alone.
    """
    first = 0
    while first < len(query_lens):
        count = 1
        if query_lens[first] == 1:
            count = _padded_together(query_lens[first:], context_lens[first:])
        yield first, count
        first += count


def _padded_together(query_lens: Sequence[int], context_lens: Sequence[int]) -> int:
    """How many sequences from the first one attend together; the first has one new token."""
    longest = total = 0
    for count, (new, context) in enumerate(zip(query_lens, context_lens)):
        longest, total = max(longest, context), total + context
        padded = longest * (count + 1)
        if new != 1 or (count and padded > max(MIN_PADDED_TOKENS, 2 * total)):
            return count
    return len(query_lens)
