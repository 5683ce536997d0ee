"""Masks and positions, as transformers' eager attention understands them."""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen.errors import MinqwenError


def visible_tokens(attention_mask: object, ids: Tensor) -> Tensor:
    """[B, T] bool, on the device of ids. Raises MinqwenError for a mask of another shape."""
    found = attention_mask.shape if isinstance(attention_mask, Tensor) else None
    if not isinstance(attention_mask, Tensor) or found != ids.shape:
        raise MinqwenError(
            f"attention_mask is {found or type(attention_mask).__name__}, expected a number for "
            f"each token, {tuple(ids.shape)}: 0 hides it"
        )
    return attention_mask.to(ids.device) != 0


def checked_positions(position_ids: object, ids: Tensor) -> Tensor:
    """[B, T] int64, on the device of ids. Raises MinqwenError for anything else."""
    B, T = ids.shape
    shapes = ((T,), (1, T), (B, T))
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in shapes:
        raise MinqwenError(f"position_ids are no tensor {(B, T)}: give one, or leave them out")
    if position_ids.is_floating_point() or int(position_ids.min()) < 0:
        raise MinqwenError("position_ids hold a number that is no integer >= 0")
    return position_ids.to(ids.device, torch.int64).expand(B, T)


def hidden_keys(attention_mask: Tensor | None, texts: Tensor | None, ids: Tensor) -> Tensor | None:
    """[B, 1, T, T] bool: which keys (columns) a query (row) must not see; None: those after it.

    A mask hides its zeros. Without a mask a token of `texts` [B, T] sees the same text's only.
    """
    T = ids.shape[1]
    if attention_mask is not None:
        seen = visible_tokens(attention_mask, ids)[:, None, None]
    elif texts is not None:
        seen = texts[:, None, :, None] == texts[:, None, None]
    else:
        return None
    causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    return None if seen.all() else ~(seen & causal)


def packed_texts(position_ids: Tensor) -> Tensor:
    """[B, T]: which text of its row a token belongs to, if one begins where positions jump."""
    begins = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(-1)
