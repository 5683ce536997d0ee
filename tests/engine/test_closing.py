"""An engine as a context manager: at its end, requests, cache and model are gone."""

from __future__ import annotations

import weakref

import pytest
from support.checkpoints import refusal

from minqwen import LLM, SamplingParams

SMALL = {"max_model_len": 64, "num_blocks": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def test_at_the_end_of_with_the_model_and_the_cache_are_gone(embedded):
    with LLM(embedded, **SMALL) as llm:
        output = llm.generate("In the beginning", GREEDY, use_tqdm=False)[0]
        gone = weakref.ref(llm.model), weakref.ref(llm.core.runner.cache)
    assert [ref() for ref in gone] == [None, None]
    assert len(output.outputs[0].token_ids) == 8 and repr(llm) == "LLM(closed)"


def test_a_closed_engine_says_so_and_closing_again_does_nothing(embedded_model, embedded_tokenizer):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, **SMALL)
    llm.add_request([1, 2], GREEDY)
    stream = llm.stream([3, 4], GREEDY)
    llm.step()
    next(llm.stream_deltas([5], GREEDY))
    llm.close()
    llm.close()
    assert not llm.has_unfinished_requests and llm.get_tokenizer() is embedded_tokenizer
    for act in (
        lambda: llm.generate("In the beginning"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: llm.score([1, 2]),
        lambda: next(stream),
        lambda: llm.model,
        llm.step,
    ):
        refusal(act, "closed", "make another one")
    llm.abort("0")


def test_a_stream_that_was_begun_ends_with_the_engine(embedded_model):
    with LLM(embedded_model, **SMALL) as llm:
        stream = llm.stream_deltas([5, 6, 7], GREEDY)
        next(stream)
    assert list(stream) == []


def test_it_closes_after_an_error_too_and_a_model_of_ones_own_stays(embedded_model):
    with pytest.raises(ZeroDivisionError), LLM(embedded_model, **SMALL) as llm:
        raise ZeroDivisionError
    assert repr(llm) == "LLM(closed)"
    with LLM(embedded_model, **SMALL) as other:
        assert other.model is embedded_model
        assert len(other.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8
