"""Causal attention with grouped key/value heads (GQA, arXiv:2305.13245): dense, the oracle, and over pages.

Query head h reads key/value head h // G. Both functions have one signature and agree (tests/test_model.py).
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from minqwen.model.batch import Batch


def tile_rows(device: torch.device, scores_per_row: int) -> int:
    """How many query tokens attend at a time, if each has so many scores: memory grows with the context, not its
    square, and on a CPU the passes over a tile find it in the second-level cache."""
    return max(16, (1 << 18 if device.type == "cpu" else 1 << 26) // scores_per_row)


class KVCache:
    """One rank's keys and values in pages: `pool[layer, 0]` keys, `pool[layer, 1]` values, [P, S, K, d] each."""

    def __init__(self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype, device):
        self.pool = torch.zeros(layers, 2, pages, page_size, kv_heads, head_dim, dtype=dtype, device=device)
        self.page_size = page_size
        self.rows = self.pool.view(layers, 2 * pages, -1)  # the same, [2 P, S K d]: whole rows are copied fastest
        self.halves = torch.tensor([[0], [pages]], device=device)  # where keys begin, and values
        self.gathered = self.pool.new_empty(0)  # what `read` fills, kept: a fresh page of memory costs more than a copy

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
        both = self.gathered[:size].view(2, len(block_tables), -1, *page[1:])  # [2, B, tokens, K, d]
        return both[:, :, :length].transpose(2, 3).unbind(0)


def dense_attention(ops, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Callable) -> Tensor:
    """Every sequence whole, of equal length: the definition. q [T, H, d]; k, v [T, K, d] -> [T, H, d]."""
    B, L, G = len(batch.query_lens), batch.query_lens[0], q.shape[1] // k.shape[1]
    k, v = ops.cached(k, v)  # what a cache would hold
    q, k, v = (x.unflatten(0, (B, L)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    k, v = k.contiguous(), v.contiguous()  # as transformers' cache hands them on
    if G > 1:  # key/value head j serves query heads j G .. j G + G - 1; expanded, not repeat_interleave'd, because
        # the strides of transformers' keys decide which kernel multiplies them, and so their last bits
        k, v = (x.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))
    hidden = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1) if L > 1 else None
    z = ops.attend(q, k, v, hidden, scale, tap)
    return z.transpose(1, 2).flatten(0, 1)


def paged_attention(
    ops, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Callable, cache: KVCache, layer: int
) -> Tensor:
    """New tokens against their whole context in the cache. q [T, H, d]; k, v [T, K, d] -> [T, H, d].

    The G query heads of a group are rows against one key/value head: nothing is repeated. Decodes go together,
    what brings more tokens goes alone, some tokens at a time.
    """
    cache.write(layer, batch.slots, *ops.cached(k, v))
    H, K, d = q.shape[1], *k.shape[1:]
    parts, start = [], 0  # [n, H, d] each
    for run in batch.runs:
        R, L, count = run.query_len, run.length, run.count
        ks, vs = cache.read(layer, run.block_tables, L)
        if R == 1:
            if run.past is not None:  # 0 * NaN is NaN, and what lies there may be anything; `read` gave a copy
                vs[..., -run.past.shape[-1] :, :].masked_fill_(run.past.transpose(-1, -2), 0)
            z = ops.attend(q[start : start + count].view(count, K, H // K, d), ks, vs, run.past, scale,
                           tap.paged(run.first, count, 0))
            parts.append(z.view(count, H, d))
        else:
            tile = min(R, tile_rows(q.device, H * L)) if tap.tiles else R
            future = torch.ones(tile, tile, dtype=torch.bool, device=q.device).triu(1).repeat(H // K, 1, 1)
            for r in range(0, R, tile):
                n = min(tile, R - r)
                seen = L - R + r + n  # by the tile's last token; the one before does not see the last of these, ...
                hidden = future[:, :n, :n].flatten(0, 1)  # [G n, n]
                part = q[start + r : start + r + n].view(n, K, H // K, d).permute(1, 2, 0, 3)  # [K, G, n, d]
                z = ops.attend(part.reshape(1, K, -1, d), ks[..., :seen, :], vs[..., :seen, :], hidden, scale,
                               tap.paged(run.first, 1, r))
                parts.append(z.view(part.shape).permute(2, 0, 1, 3).reshape(n, H, d))
        start += count * R
    return parts[0] if len(parts) == 1 else torch.cat(parts)
