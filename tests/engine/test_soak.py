"""benchmarks/soak.py, cut down: a crowd on a pool that is too small has the outputs that each has alone."""

from __future__ import annotations

import sys

import pytest
from support.paths import ROOT

from minqwen import Qwen2
from minqwen.engine.blocks import BlockPool

sys.path.insert(0, str(ROOT / "benchmarks"))
import soak  # noqa: E402


@pytest.fixture(scope="module")
def jobs(embedded_tokenizer):
    return soak.make_jobs(60, embedded_tokenizer, seed=1)


@pytest.fixture(scope="module")
def exact_model(embedded):
    return Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact")


@pytest.fixture(scope="module")
def exact_solo(exact_model, embedded_tokenizer, jobs):
    return soak.run_alone(exact_model, embedded_tokenizer, jobs)


@pytest.fixture(scope="module")
def native_solo(embedded_model, embedded_tokenizer, jobs):
    return soak.run_alone(embedded_model, embedded_tokenizer, jobs)


def rough(run) -> bool:
    """It was a crowd: preemption, eviction, cache hits, aborts of requests that had begun, and all was given back."""
    llm = run.llm
    return (
        llm.scheduler.num_preemptions > 10
        and llm.pool.evictions > 50
        and len(run.aborted) == 12
        and any(run.outputs[i].outputs[0].token_ids for i in run.aborted)
        and any(o.num_cached_tokens for o in run.outputs)
        and soak.all_given_back(llm)
    )


@pytest.mark.parametrize("digest_bits", [256, 4])
def test_exact_outputs_are_those_of_a_solo_run(
    exact_model, embedded_tokenizer, jobs, exact_solo, digest_bits
):
    crowd = soak.run_crowd(exact_model, embedded_tokenizer, jobs, digest_bits)
    counts = soak.compare(crowd, exact_solo, jobs)
    assert counts["wrong"] == 0 and counts["same"] == 48 and counts["prefix"] >= 12 and rough(crowd)
    assert (crowd.llm.pool.collisions > 10) == (digest_bits == 4)


@pytest.mark.parametrize("digest_bits", [256, 4])
def test_native_greedy_tokens_are_those_of_a_solo_run(
    embedded_model, embedded_tokenizer, jobs, native_solo, exact_model, digest_bits
):
    crowd = soak.run_crowd(embedded_model, embedded_tokenizer, jobs, digest_bits)
    counts = soak.compare(crowd, native_solo, jobs, exact_model)
    assert counts["wrong"] == 0 and counts["same"] > 40 and rough(crowd)


def test_a_pool_that_trusts_digests_is_caught(
    embedded_model, embedded_tokenizer, jobs, native_solo, exact_model
):
    class Trusting(BlockPool):
        def holds(self, found, parent, tokens, salt):
            return True

    crowd = soak.run_crowd(embedded_model, embedded_tokenizer, jobs, 4, pool_class=Trusting)
    assert soak.compare(crowd, native_solo, jobs, exact_model)["wrong"] > 3


def test_one_other_token_or_bit_is_seen(jobs, exact_solo, native_solo, exact_model):
    """Controls of the comparison itself: native logprobs are not exact ones, and the second best is no tie."""
    assert soak.compare(exact_solo, exact_solo, jobs)["wrong"] == 0
    assert soak.compare(native_solo, exact_solo, jobs)["wrong"] > 10
    greedy = next(
        i for i, job in enumerate(jobs) if job.params.temperature == 0 and job.params.n == 1
    )
    tokens = native_solo.outputs[greedy].outputs[0].token_ids
    tokens[0] += 1
    try:
        assert soak.compare(native_solo, exact_solo, jobs, exact_model)["wrong"] == 1
    finally:
        tokens[0] -= 1
