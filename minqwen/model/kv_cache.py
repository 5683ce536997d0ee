"""Where keys and values are kept: blocks of tokens, written and read through block tables."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One rank's keys and values in pages: `pool[layer, 0]` keys, `pool[layer, 1]` values, [P, S, K, d] each."""

    def __init__(
        self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype, device
    ):
        self.pool = torch.zeros(
            layers, 2, pages, page_size, kv_heads, head_dim, dtype=dtype, device=device
        )
        self.page_size = page_size
        self.rows = self.pool.view(
            layers, 2 * pages, -1
        )  # the same, [2 P, S K d]: whole rows are copied fastest
        self.halves = torch.tensor([[0], [pages]], device=device)  # where keys begin, and values
        self.gathered = self.pool.new_empty(
            0
        )  # what `read` fills, kept: a fresh page of memory costs more than a copy

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, K, d] at `slots` [T]."""
        keys, values = self.pool[layer].flatten(1, 2)  # [P * S, K, d] each
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def read(self, layer: int, block_tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of B lists of pages [B, n or more]: two [B, K, length, d], copies that
        may be written to and that the next call overwrites."""
        pages = block_tables[:, : -(-length // self.page_size)].flatten()
        page = self.pool.shape[3:]  # [S, K, d]
        size = 2 * len(pages) * page.numel()
        if self.gathered.numel() < size:
            del self.gathered  # before there is another
            self.gathered = self.pool.new_empty(size)
        rows = (pages + self.halves).flatten()
        torch.index_select(self.rows[layer], 0, rows, out=self.gathered[:size].view(len(rows), -1))
        both = self.gathered[:size].view(
            2, len(block_tables), -1, *page[1:]
        )  # [2, B, tokens, K, d]
        return both[:, :, :length].transpose(2, 3).unbind(0)
