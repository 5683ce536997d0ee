"""What a forward pass refuses, in one line each, before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor

from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.model.batch import Batch

NO_PADDING = (
    "there is no padding here: run every sequence alone, or give a list of all to run_with_cache "
    "or LLM.generate, which pack sequences of any lengths"
)


def check_ids(ids: object, config: ModelConfig) -> None:
    """Raise MinqwenError unless ids are integers of the vocabulary, [B, T] and not empty."""
    if not isinstance(ids, Tensor):
        found = " ".join(repr(ids).split())[:60]
        raise MinqwenError(f"ids are {found}, expected a tensor [B, T]; {_remedy(ids)}")
    if ids.dim() != 2 or not ids.numel():
        raise MinqwenError(
            f"ids have shape {tuple(ids.shape)}, expected [B, T] and at least one token "
            "(or a Batch, and then packed tokens)"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise MinqwenError(f"ids are {ids.dtype}, expected torch.int64: call ids.long()")
    if ids.is_meta:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise MinqwenError(
            f"ids have the token {wrong}, expected 0 to {config.vocab_size - 1}: "
            "was the text encoded with the tokenizer of another model?"
        )


def _remedy(ids: object) -> str:
    """What to do with ids that are no tensor."""
    if isinstance(ids, str):
        return "give torch.tensor([tokenizer.encode(text)]), or the text to LLM.generate"
    lengths = {len(row) for row in ids if isinstance(row, list)} if isinstance(ids, list) else set()
    if len(lengths) > 1:
        return f"the sequences have unequal lengths, and {NO_PADDING}"
    return "give torch.tensor([ids]) for one sequence"


def check_mask(attention_mask: Tensor | None) -> None:
    """Raise MinqwenError for a mask that hides something."""
    if attention_mask is not None and not bool(attention_mask.all()):
        hidden = int((attention_mask == 0).sum())
        of = attention_mask.numel()
        raise MinqwenError(f"attention_mask hides {hidden} of {of} tokens, but {NO_PADDING}")


def check_batch(ids: Tensor, batch: Batch, has_cache: bool) -> None:
    """Raise MinqwenError if the batch is of other ids, or needs a cache that is not there."""
    if len(ids) != len(batch.positions):
        raise MinqwenError(
            f"ids are {len(ids)} tokens, but the batch describes {len(batch.positions)}"
        )
    if not has_cache and batch.query_lens != batch.context_lens:
        raise MinqwenError("the batch continues sequences: give the cache with what came before")
    if not has_cache and len(set(batch.query_lens)) > 1:
        raise MinqwenError(
            f"the batch has sequences of {min(batch.query_lens)} to {max(batch.query_lens)} "
            f"tokens and no cache, but {NO_PADDING}; or give a cache"
        )


def context_warning(length: int, config: ModelConfig) -> str:
    """What to say of more tokens than the model was made for."""
    return (
        f"{length} tokens are more than the {config.context_length} that this model was made for: "
        "expect worse predictions beyond them"
    )
