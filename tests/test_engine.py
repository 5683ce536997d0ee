"""The engine against the naive loop, and the allocator and scheduler against their own rules."""
from __future__ import annotations

import json
import math
import re

import pytest
import torch
from conftest import greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from minqwen import LLM, SamplingParams
from minqwen.engine.kv_cache import BlockPool
from minqwen.engine.scheduler import Scheduler, Sequence
from minqwen.engine.structured import StructuredOutputs
from minqwen.errors import MinqwenError

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPTS = ["In the beginning", "And it came to pass, that", "The LORD is my shepherd; I shall not want. He maketh me"]


@pytest.fixture(scope="module")
def oracle(embedded_model, embedded_tokenizer):
    ids = [embedded_tokenizer.encode(p) for p in PROMPTS]
    return [greedy(embedded_model, i, 24) for i in ids]


def make(model, tokenizer, **options) -> LLM:
    return LLM(model, tokenizer=tokenizer, **{"max_model_len": 256, "num_blocks": 400, "seed": 0, **options})


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_cached_greedy_tokens_are_the_naive_loops(embedded_model, embedded_tokenizer, oracle, block_size, prefix_caching):
    llm = make(embedded_model, embedded_tokenizer, block_size=block_size, enable_prefix_caching=prefix_caching,
               max_num_batched_tokens=32, max_num_seqs=4)
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == oracle
    assert llm.pool.num_free == llm.pool.num_blocks
    if prefix_caching and block_size == 7:
        assert all(o.num_cached_tokens for o in outputs if len(o.prompt_token_ids) > 7)


def test_preemption_changes_no_token(embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer, block_size=4, num_blocks=20, max_model_len=64)
    outputs = llm.generate(PROMPTS * 4, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
    assert llm.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == oracle * 4
    assert llm.pool.num_free == 20


def test_samples_share_the_prompt_and_do_not_depend_on_neighbours(embedded_model, embedded_tokenizer):
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=12, logprobs=1, ignore_eos=True)
    alone = make(embedded_model, embedded_tokenizer).generate(PROMPTS[2], params, use_tqdm=False)[0]
    llm = make(embedded_model, embedded_tokenizer, block_size=4, enable_prefix_caching=False)
    crowd = llm.generate(PROMPTS + PROMPTS, [params] * 6, use_tqdm=False)[2]
    assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in crowd.outputs]
    assert len({tuple(c.token_ids) for c in alone.outputs}) == 4
    request = llm.add_request(PROMPTS[2], params)
    while not llm.requests[request].forked:
        llm.step()
    parent, *children = llm.requests[request].sequences
    shared = (parent.num_prompt - 1) // 4
    assert shared and all(child.blocks[:shared] == parent.blocks[:shared] for child in children)
    llm.abort(request)
    assert llm.pool.num_free == llm.pool.num_blocks


def test_logprobs_and_score_are_the_models(embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer, max_num_batched_tokens=8, max_num_seqs=2)
    out = llm.generate(PROMPTS[2], SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=2, **GREEDY))[0]
    ids = out.prompt_token_ids + out.outputs[0].token_ids
    with torch.no_grad():
        truth = torch.log_softmax(embedded_model(torch.tensor([ids]))[0], -1)
    entries = out.prompt_logprobs[1:] + out.outputs[0].logprobs
    assert out.prompt_logprobs[0] is None and len(entries) == len(ids) - 1
    for at, entry in enumerate(entries):
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(truth[at, token]), abs=1e-5)
            assert logprob.decoded_token is None or logprob.decoded_token == llm.tokenizer.decode([token])
        assert ids[at + 1] in entry
    scores = llm.score([PROMPTS[2]])[0]
    assert scores == pytest.approx([float(truth[i, ids[i + 1]]) for i in range(len(scores))], abs=1e-5)
    assert len(scores) == out.prompt_logprobs.__len__() - 1


def test_stream_stop_and_forced_ids(embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)
    whole = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))[0].outputs[0]
    assert "".join(llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))) == whole.text
    stop = whole.text[10:14]
    cut = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop=stop, **GREEDY))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    forced = oracle[1][:5]
    out = llm.generate(PROMPTS[0], SamplingParams(forced_ids=forced, logprobs=0))[0].outputs[0]
    assert out.token_ids == forced and all(f in lp for f, lp in zip(forced, out.logprobs))
    token = whole.token_ids[3]
    out = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop_token_ids=[token], **GREEDY))[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert out.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_structured_output_parses_whatever_the_model_thinks(embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer)
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
              "required": ["name", "age"], "additionalProperties": False}
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=120, structured_outputs=spec) for i, spec in enumerate(
        (StructuredOutputs(json=schema), StructuredOutputs(regex="[0-9]{3}-[a-f]{2}"), StructuredOutputs(choice=["yes", "no"])))]
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert all(o.finish_reason == "stop" for o in outputs)
    found = json.loads(outputs[0].text)
    assert set(found) == {"name", "age"} and type(found["age"]) is int
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", outputs[1].text) and outputs[2].text in ("yes", "no")


def test_what_cannot_be_served_is_refused_in_one_line(embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer, max_model_len=16)
    for prompt in ([], [1] * 16, [10**6], [-1]):
        with pytest.raises(MinqwenError) as e:
            llm.generate([prompt])
        assert "\n" not in str(e.value)
    assert not llm.has_unfinished_requests
    for bad in ({"block_size": 0}, {"block_size": 257}, {"num_blocks": 2, "max_model_len": 200}, {"max_num_seqs": 0},
                {"max_model_len": 10**7}):
        with pytest.raises(MinqwenError) as e:
            make(embedded_model, embedded_tokenizer, **bad)
        assert "\n" not in str(e.value)


