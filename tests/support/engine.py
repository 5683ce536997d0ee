"""Prompts for the engine, and what its tests ask of it again and again."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from minqwen import LLM, Tokenizer
from minqwen.engine.outputs import CompletionOutput, Delta, RequestOutput

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
PROMPTS = [
    "In the beginning",
    "And it came to pass, that",
    "The LORD is my shepherd; I shall not want. He maketh me",
]


def ragged(
    tokenizer: Tokenizer, lengths: Iterable[int], each: int, seed: int = 0
) -> list[list[int]]:
    """`each` prompts of every length, half of them text, half random tokens."""
    r, text = random.Random(seed), tokenizer.encode(" ".join(PROMPTS) * 4)
    prompts = []
    for length in lengths:
        starts = [r.randrange(len(text) - length) for _ in range(each)]
        for i, at in enumerate(starts):
            own = text[at : at + length]
            prompts.append(own if i % 2 else [r.randrange(2000) for _ in range(length)])
    return prompts


def all_logprobs(completion: CompletionOutput) -> list[list[float]]:
    """The logprobs of a completion that asked for those of the whole vocabulary: [tokens, V]."""
    assert completion.logprobs is not None
    return [[entry[i].logprob for i in range(len(entry))] for entry in completion.logprobs]


def outputs_of(deltas: Iterable[Delta]) -> dict[str, RequestOutput]:
    """The finished requests among the deltas."""
    return {delta.request_id: delta.output for delta in deltas if delta.output is not None}


def run_to_end(llm: LLM) -> dict[str, RequestOutput]:
    """Make steps until nothing is left to do; the outputs that they reported."""
    outputs: dict[str, RequestOutput] = {}
    while llm.has_unfinished_requests:
        outputs |= outputs_of(llm.step())
    return outputs


def idle(llm: LLM) -> bool:
    """Nothing runs, nothing waits, and every block is free."""
    scheduler, pool = llm.core.scheduler, llm.core.pool
    busy = llm.has_unfinished_requests or scheduler.waiting or scheduler.running
    return not busy and pool.num_free == pool.num_blocks
