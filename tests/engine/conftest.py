"""Models and engines that the tests of the engine share."""

from __future__ import annotations

import pytest
from support.engine import PROMPTS
from support.naive import greedy

from minqwen import LLM, Qwen2


@pytest.fixture(scope="session")
def oracle(embedded_model, embedded_tokenizer) -> list[list[int]]:
    """The 24 tokens that the naive loop puts after each of PROMPTS."""
    return [greedy(embedded_model, embedded_tokenizer.encode(p), 24) for p in PROMPTS]


@pytest.fixture(scope="session")
def double_model(embedded) -> Qwen2:
    return Qwen2.from_pretrained(embedded, dtype="float64")


@pytest.fixture(scope="session")
def exact_model(embedded) -> Qwen2:
    return Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact")


@pytest.fixture(params=[256, 4], ids=["sha256", "4bits"])
def make(request):
    """Makes an engine.

    Every test that takes it runs twice: with digests of 4 bits most matches are collisions.
    """

    def engine(model, tokenizer, **options) -> LLM:
        options = {"max_model_len": 256, "num_blocks": 400, "seed": 0, **options}
        llm = LLM(model, tokenizer=tokenizer, **options)
        llm.core.pool.digest_bits = request.param
        return llm

    return engine
