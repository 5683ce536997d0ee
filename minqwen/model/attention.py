"""Causal attention with grouped key/value heads (GQA, arXiv:2305.13245): dense, the oracle, and over pages.

Query head h reads key/value head h // G. Both functions have one signature and agree (tests/test_model.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minqwen.model.batch import Batch
from minqwen.model.kv_cache import KVCache


def tile_rows(device: torch.device, scores_per_row: int) -> int:
    """How many query tokens attend at a time, if each has so many scores: memory grows with the context, not its
    square, and on a CPU the passes over a tile find it in the second-level cache."""
    return max(16, (1 << 18 if device.type == "cpu" else 1 << 26) // scores_per_row)


def dense_attention(
    ops, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Callable
) -> Tensor:
    """Every sequence whole, of equal length: the definition. q [T, H, d]; k, v [T, K, d] -> [T, H, d]."""
    B, L, G = len(batch.query_lens), batch.query_lens[0], q.shape[1] // k.shape[1]
    k, v = ops.cached(k, v)  # what a cache would hold
    q, k, v = (x.unflatten(0, (B, L)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    k, v = k.contiguous(), v.contiguous()  # as transformers' cache hands them on
    if (
        G > 1
    ):  # key/value head j serves query heads j G .. j G + G - 1; expanded, not repeat_interleave'd, because
        # the strides of transformers' keys decide which kernel multiplies them, and so their last bits
        k, v = (x.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))
    hidden = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1) if L > 1 else None
    z = ops.attend(q, k, v, hidden, scale, tap)
    return z.transpose(1, 2).flatten(0, 1)


def paged_attention(
    ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    scale: float,
    tap: Callable,
    cache: KVCache,
    layer: int,
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
            if (
                run.past is not None
            ):  # 0 * NaN is NaN, and what lies there may be anything; `read` gave a copy
                vs[..., -run.past.shape[-1] :, :].masked_fill_(run.past.transpose(-1, -2), 0)
            z = ops.attend(
                q[start : start + count].view(count, K, H // K, d),
                ks,
                vs,
                run.past,
                scale,
                tap.paged(run.first, count, 0),
            )
            parts.append(z.view(count, H, d))
        else:
            tile = min(R, tile_rows(q.device, H * L)) if tap.tiles else R
            future = (
                torch.ones(tile, tile, dtype=torch.bool, device=q.device)
                .triu(1)
                .repeat(H // K, 1, 1)
            )
            for r in range(0, R, tile):
                n = min(tile, R - r)
                seen = (
                    L - R + r + n
                )  # by the tile's last token; the one before does not see the last of these, ...
                hidden = future[:, :n, :n].flatten(0, 1)  # [G n, n]
                part = (
                    q[start + r : start + r + n].view(n, K, H // K, d).permute(1, 2, 0, 3)
                )  # [K, G, n, d]
                z = ops.attend(
                    part.reshape(1, K, -1, d),
                    ks[..., :seen, :],
                    vs[..., :seen, :],
                    hidden,
                    scale,
                    tap.paged(run.first, 1, r),
                )
                parts.append(z.view(part.shape).permute(2, 0, 1, 3).reshape(n, H, d))
        start += count * R
    return parts[0] if len(parts) == 1 else torch.cat(parts)
