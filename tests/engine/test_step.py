"""What `step` reports: deltas, whole and in order, whatever fails or is aborted on the way."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from support.engine import GREEDY, PROMPTS, all_deltas, check_joined, idle, outputs_of
from support.naive import greedy

from minqwen import LLM, Qwen2, SamplingParams
from minqwen.engine import core as core_module
from minqwen.engine.outputs import Delta
from minqwen.errors import MinqwenError, SamplingError
from minqwen.sampling.structured import Constraint, StructuredOutputs


def test_a_step_reports_the_next_token_and_the_last_one_the_output(
    make, embedded_model, embedded_tokenizer, oracle
):
    llm = make(embedded_model, embedded_tokenizer)
    request_id = llm.add_request(PROMPTS[0], SamplingParams(max_tokens=3, **GREEDY))
    deltas = [delta for _ in range(3) for delta in llm.step()]
    assert [d.request_id for d in deltas] == [request_id] * 3
    assert [d.token_ids for d in deltas] == [[token] for token in oracle[0][:3]]
    assert [d.finish_reason for d in deltas] == [None, None, "length"]
    assert [d.output is None for d in deltas] == [True, True, False]
    assert deltas[-1].output.outputs[0].token_ids == oracle[0][:3] and idle(llm)


# ---- deltas together are the completion ---------------------------------------------------------


def test_joined_deltas_are_the_completion(make, embedded_model, embedded_tokenizer, oracle):
    """Four samples of one request, stop strings, logprobs, and a request without any of them."""
    llm = make(
        embedded_model,
        embedded_tokenizer,
        block_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=16,
    )
    whole = embedded_tokenizer.decode(oracle[1])
    sampled = SamplingParams(n=4, seed=3, max_tokens=12, min_tokens=12, logprobs=2, stop=["e", "o"])
    ids = [
        llm.add_request(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY)),
        llm.add_request(PROMPTS[1], SamplingParams(max_tokens=24, stop=whole[10:14], **GREEDY)),
        llm.add_request(PROMPTS[2], sampled),
        llm.add_request(PROMPTS[2], dataclasses.replace(sampled, min_tokens=0, logprobs=None)),
    ]
    outputs = check_joined(all_deltas(llm))
    assert [len(outputs[i].outputs) for i in ids] == [1, 1, 4, 4]
    assert outputs[ids[0]].outputs[0].text == embedded_tokenizer.decode(
        oracle[0], skip_special_tokens=True
    )
    assert outputs[ids[1]].outputs[0].text == whole[: whole.index(whole[10:14])]
    assert {c.finish_reason for c in outputs[ids[3]].outputs} <= {"stop", "length"}
    assert all(c.stop_reason in ("e", "o") for c in outputs[ids[3]].outputs if c.stop_reason)
    assert idle(llm)


def test_joined_deltas_are_the_completion_after_preemptions(
    make, embedded_model, embedded_tokenizer, oracle
):
    llm = make(embedded_model, embedded_tokenizer, block_size=4, num_blocks=20, max_model_len=64)
    plain, logprobs = {}, {"logprobs": 1}
    ids = [
        llm.add_request(prompt, SamplingParams(max_tokens=24, n=n, **GREEDY, **more))
        for prompt in PROMPTS
        for n, more in ((1, plain), (2, logprobs))
    ]
    outputs = check_joined(all_deltas(llm))
    assert llm.core.scheduler.num_preemptions > 0 and idle(llm)
    for i, request_id in enumerate(ids):
        assert [c.token_ids for c in outputs[request_id].outputs] == [oracle[i // 2]] * (1 + i % 2)


def test_joined_deltas_are_the_completion_of_a_request_that_fails(
    embedded_model, embedded_tokenizer, monkeypatch
):
    """Four samples: one is finished when the logits of another become NaN; three end by it."""
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=80, seed=0)
    ends = llm.generate(PROMPTS[0], SamplingParams(seed=5, n=4, max_tokens=4, ignore_eos=True))
    first_ids = [c.token_ids[1] for c in ends[0].outputs]
    stop = next(token for token in first_ids if first_ids.count(token) == 1)
    params = SamplingParams(seed=5, n=4, max_tokens=9, ignore_eos=True, stop_token_ids=[stop])
    llm.add_request(PROMPTS[0], params)
    deltas = llm.step()  # the first sample's first token
    while not any(delta.finish_reason for delta in deltas):
        deltas += llm.step()
    with poison(monkeypatch, rows=slice(-1, None)):
        deltas += llm.step()
    output = next(iter(check_joined(deltas).values()))
    assert sorted(c.finish_reason for c in output.outputs) == ["error", "error", "error", "stop"]
    assert "not finite" in output.error and output.finished and idle(llm)


def test_a_delta_is_a_snapshot(embedded_model, embedded_tokenizer):
    """What an early step reported is the same when the request has ended; nobody can change it."""
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=40, seed=0)
    llm.add_request(PROMPTS[0], SamplingParams(n=2, max_tokens=8, logprobs=2, ignore_eos=True))
    deltas, copies = [], []
    while llm.has_unfinished_requests:
        new = llm.step()
        deltas += new
        copies += copy.deepcopy(new)
    llm.generate(PROMPTS, SamplingParams(max_tokens=8), use_tqdm=False)
    assert len(deltas) == 16 and deltas == copies
    for field in dataclasses.fields(Delta):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(deltas[0], field.name, None)


# ---- steps that fail ----------------------------------------------------------------------------


def poison(monkeypatch, rows):
    """A context in which these rows of every step's logits are NaN."""
    context = monkeypatch.context()
    forward = Qwen2.forward

    def poisoned(self, *args):
        logits = forward(self, *args)
        logits[rows] = math.nan
        return logits

    class Poisoned:
        def __enter__(self):
            context.__enter__().setattr(Qwen2, "forward", poisoned)

        def __exit__(self, *error):
            return context.__exit__(*error)

    return Poisoned()


