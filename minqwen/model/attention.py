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

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, K, d] at `slots` [T]."""
        flat = self.pool[layer].flatten(1, 2)  # [2, P * S, K, d]
        flat[0].index_copy_(0, slots, k)
        flat[1].index_copy_(0, slots, v)

    def read(self, layer: int, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of B page lists [B, n]: two [B, K, length, d] views."""
        B, n = pages.shape
        both = [self.pool[layer, i].index_select(0, pages.flatten()) for i in (0, 1)]  # [B * n, S, K, d]
        k, v = (x.view(B, n * self.page_size, *x.shape[2:])[:, :length].transpose(1, 2) for x in both)
        return k, v


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

    The G query heads of a group are rows against one key/value head: nothing is repeated. Sequences that bring
    as many tokens as their neighbours go together (all decodes in one call), the rest one by one.
    """
    cache.write(layer, batch.slots, *ops.cached(k, v))
    T, H, d = q.shape
    K = k.shape[1]
    z = torch.empty_like(q)
    start = 0
    for first, count in runs(batch.query_lens):
        R = batch.query_lens[first]
        lengths = batch.context_lens[first : first + count]
        L = max(lengths)
        pages = batch.block_tables[first : first + count, : -(-L // cache.page_size)]
        ks, vs = cache.read(layer, pages, L)  # [count, K, L, d]
        rows = slice(start, start + count * R)
        groups = q[rows].view(count, R, K, H // K, d).permute(0, 2, 3, 1, 4)  # [count, K, G, R, d]
        past = None
        if min(lengths) < L:  # decodes of unequal contexts, R = 1
            past = torch.arange(L, device=q.device) > batch.positions[rows].view(count, 1, 1, 1)  # [count, 1, 1, L]
            vs = vs.masked_fill(past.transpose(-1, -2), 0)  # 0 * NaN is NaN: what lies there is none of its business
        tile = min(R, tile_rows(q.device, count * H * L)) if tap.tiles else R
        out = z[rows].view(count, R, K, H // K, d).permute(0, 2, 3, 1, 4)
        for r in range(0, R, tile):
            part = groups[:, :, :, r : r + tile]  # [count, K, G, tile, d]
            n = part.shape[3]
            seen = L - R + r + n  # by the last row of the tile; the one before does not see the last of these, ...
            hidden = past if n == 1 else torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1).repeat(H // K, 1)
            z_part = ops.attend(part.flatten(2, 3), ks[..., :seen, :], vs[..., :seen, :], hidden, scale,
                                tap.paged(first, count, r))
            out[:, :, :, r : r + tile] = z_part.view(part.shape)
        start = rows.stop
    return z


def runs(query_lens: tuple[int, ...]):
    """(first, count) of maximal runs of equal numbers, only decodes (1) in runs longer than one.

    Prompts of equal length would fit together too, but their contexts differ more than they gain.
    """
    i = 0
    while i < len(query_lens):
        j = i + 1
        while query_lens[i] == 1 and j < len(query_lens) and query_lens[j] == 1:
            j += 1
        yield i, j - i
        i = j
