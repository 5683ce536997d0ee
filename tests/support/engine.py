"""Prompts for the engine, and what its tests ask of it again and again."""

from __future__ import annotations

import random
from collections import defaultdict
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


def all_deltas(llm: LLM) -> list[Delta]:
    deltas = []
    while llm.has_unfinished_requests:
        deltas += llm.step()
    return deltas


def check_joined(deltas: list[Delta]) -> dict[str, RequestOutput]:
    """The deltas of each completion, joined, are the completion. Returns the outputs."""
    outputs = outputs_of(deltas)
    by_request, by_completion = defaultdict(list), defaultdict(list)
    for delta in deltas:
        by_request[delta.request_id].append(delta)
        by_completion[delta.request_id, delta.index].append(delta)
    for own in by_request.values():
        with_output = [i for i, delta in enumerate(own) if delta.output is not None]
        assert with_output == [len(own) - 1], "one output, with the request's last delta"
    completions = {(i, c.index): c for i, output in outputs.items() for c in output.outputs}
    assert completions.keys() == by_completion.keys()
    for key, completion in completions.items():
        own = by_completion[key]
        assert "".join(delta.text for delta in own) == completion.text
        assert [i for delta in own for i in delta.token_ids] == completion.token_ids
        if completion.logprobs is None:
            assert all(delta.logprobs is None for delta in own)
        else:
            assert [p for delta in own for p in delta.logprobs or ()] == completion.logprobs
        assert [delta.finish_reason is None for delta in own[:-1]] == [True] * (len(own) - 1)
        assert own[-1].finish_reason == completion.finish_reason is not None
        assert own[-1].stop_reason == completion.stop_reason
    return outputs
