"""Rank 0 asks an engine that all ranks share; the others compute what it asks.

For callers whose own code may run on rank 0 only, because it is slow, or because nobody knows
whether it would do the same on every rank. One rank is enough too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from minqwen.engine.failures import raise_failures
from minqwen.engine.llm import LLM
from minqwen.engine.outputs import RequestOutput
from minqwen.sampling.params import SamplingParams

# A prompt's token ids, and the fields of its SamplingParams, as JSON has them. The checkpoint's
# generation_config.json stands in for the fields that are not there.
Ask = tuple[list[int], dict[str, Any]]


def ask(llm: LLM, asks: Sequence[Ask]) -> Iterator[RequestOutput]:
    """On rank 0: the outputs, in their order, each as soon as its turn comes; read them all.

    Raises MinqwenError for what cannot be served, on every rank, and RequestError for a request
    that failed.
    """
    llm.mesh.world.broadcast_bytes(json.dumps(asks).encode(), patient=True)
    for output in _computed(llm, asks):
        raise_failures([output])
        yield output


def end(llm: LLM) -> None:
    """On rank 0: nothing more will be asked."""
    llm.mesh.world.broadcast_bytes(None, patient=True)


def follow(llm: LLM) -> None:
    """On the other ranks: compute whatever rank 0 asks, until its `end`."""
    while (data := llm.mesh.world.broadcast_bytes(None, patient=True)) is not None:
        for _ in _computed(llm, json.loads(data)):
            pass


def _computed(llm: LLM, asks: Sequence[Ask]) -> Iterator[RequestOutput]:
    params = [SamplingParams.from_defaults(llm.defaults, **fields) for _, fields in asks]
    return llm.iterate([ids for ids, _ in asks], params)
