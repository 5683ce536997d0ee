"""The engine against the naive loop, and the allocator and scheduler against their own rules."""
from __future__ import annotations

import json
import math
import random
import re
import struct

import pytest
import scheduler_machine
import torch
from conftest import greedy
from hypothesis import HealthCheck, given, settings
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

WORDS = st.binary(min_size=8 * 201, max_size=8 * 201).map(struct.Struct("201Q").unpack)  # one draw, so it is cheap


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(WORDS, st.sampled_from([4, 256]))
def test_scheduler_keeps_its_rules(words, digest_bits):
    """200 actions on a small pool, and after every one all of `Machine.check`."""
    scheduler_machine.run(words, digest_bits)


def test_the_machine_sees_what_it_is_for():
    happened = scheduler_machine.long_run(5000)
    assert all(happened[what] > 50 for what in ("fork", "abort", "preemption", "eviction", "collision")), happened


class Trusting(BlockPool):
    def holds(self, found, parent, tokens, salt):
        return True


class Forgetful(BlockPool):
    def _forget(self, block):
        """A block that is written anew can still be found."""


class Newest(BlockPool):
    def release(self, blocks):
        super().release(blocks)
        for block in blocks:
            if block in self.unused:
                self.unused.move_to_end(block, last=False)


class Whole(BlockPool):
    def match(self, ids, salt=None):
        return super().match([*ids, 0], salt)


class Unsalted(BlockPool):
    def match(self, ids, salt=None):
        return super().match(ids)

    def register(self, block, parent, tokens, salt=None):
        return super().register(block, parent, tokens)


class Grudging(Scheduler):
    def _make_room(self, running=None):
        return super()._make_room(running and self.running[0])


class Hasty(Scheduler):
    def fork(self, parent, child):
        """Shares the last, partly filled block too."""
        child.blocks = list(parent.blocks)
        self.pool.share(child.blocks)
        child.computed = child.num_prompt - 1
        child.records = parent.records[: child.computed // self.pool.block_size]
        self.add(child)


class Queue(Scheduler):
    def add(self, sequence):
        self.waiting.append(sequence)  # a preempted sequence goes to the end


@pytest.mark.parametrize("broken", [Trusting, Forgetful, Newest, Whole, Unsalted, Grudging, Hasty, Queue])
def test_a_broken_one_is_caught(broken):
    kind = "pool_class" if issubclass(broken, BlockPool) else "scheduler_class"
    r = random.Random(0)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        for _ in range(300):
            scheduler_machine.run([r.getrandbits(64) for _ in range(101)], 4, **{kind: broken})


def test_a_crowd_of_newcomers_starves_nobody():
    """One request that needs the whole pool, and behind it short ones without end."""
    pool = BlockPool(8, 4)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=8)
    for arrival in range(3):
        scheduler.add(Sequence((arrival, 0), [arrival] * 7, 7))
    big = Sequence((3, 0), [9] * 20, 20)
    scheduler.add(big)
    for arrival in range(4, 150):
        scheduler.add(Sequence((arrival, 0), [arrival] * 3, 3))
        for sequence, count in scheduler.schedule():
            scheduler.computed(sequence, count)
            if sequence.computed == len(sequence.ids):
                sequence.ids.append(0)
                if len(sequence.ids) >= (32 if sequence is big else sequence.num_prompt + 6):
                    scheduler.finish(sequence)
        if not big.blocks and big.computed:
            break
    assert len(big.ids) == 32 and arrival < 60
