"""Mistakes outside the model: in what is reported of its logits, and in the tokens it is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minqwen.lab.faults.fault import Messages
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.warp import warp
from minqwen.tokenizer import Tokenizer

# Qwen2.5's own sampling, as its generation_config.json has it.
TEMPERATURE, TOP_K, TOP_P, PENALTY = 0.7, 20, 0.8, 1.05
PADDED_TO = 64  # rows that vLLM's head is padded to a multiple of
SYSTEM_OF_QWEN2 = "You are a helpful assistant."


def of_temperature(logits: Tensor, ids: Tensor) -> Tensor:
    return (logits / TEMPERATURE).log_softmax(-1)


def of_top_k(logits: Tensor, ids: Tensor) -> Tensor:
    return warped(logits, SamplingParams(temperature=1.0, top_k=TOP_K))


def of_top_p(logits: Tensor, ids: Tensor) -> Tensor:
    return warped(logits, SamplingParams(temperature=1.0, top_p=TOP_P))


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log probabilities after the sampler has dropped tokens: -inf for those."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.stack([warp(row, params) for row in wide]).log_softmax(-1)


def of_penalty(logits: Tensor, ids: Tensor) -> Tensor:
    """After the repetition penalty (arXiv:1909.05858) on all tokens so far."""
    seen = F.one_hot(ids, logits.shape[-1]).cumsum(0) > 0  # [T, V]
    penalised = torch.where(logits < 0, logits * PENALTY, logits / PENALTY)
    return torch.where(seen, penalised, logits).log_softmax(-1)


def with_padded_rows(logits: Tensor, ids: Tensor) -> Tensor:
    """The head's rows of zeros that only fill it up take part in the softmax."""
    rows = logits.shape[-1]
    padding = -rows % PADDED_TO or PADDED_TO
    return F.pad(logits, (0, padding)).log_softmax(-1)[..., :rows]


# ---- tokens -------------------------------------------------------------------------------------


def with_other_system_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    others = [message for message in messages if message["role"] != "system"]
    return tokenizer.encode_chat(others, system=SYSTEM_OF_QWEN2)


def without_generation_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    return tokenizer.encode_chat(messages, add_generation_prompt=False)


def with_two_beginnings(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    ids = tokenizer.encode_chat(messages)
    return ids[:1] + ids


def with_markers_as_text(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    prompt = tokenizer.apply_chat_template(messages)
    return tokenizer.encode(prompt, allow_special=False, add_special_tokens=False)
