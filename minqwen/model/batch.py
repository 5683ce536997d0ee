"""What a forward pass needs to know about its tokens besides their ids. Made by hand, passed by hand."""
from __future__ import annotations

from dataclasses import dataclass

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
    block_tables: Tensor | None = None  # [B, most pages of a sequence] int64, padded with any valid page
    logits_at: Tensor | None = None  # [N] int64, the tokens whose logits are wanted; None: all of them

    @staticmethod
    def dense(num_sequences: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """B whole sequences of equal length and no cache: the oracle's batch."""
        positions = torch.arange(length, device=device).repeat(num_sequences)
        return Batch(positions, (length,) * num_sequences, (length,) * num_sequences)
