"""Causal attention with grouped key/value heads (GQA, arXiv:2305.13245): dense, and over a cache.

Query head h reads key/value head h // G. The dense form is the definition; the paged form computes
the same from the blocks of a cache, and tests/model/test_attention.py holds that they agree. What
both do with one group of rows is the arithmetic's: `attend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.model.batch import Batch, Span
from minqwen.model.kv_cache import KVCache
from minqwen.model.trace import Tap

# `Native.attend` or another arithmetic's: q, k, v, hidden, scale, tap -> z.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, Tap], Tensor]


def tile_rows(device: torch.device, scores_per_row: int) -> int:
    """How many query tokens attend at a time, if so many scores are held of each of them.

    Memory then grows with the context and not with its square, and on a CPU the passes over a tile
    find it in the second-level cache.
    """
    scores = 1 << 18 if device.type == "cpu" else 1 << 26
    return max(16, scores // scores_per_row)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[length, length] bool, True where a key (column) comes after a query (row)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def weighted_values(
    product: Callable[[Tensor, Tensor], Tensor], pattern: Tensor, v: Tensor, hidden: Tensor | None
) -> Tensor:
    """pattern v, but what a row must not see does not reach it, not even NaN or infinity.

    The pattern is 0 for a hidden key, and 0 times NaN is NaN. pattern [N, heads, R, L];
    v [N, heads, L, d] -> [N, heads, R, d]. hidden: as `Native.attend` has it. product: the
    arithmetic's matrix product. Where all is finite, this is product(pattern, v) in every bit.
    """
    z = product(pattern, v)
    if hidden is None or hidden.shape[-2] == 1 or z.is_meta or is_finite(z):
        return z  # where all rows share what is hidden, `_decode` has put zeros there
    older = pattern.shape[-1] - hidden.shape[-1]
    seen = ~F.pad(hidden, (older, 0)) | (pattern != 0)  # a hook may have changed the pattern
    finite = v.isfinite()
    meets = product(seen.to(v.dtype), (~finite).to(v.dtype)) > 0
    return z.where(meets | z.isfinite(), product(pattern, v.where(finite, 0.0)))


def is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity.

    Its sum has one if x has; a sum that overflows is a false alarm, which only costs time.
    """
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())


def dense_attention(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, tap: Tap
) -> Tensor:
    """Every sequence whole, all of equal length. q [T, H, d]; k, v [T, K, d] -> [T, H, d]."""
    B, L, G = len(batch.query_lens), batch.query_lens[0], q.shape[1] // k.shape[1]
    q, k, v = (x.unflatten(0, (B, L)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    # A copy, as transformers' cache hands them on. `contiguous` may leave any stride to a dimension
    # of size 1, and strides decide which kernel multiplies.
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    if G > 1:
        # Key/value head j serves query heads j G .. j G + G - 1. It is expanded and not
        # repeat_interleave'd, because the strides of transformers' keys decide which kernel
        # multiplies them, and so the last bits of the scores.
        k, v = (x.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))
    hidden = causal_mask(L, q.device) if L > 1 else None
    z = attend(q, k, v, hidden, scale, tap)
    return z.transpose(1, 2).flatten(0, 1)


def paged_attention(
    attend: Attend,
    q: Tensor,
    batch: Batch,
    scale: float,
    tap: Tap,
    cache: KVCache,
    layer: int,
    scores_held: int,
) -> Tensor:
    """New tokens against their whole context in the cache. q [T, H, d] -> [T, H, d].

    scores_held: how many scores `attend` holds for each pair of a query token and a key.

    The G query heads of a group become rows against one key/value head, so nothing is repeated.
    Sequences that bring one token go together; one that brings more goes alone.
    """
    parts: list[Tensor] = []  # [n, H, d] each
    start = 0
    for span in batch.spans:
        k, v = cache.read(layer, span.block_tables, span.length)  # [count, K, L, d] each
        tokens = q[start : start + span.count * span.query_len]
        start += len(tokens)
        if span.query_len == 1:
            parts.append(_decode(attend, tokens, k, v, span, scale, tap))
        else:
            tile = span.query_len
            if tap.tiles:
                tile = min(tile, tile_rows(q.device, scores_held * span.length))
            parts += _prefill(attend, tokens, k, v, span, scale, tap, tile)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, tap: Tap
) -> Tensor:
    """One token of each sequence. q [count, H, d]; k, v [count, K, L, d] -> [count, H, d]."""
    if span.past is not None:
        # What lies beyond a context may be anything, even NaN, and 0 times NaN is NaN. `v` is a
        # copy that may be written to.
        v[..., -span.past.shape[-1] :, :].masked_fill_(span.past.transpose(-1, -2), 0)
    rows = q.view(span.count, k.shape[1], -1, q.shape[-1])  # [count, K, G, d]
    z = attend(rows, k, v, span.past, scale, tap.paged(span.first, span.count, 0))
    return z.view(q.shape)


def _prefill(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, tap: Tap, tile: int
) -> list[Tensor]:
    """Several tokens of one sequence, `tile` of them at a time. q [R, H, d] -> [n, H, d] each."""
    (R, H, d), K, L = q.shape, k.shape[1], span.length
    future = causal_mask(tile, q.device).repeat(H // K, 1, 1)  # [G, tile, tile]
    parts = []
    for r in range(0, R, tile):
        n = min(tile, R - r)
        # The tile's last token sees so many keys; the one before it does not see the last of them.
        seen = L - R + r + n
        hidden = future[:, :n, :n].flatten(0, 1)  # [G n, n]
        rows = q[r : r + n].view(n, K, H // K, d).permute(1, 2, 0, 3)  # [K, G, n, d]
        z = attend(
            rows.reshape(1, K, -1, d),
            k[..., :seen, :],
            v[..., :seen, :],
            hidden,
            scale,
            tap.paged(span.first, 1, r),
        )
        parts.append(z.view(rows.shape).permute(2, 0, 1, 3).reshape(n, H, d))
    return parts