def test_nan_ends_its_request_and_never_enters_the_prefix_cache(embedded_model, embedded_tokenizer, oracle, monkeypatch):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    forward = type(embedded_model).forward

    def poisoned(self, ids, batch, cache, tap):
        logits = forward(self, ids, batch, cache, tap)
        logits[-1] = math.nan  # the last sequence of the step
        return logits

    monkeypatch.setattr(type(embedded_model), "forward", poisoned)
    first, second = llm.add_request(PROMPTS[0]), llm.add_request(PROMPTS[2])
    outputs = {o.request_id: o for o in llm.step()}
    assert "not finite" in outputs[second].error and outputs[second].finished
    monkeypatch.setattr(type(embedded_model), "forward", forward)
    llm.abort(first)
    out = llm.generate(PROMPTS[2], SamplingParams(max_tokens=24, **GREEDY))[0]
    assert out.num_cached_tokens == 0 and out.outputs[0].token_ids == oracle[2]


def test_a_failed_step_can_be_repeated(embedded_model, embedded_tokenizer, oracle, monkeypatch):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    llm.add_request(PROMPTS[2], SamplingParams(max_tokens=24, **GREEDY))
    forward = type(embedded_model).forward
    calls = iter(range(1000))

    def failing(self, *args):
        if next(calls) % 3 == 1:
            raise RuntimeError("out of memory")
        return forward(self, *args)

    monkeypatch.setattr(type(embedded_model), "forward", failing)
    while llm.has_unfinished_requests:
        try:
            for output in llm.step():
                last = output
        except RuntimeError:
            pass
    assert last.outputs[0].token_ids == oracle[2]


# ---- allocator and scheduler, without a model --------------------------------------------------------------------


def check_invariants(scheduler: Scheduler, everyone: list[Sequence]) -> None:
    pool = scheduler.pool
    counts = [0] * pool.num_blocks
    for sequence in everyone:
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        assert sequence.computed <= len(sequence.ids) and sequence.computed <= len(sequence.blocks) * pool.block_size
        for block in sequence.blocks:
            counts[block] += 1
    assert counts == pool.references
    assert set(pool.unused) == {b for b, n in enumerate(counts) if n == 0}
    for digest, block in pool.by_digest.items():
        assert pool.content[block].digest == digest
    assert len(pool.by_digest) == len(pool.content)
    for queue in (scheduler.running, scheduler.waiting):
        assert [s.key for s in queue] == sorted(s.key for s in queue)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([4, 256]), st.integers(1, 5), st.booleans())
def test_scheduler_keeps_its_rules(data, digest_bits, block_size, caching):
    """A machine of add, step, fork, abort on a small pool. `truth[block]` is what a forward pass would have
    written there; a sequence must only ever read its own prefix, whatever was shared, evicted or preempted."""
    longest = 24
    pool = BlockPool(-(-longest // block_size) + data.draw(st.integers(0, 12)), block_size, caching, digest_bits)
    scheduler = Scheduler(pool, data.draw(st.integers(1, 5)), data.draw(st.integers(5, 30)))
    truth = [[None] * block_size for _ in range(pool.num_blocks)]
    alive: list[Sequence] = []
    finished = arrivals = 0
    for _ in range(data.draw(st.integers(5, 60))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort"]))
        if action == "add" and len(alive) < 12:
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=longest - 4))
            sequence = Sequence((arrivals, 0), prompt, len(prompt))
            sequence.state = {"target": min(longest, len(prompt) + data.draw(st.integers(1, 6))),
                              "children": data.draw(st.integers(0, 2))}
            arrivals += 1
            alive.append(sequence)
            scheduler.add(sequence)
        elif action == "abort" and alive:
            sequence = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            scheduler.finish(sequence)
        else:
            step = scheduler.schedule()
            assert step or not alive
            assert sum(count for _, count in step) <= scheduler.max_num_batched_tokens
            assert len(scheduler.running) <= scheduler.max_num_seqs
            for sequence, count in step:
                for i in range(sequence.computed, sequence.computed + count):
                    block = sequence.blocks[i // block_size]
                    assert pool.references[block] == 1, "written while shared"
                    truth[block][i % block_size] = tuple(sequence.ids[: i + 1])
            for sequence, count in step:
                for i in range(sequence.computed + count):
                    assert truth[sequence.blocks[i // block_size]][i % block_size] == tuple(sequence.ids[: i + 1])
                scheduler.computed(sequence, count)
                if sequence.computed == len(sequence.ids):
                    for n in range(sequence.state["children"]):
                        child = Sequence((sequence.key[0], n + 1), sequence.ids[: sequence.num_prompt],
                                         sequence.num_prompt)
                        child.state = {**sequence.state, "children": 0}
                        alive.append(child)
                        scheduler.fork(sequence, child)
                    sequence.state["children"] = 0
                    sequence.ids.append(data.draw(st.integers(0, 1)))
                    if len(sequence.ids) >= sequence.state["target"]:
                        scheduler.finish(sequence)
                        alive.remove(sequence)
                        finished += 1
        check_invariants(scheduler, alive)
    for _ in range(3000):  # no starvation: everybody ends
        if not alive:
            break
        step = scheduler.schedule()
        assert step
        for sequence, count in step:
            scheduler.computed(sequence, count)
            if sequence.computed == len(sequence.ids):
                scheduler.finish(sequence)
                alive.remove(sequence)
        check_invariants(scheduler, alive)
    assert not alive and pool.num_free == pool.num_blocks