def failing_every_third_time(function):
    calls = itertools.count()

    def failing(*args):
        if next(calls) % 3 == 1:
            raise RuntimeError("out of memory")
        return function(*args)

    return failing


def run_in_spite_of_failures(llm: LLM) -> list[Delta]:
    deltas, failures = [], 0
    while llm.has_unfinished_requests:
        try:
            deltas += llm.step()
        except RuntimeError:
            failures += 1
    assert failures > 5
    return deltas


def test_nan_ends_its_request_and_never_enters_the_prefix_cache(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    first, second = llm.add_request(PROMPTS[0]), llm.add_request(PROMPTS[2])
    with poison(monkeypatch, rows=-1):  # the last request of the step
        outputs = outputs_of(llm.step())
    assert "not finite" in outputs[second].error and outputs[second].finished
    llm.abort(first)
    params = SamplingParams(max_tokens=24, **GREEDY)
    out = llm.generate(PROMPTS[2], params, use_tqdm=False)[0]
    assert out.num_cached_tokens == 0 and out.outputs[0].token_ids == oracle[2]


def test_a_failed_step_can_be_repeated(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    request_id = llm.add_request(PROMPTS[2], SamplingParams(max_tokens=24, **GREEDY))
    monkeypatch.setattr(Qwen2, "forward", failing_every_third_time(Qwen2.forward))
    outputs = check_joined(run_in_spite_of_failures(llm))
    assert outputs[request_id].outputs[0].token_ids == oracle[2] and idle(llm)


def test_a_step_that_fails_while_drawing_can_be_repeated(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    ids = [llm.add_request(p, SamplingParams(max_tokens=24, **GREEDY)) for p in PROMPTS]
    monkeypatch.setattr(core_module, "sample", failing_every_third_time(core_module.sample))
    outputs = check_joined(run_in_spite_of_failures(llm))
    assert [outputs[i].outputs[0].token_ids for i in ids] == oracle and idle(llm)


def test_one_sample_that_fails_ends_its_request_alone(embedded_model, monkeypatch):
    """NaN in the first of two samples, in a step that fills a block of the second."""
    llm = LLM(embedded_model, num_blocks=40, block_size=2, max_model_len=64, seed=0)
    both = llm.add_request([1, 2, 3], SamplingParams(n=2, max_tokens=20, ignore_eos=True))
    other = llm.add_request([4, 5], SamplingParams(max_tokens=20, **GREEDY))
    second = llm.core.requests[both].completions[1]
    deltas = llm.step()
    while second.computed % 2 == 0 or second.computed < 3:
        deltas += llm.step()
    with poison(monkeypatch, rows=0):
        failed = llm.step()
    assert {delta.request_id for delta in failed} == {both, other}
    output = outputs_of(failed)[both]
    assert "not finite" in output.error
    assert [c.finish_reason for c in output.outputs] == ["error"] * 2
    outputs = check_joined(deltas + failed + all_deltas(llm))
    assert outputs[other].outputs[0].token_ids == greedy(embedded_model, [4, 5], 20) and idle(llm)


def refuse_the_third_token(constraint: Constraint, token: int) -> None:
    constraint.accepted = getattr(constraint, "accepted", 0) + 1
    if constraint.accepted == 3:
        raise SamplingError(f"token {token} does not fit")


def allow_nothing(constraint: Constraint) -> torch.Tensor:
    return torch.zeros(constraint.vocab_size, dtype=torch.bool)


@pytest.mark.parametrize(
    "method, broken, tokens, says",
    [
        ("accept", refuse_the_third_token, 2, "does not fit"),
        ("mask", allow_nothing, 0, "everything is forbidden"),
    ],
)
def test_a_request_whose_grammar_cannot_go_on_fails_alone(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch, method, broken, tokens, says
):
    llm = make(embedded_model, embedded_tokenizer)
    monkeypatch.setattr(Constraint, method, broken)
    digits = SamplingParams(n=2, structured_outputs=StructuredOutputs(regex="[0-9]{9}"))
    stuck = llm.add_request(PROMPTS[0], digits)
    others = [llm.add_request(p, SamplingParams(max_tokens=24, **GREEDY)) for p in PROMPTS]
    outputs = check_joined(all_deltas(llm))
    assert says in outputs[stuck].error and "\n" not in outputs[stuck].error
    assert [c.finish_reason for c in outputs[stuck].outputs] == ["error"] * 2
    assert len(outputs[stuck].outputs[0].token_ids) == tokens
    assert [outputs[i].outputs[0].token_ids for i in others] == oracle and idle(llm)
    with pytest.raises(MinqwenError, match=says):
        llm.generate([PROMPTS[1], PROMPTS[0]], [None, digits], use_tqdm=False)
    assert idle(llm) and llm.step() == []
