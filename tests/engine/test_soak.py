"""The soak, cut down: a crowd on a pool that is too small has the outputs that each has alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minqwen.engine.blocks import BlockPool
from minqwen.lab.soak import Run, all_given_back, compare, make_jobs, run_alone, run_crowd


@pytest.fixture(scope="module")
def jobs(embedded_tokenizer):
    return make_jobs(60, embedded_tokenizer, seed=1)


@pytest.fixture(scope="module")
def exact_solo(exact_model, embedded_tokenizer, jobs):
    return run_alone(exact_model, embedded_tokenizer, jobs)


@pytest.fixture(scope="module")
def native_solo(embedded_model, embedded_tokenizer, jobs):
    return run_alone(embedded_model, embedded_tokenizer, jobs)


def check_rough(run: Run) -> None:
    """It was a crowd: everything that can happen to a request happened, and all was given back."""
    assert run.llm.core.scheduler.num_preemptions > 10
    assert run.llm.core.pool.evictions > 50
    assert len(run.aborted) == 12
    assert any(run.outputs[i].outputs[0].token_ids for i in run.aborted)
    assert any(output.num_cached_tokens for output in run.outputs)
    assert all_given_back(run.llm)


@pytest.mark.parametrize("digest_bits", [256, 4])
def test_exact_outputs_are_those_of_a_solo_run(
    exact_model, embedded_tokenizer, jobs, exact_solo, digest_bits
):
    crowd = run_crowd(exact_model, embedded_tokenizer, jobs, digest_bits)
    counts = compare(crowd, exact_solo, jobs)
    assert counts["wrong"] == 0 and counts["same"] == 48 and counts["prefix"] >= 12
    assert (crowd.llm.core.pool.collisions > 10) == (digest_bits == 4)
    check_rough(crowd)


@pytest.mark.parametrize("digest_bits", [256, 4])
def test_native_greedy_tokens_are_those_of_a_solo_run(
    embedded_model, embedded_tokenizer, jobs, native_solo, exact_model, digest_bits
):
    crowd = run_crowd(embedded_model, embedded_tokenizer, jobs, digest_bits)
    counts = compare(crowd, native_solo, jobs, exact_model)
    assert counts["wrong"] == 0 and counts["same"] > 40
    check_rough(crowd)


class Trusting(BlockPool):
    """Believes that two texts with the same digest are the same."""

    def holds(self, found, parent, tokens, salt):
        return True


def test_a_pool_that_trusts_digests_is_caught(
    embedded_model, embedded_tokenizer, jobs, native_solo, exact_model
):
    crowd = run_crowd(embedded_model, embedded_tokenizer, jobs, 4, pool_class=Trusting)
    assert compare(crowd, native_solo, jobs, exact_model)["wrong"] > 3


@contextmanager
def one_other_token(tokens: list[int]) -> Iterator[None]:
    tokens[0] += 1
    yield
    tokens[0] -= 1


def test_one_other_token_or_bit_is_seen(jobs, exact_solo, native_solo, exact_model):
    """Controls of the comparison: native logprobs are not exact ones; the second best is no tie."""
    assert compare(exact_solo, exact_solo, jobs)["wrong"] == 0
    assert compare(native_solo, exact_solo, jobs)["wrong"] > 10
    plain = [i for i, job in enumerate(jobs) if job.params.temperature == 0 and job.params.n == 1]
    with one_other_token(native_solo.outputs[plain[0]].outputs[0].token_ids):
        assert compare(native_solo, exact_solo, jobs, exact_model)["wrong"] == 1
