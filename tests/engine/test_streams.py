"""Several callers on one engine: aborts give everything back, and nobody's output is lost."""

from __future__ import annotations

import itertools

import pytest
from support.engine import (
    GREEDY,
    PROMPTS,
    all_deltas,
    check_joined,
    idle,
    outputs_of,
    run_to_end,
)

from minqwen import LLM, SamplingParams
from minqwen.errors import MinqwenError


def test_a_stream_gives_the_text_piece_by_piece(embedded_model, embedded_tokenizer, oracle):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40)
    pieces = list(llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY)))
    assert "".join(pieces) == embedded_tokenizer.decode(oracle[0], skip_special_tokens=True)
    assert len(pieces) > 12 and all(pieces) and idle(llm)


# ---- aborts -------------------------------------------------------------------------------------


def where_is(llm: LLM, request_id: str) -> str:
    """How far a request of several samples has come."""
    request = llm.core.requests[request_id]
    if not request.forked:
        return "prefill" if request.completions[0].blocks else "queue"
    if any(completion in llm.core.scheduler.waiting for completion in request.completions):
        return "children wait"
    return "decode"


def test_aborts_at_every_moment_give_everything_back(
    make, embedded_model, embedded_tokenizer, oracle
):
    """In the queue, in prefill, while forked samples wait, in decode; the others go on."""
    seen = set()
    for steps in range(14):
        llm = make(
            embedded_model,
            embedded_tokenizer,
            block_size=2,
            max_num_batched_tokens=4,
            max_num_seqs=2,
        )
        params = SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True)
        victim = llm.add_request(PROMPTS[2], params)
        other = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=6, **GREEDY))
        outputs = {}
        for _ in range(steps):
            outputs |= outputs_of(llm.step())
        seen.add(where_is(llm, victim))
        request = llm.core.requests[victim]
        llm.abort(victim)
        llm.abort(victim)
        reasons = {c.finish_reason for c in request.output().outputs}
        assert reasons <= {"abort", "length"}
        while llm.has_unfinished_requests:
            deltas = llm.step()
            assert all(delta.request_id != victim for delta in deltas)
            outputs |= outputs_of(deltas)
        assert outputs[other].outputs[0].token_ids == oracle[0][:6] and idle(llm)
    assert seen >= {"queue", "prefill", "children wait"}


def test_a_stream_ends_when_somebody_aborts_its_request(embedded_model, embedded_tokenizer):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    stream = llm.stream_deltas(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY), request_id="a")
    first = next(stream)
    llm.abort("a")
    assert first.request_id == "a" and list(stream) == [] and idle(llm)


def test_a_stream_whose_request_is_gone_leaves_another_of_that_id_alone(
    embedded_model, embedded_tokenizer, oracle
):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    params = SamplingParams(max_tokens=24, **GREEDY)
    for end in (list, lambda stream: stream.close()):
        stream = llm.stream_deltas(PROMPTS[0], params, request_id="a")
        next(stream)
        llm.abort("a")
        llm.add_request(PROMPTS[1], params, request_id="a")
        assert not end(stream)
        assert run_to_end(llm)["a"].outputs[0].token_ids == oracle[1] and idle(llm)


# ---- nobody's output is lost --------------------------------------------------------------------


def test_generate_loses_nobodys_output(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)
    short, long = SamplingParams(max_tokens=4, **GREEDY), SamplingParams(max_tokens=24, **GREEDY)
    early, late = llm.add_request(PROMPTS[0], short), llm.add_request(PROMPTS[1], long)
    dropped = llm.add_request(PROMPTS[1], short)
    out = llm.generate(PROMPTS[2], SamplingParams(max_tokens=8, **GREEDY), use_tqdm=False)[0]
    assert out.outputs[0].token_ids == oracle[2][:8]
    assert early not in llm.core.requests and late in llm.core.requests
    assert llm.has_unfinished_requests
    llm.abort(dropped)  # finished, but not reported: nobody wants it any more
    with pytest.raises(MinqwenError, match="request_id"):
        llm.add_request(PROMPTS[0], short, request_id=early)  # finished, but not reported
    reported = llm.step()
    assert {delta.request_id for delta in reported} == {early, late}
    reported += all_deltas(llm)
    outputs = check_joined(reported)
    assert outputs[early].outputs[0].token_ids == oracle[0][:4]
    assert outputs[late].outputs[0].token_ids == oracle[1] and idle(llm)


def test_what_generate_has_finished_for_others_is_still_to_be_reported(
    embedded_model, embedded_tokenizer, oracle
):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    early = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=4, **GREEDY))
    llm.generate(PROMPTS[1], SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
    assert not llm.core.requests and llm.has_unfinished_requests
    outputs = check_joined(llm.step())
    assert outputs[early].outputs[0].token_ids == oracle[0][:4] and idle(llm)


def test_streams_read_by_turns_lose_nobodys_output(
    make, embedded_model, embedded_tokenizer, oracle
):
    llm = make(embedded_model, embedded_tokenizer)
    long = SamplingParams(max_tokens=24, **GREEDY)
    late = llm.add_request(PROMPTS[1], long)
    streams = [llm.stream(prompt, long) for prompt in PROMPTS]
    texts = ["", "", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces)]
    assert texts == [embedded_tokenizer.decode(ids, skip_special_tokens=True) for ids in oracle]
    reported = llm.step()
    assert {delta.request_id for delta in reported} == {late}
    assert check_joined(reported)[late].outputs[0].token_ids == oracle[1] and idle(llm)


def test_a_reader_who_goes_away_leaves_nothing(embedded_model, embedded_tokenizer):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))
    next(stream)
    stream.close()
    assert idle(llm) and llm.step() == []


def test_step_reports_nothing_of_a_request_that_a_stream_waits_for(
    embedded_model, embedded_tokenizer, oracle
):
    """Steps that others make put its deltas aside; the stream gives them, in order."""
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    stream = llm.stream_deltas(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))
    deltas = [next(stream)]
    other = llm.add_request(PROMPTS[1], SamplingParams(max_tokens=24, **GREEDY))
    reported = all_deltas(llm)
    assert check_joined(reported).keys() == {other}
    deltas += stream
    assert check_joined(deltas)[deltas[0].request_id].outputs[0].token_ids == oracle[0]
    assert idle(llm)
