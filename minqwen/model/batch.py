"""What a forward pass needs to know about its tokens besides their ids. Made by hand, passed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The tokens of one step: the new tokens of B sequences, packed one after another, without padding.

    Sequence i brings `query_lens[i]` new tokens, the last of its `context_lens[i]` tokens so far. Without a
    cache the two are equal. With one, `slots` says where each token's key and value go and `block_tables`
    which pages hold each sequence's context, in order.
    """

    positions: Tensor  # [T] int64, position of each token in its own sequence
    query_lens: tuple[int, ...]  # B numbers that add up to T
    context_lens: tuple[int, ...]  # B numbers
    slots: Tensor | None = None  # [T] int64, page * page_size + offset
    block_tables: Tensor | None = (
        None  # [B, most pages of a sequence] int64, padded with any valid page
    )
    logits_at: Tensor | None = (
        None  # [N] int64, the tokens whose logits are wanted; None: all of them
    )

    @staticmethod
    def dense(num_sequences: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """B whole sequences of equal length and no cache: the oracle's batch."""
        positions = torch.arange(length, device=device).repeat(num_sequences)
        return Batch(positions, (length,) * num_sequences, (length,) * num_sequences)

    @cached_property
    def runs(self) -> list[Run]:
        """What attends together; every layer asks for it."""
        found = []
        for first, count in runs(self.query_lens, self.context_lens):
            lengths, past = self.context_lens[first : first + count], None
            least, length = min(lengths), max(lengths)
            if least < length:
                ends = torch.tensor(lengths, device=self.positions.device).view(count, 1, 1, 1)
                past = torch.arange(least, length, device=ends.device) >= ends
            tables = self.block_tables[first : first + count]
            found.append(Run(first, count, self.query_lens[first], length, tables, past))
        return found


@dataclass(frozen=True)
class Run:
    """`count` sequences from `first`: decodes (query_len 1), or one sequence that brings more tokens."""

    first: int
    count: int
    query_len: int
    length: int  # longest context
    block_tables: Tensor  # [count, pages]
    past: (
        Tensor | None
    )  # [count, 1, 1, n] bool, which of the last n positions lie beyond a context; None: none


def runs(query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, count) of what attends together: decodes next to each other, as long as their contexts, padded to the
    longest, take at most 2^13 tokens or twice what they have; everything else alone."""
    first = 0
    while first < len(query_lens):
        end, most, total = first, 0, 0
        while end < len(query_lens) and query_lens[end] == 1:
            most, total = max(most, context_lens[end]), total + context_lens[end]
            if end > first and most * (end + 1 - first) > max(1 << 13, 2 * total):
                break
            end += 1
        end = max(end, first + 1)
        yield first, end - first
        first = end
