"""The engine against the naive loop, and the allocator and scheduler against their own rules."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import scheduler_machine
from support.naive import greedy

from minqwen import LLM, Qwen2, SamplingParams
from minqwen.engine import llm as llm_module
from minqwen.engine.blocks import BlockPool
from minqwen.engine.scheduler import Scheduler, Sequence
from minqwen.errors import MinqwenError
from minqwen.model.memory import step_bytes, worst_steps
from minqwen.sampling.structured import StructuredOutputs

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPTS = [
    "In the beginning",
    "And it came to pass, that",
    "The LORD is my shepherd; I shall not want. He maketh me",
]


@pytest.fixture(scope="module")
def oracle(embedded_model, embedded_tokenizer):
    ids = [embedded_tokenizer.encode(p) for p in PROMPTS]
    return [greedy(embedded_model, i, 24) for i in ids]


@pytest.fixture(params=[256, 4], ids=["sha256", "4bits"])
def make(request):
    """Makes an engine; every test that takes it runs with the hash cut to 4 bits too, where most matches collide."""

    def engine(model, tokenizer, **options) -> LLM:
        llm = LLM(
            model,
            tokenizer=tokenizer,
            **{"max_model_len": 256, "num_blocks": 400, "seed": 0, **options},
        )
        llm.pool.digest_bits = request.param
        return llm

    return engine


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_cached_greedy_tokens_are_the_naive_loops(
    make, embedded_model, embedded_tokenizer, oracle, block_size, prefix_caching
):
    llm = make(
        embedded_model,
        embedded_tokenizer,
        block_size=block_size,
        enable_prefix_caching=prefix_caching,
        max_num_batched_tokens=32,
        max_num_seqs=4,
    )
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == oracle
    assert llm.pool.num_free == llm.pool.num_blocks
    if prefix_caching and block_size == 7 and llm.pool.digest_bits == 256:
        assert all(o.num_cached_tokens for o in outputs if len(o.prompt_token_ids) > 7)


def test_preemption_changes_no_token(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer, block_size=4, num_blocks=20, max_model_len=64)
    outputs = llm.generate(PROMPTS * 4, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
    assert llm.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == oracle * 4
    assert llm.pool.num_free == 20


def test_samples_share_the_prompt_and_do_not_depend_on_neighbours(
    make, embedded_model, embedded_tokenizer
):
    params = SamplingParams(
        n=4, temperature=1.0, seed=7, max_tokens=12, logprobs=1, ignore_eos=True
    )
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


def test_logprobs_and_score_are_the_models(make, embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer, max_num_batched_tokens=8, max_num_seqs=2)
    out = llm.generate(
        PROMPTS[2], SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=2, **GREEDY)
    )[0]
    ids = out.prompt_token_ids + out.outputs[0].token_ids
    with torch.no_grad():
        truth = torch.log_softmax(embedded_model(torch.tensor([ids]))[0], -1)
    entries = out.prompt_logprobs[1:] + out.outputs[0].logprobs
    assert out.prompt_logprobs[0] is None and len(entries) == len(ids) - 1
    for at, entry in enumerate(entries):
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(truth[at, token]), abs=1e-5)
            assert logprob.decoded_token is None or logprob.decoded_token == llm.tokenizer.decode(
                [token]
            )
        assert ids[at + 1] in entry
    scores = llm.score([PROMPTS[2]])[0]
    assert scores == pytest.approx(
        [float(truth[i, ids[i + 1]]) for i in range(len(scores))], abs=1e-5
    )
    assert len(scores) == out.prompt_logprobs.__len__() - 1


def test_stream_stop_and_forced_ids(make, embedded_model, embedded_tokenizer, oracle):
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
    out = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, stop_token_ids=[token], **GREEDY))[
        0
    ].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert out.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_structured_output_parses_whatever_the_model_thinks(
    make, embedded_model, embedded_tokenizer
):
    llm = make(embedded_model, embedded_tokenizer)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    specs = {"json": schema}, {"regex": "[0-9]{3}-[a-f]{2}"}, {"choice": ["yes", "no"]}
    params = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=120, structured_outputs=StructuredOutputs(**spec)
        )
        for i, spec in enumerate(specs)
    ]
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert all(o.finish_reason == "stop" for o in outputs)
    found = json.loads(outputs[0].text)
    assert set(found) == {"name", "age"} and type(found["age"]) is int
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", outputs[1].text) and outputs[2].text in ("yes", "no")


def test_what_cannot_be_served_is_refused_in_one_line(make, embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer, max_model_len=16)
    for prompt in ([], [1] * 16, [10**6], [-1]):
        with pytest.raises(MinqwenError) as e:
            llm.generate([prompt])
        assert "\n" not in str(e.value)
    assert not llm.has_unfinished_requests
    for bad in (
        {"block_size": 0},
        {"block_size": 257},
        {"num_blocks": 2, "max_model_len": 200},
        {"max_num_seqs": 0},
        {"max_model_len": 10**7},
        {"num_blocks": 0},
        {"num_blocks": None, "kv_cache_bytes": -1},
        {"gpu_memory_utilization": 1.5},
    ):
        with pytest.raises(MinqwenError) as e:
            make(embedded_model, embedded_tokenizer, **bad)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("seqs, tokens, length", [(1, 16, 900), (8, 64, 900), (64, 2048, 200)])
@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_the_pool_is_what_the_room_leaves_beside_the_fullest_step(
    embedded_model, exact_model, arithmetic, seqs, tokens, length, monkeypatch
):
    room = 40_000_000
    monkeypatch.setattr(LLM, "_room", lambda self, utilization: room)
    model = embedded_model if arithmetic == "native" else exact_model
    llm = LLM(model, max_model_len=length, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    page = llm.cache.pool.nbytes // llm.pool.num_blocks
    assert page == 2 * 16 * model.config.num_hidden_layers * model.config.kv_size * 4
    dtype = "float32" if arithmetic == "native" else "float64"

    def taken(pages: int) -> int:
        few, many = min(seqs, pages * 16 // length), min(length, pages * 16 // seqs)
        steps = [*worst_steps(length, few, tokens), *worst_steps(many, seqs, tokens)]
        return pages * page + max(
            step_bytes(model.config, *s, dtype=dtype, device="cpu") for s in steps
        )

    assert taken(llm.pool.num_blocks) <= room
    most = seqs * -(-length // 16)  # that could ever be used
    assert llm.pool.num_blocks == most or taken(llm.pool.num_blocks + 1) > room
    monkeypatch.setattr(LLM, "_room", lambda self, utilization: 100_000)
    with pytest.raises(MinqwenError, match="cache has 0: .*gpu_memory_utilization"):
        LLM(model, max_model_len=length, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def test_nan_ends_its_request_and_never_enters_the_prefix_cache(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
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


def test_a_failed_step_can_be_repeated(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
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


# ---- other oracles: transformers, one full forward, exact arithmetic --------------------------------------------


def ragged(tokenizer, lengths, each: int, seed: int = 0) -> list[list[int]]:
    """`each` prompts of every length, half of them text, half random tokens."""
    r, text = random.Random(seed), tokenizer.encode(" ".join(PROMPTS) * 4)
    starts = [[r.randrange(len(text) - length) for _ in range(each)] for length in lengths]
    return [
        text[at : at + length] if i % 2 else [r.randrange(2000) for _ in range(length)]
        for length, some in zip(lengths, starts)
        for i, at in enumerate(some)
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_200_ragged_prompts_have_the_tokens_of_transformers_generate(
    embedded, embedded_model, embedded_tokenizer, penalty
):
    """transformers gets 8 prompts of one length at a time: no padding, whose numerics would be its own."""
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(embedded, dtype=torch.float32, attn_implementation="eager")
    prompts = ragged(embedded_tokenizer, lengths=range(1, 74, 3), each=8)
    llm = LLM(
        embedded_model,
        tokenizer=embedded_tokenizer,
        num_blocks=150,
        block_size=8,
        max_model_len=128,
        seed=0,
    )
    params = SamplingParams(
        temperature=0, repetition_penalty=penalty, max_tokens=12, stop_token_ids=[2016]
    )
    ours = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    want = []
    for i in range(0, len(prompts), 8):
        ids = torch.tensor(prompts[i : i + 8])
        rows = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=[2018, 2016],
            pad_token_id=0,
        )
        for row in rows[:, ids.shape[1] :].tolist():
            end = next((at for at, token in enumerate(row) if token in (2018, 2016)), len(row))
            want.append(row[: end + 1])
    assert len(want) == 200 and sum(map(len, want)) > 2000
    assert [i for i in range(200) if ours[i] != want[i]] == []


@pytest.fixture(scope="module")
def double_model(embedded):
    return Qwen2.from_pretrained(embedded, dtype="float64")


@pytest.fixture(scope="module")
def exact_model(embedded):
    return Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact")


def all_logprobs(completion) -> list[list[float]]:
    """[tokens, V]"""
    return [[entry[i].logprob for i in range(len(entry))] for entry in completion.logprobs]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_decode_logprobs_are_those_of_one_full_forward(
    make, embedded_model, exact_model, double_model, embedded_tokenizer, arithmetic, forced
):
    """The naive teacher: every token's logprobs over the whole vocabulary."""
    model = exact_model if arithmetic == "exact" else embedded_model
    prompts = ragged(embedded_tokenizer, lengths=[1, 2, 7, 8, 9, 31, 60], each=2)
    llm = make(
        model,
        None,
        block_size=4,
        num_blocks=30,
        max_model_len=80,
        max_num_batched_tokens=24,
        max_num_seqs=8,
    )
    how = {"forced_ids": list(range(50, 62))} if forced else {"max_tokens": 12, **GREEDY}
    for out in llm.generate(prompts, SamplingParams(logprobs=-1, **how), use_tqdm=False):
        tokens, start = out.outputs[0].token_ids, len(out.prompt_token_ids) - 1
        with torch.no_grad():
            logits = model(torch.tensor([out.prompt_token_ids + tokens[:-1]]))[0, start:]
        truth = logits.log_softmax(-1)
        got = torch.tensor(all_logprobs(out.outputs[0]))
        assert len(tokens) == 12 and (forced or truth.argmax(-1).tolist() == tokens)
        if arithmetic == "exact":
            assert torch.equal(got, truth)
        else:  # against float64: the teacher's own float32 is off by as much, and elsewhere
            with torch.no_grad():
                logits = double_model(torch.tensor([out.prompt_token_ids + tokens[:-1]]))[0, start:]
            torch.testing.assert_close(got.double(), logits.log_softmax(-1), rtol=0, atol=1e-5)
    assert llm.scheduler.num_preemptions > 0


SIZE = 4  # tokens of a block, below
PROMPT = [(7 * i * i + 3) % 2000 for i in range(13)]
EVERY = SamplingParams(max_tokens=9, logprobs=-1, **GREEDY)


class Histories:
    """One request, with 9 tokens to come, in all the ways an engine can get to them: token ids and all logprobs."""

    def __init__(self, make, model):
        self.make, self.model = make, model

    def engine(self, **options) -> LLM:
        return self.make(
            self.model,
            None,
            **{"block_size": SIZE, "num_blocks": 64, "max_model_len": 64, **options},
        )

    def run(self, llm: LLM, params: SamplingParams = EVERY) -> list:
        out = llm.generate([PROMPT], params, use_tqdm=False)[0]
        self.cached = out.num_cached_tokens
        return [(c.token_ids, all_logprobs(c)) for c in out.outputs]

    def plain(self):
        return self.run(self.engine(enable_prefix_caching=False))[0]

    def full_hit(self):
        llm = self.engine()
        self.run(llm)
        return self.run(llm)[0]

    def partial_hit(self, length: int):
        """After a request that shares `length` tokens with this one."""
        llm = self.engine()
        llm.generate([[*PROMPT[:length], 1999]], SamplingParams(max_tokens=1), use_tqdm=False)
        return self.run(llm)[0]

    def evicted(self):
        llm = self.engine(num_blocks=16)
        self.run(llm)
        llm.generate([[i] * 50 for i in range(4)], SamplingParams(max_tokens=2), use_tqdm=False)
        return self.run(llm)[0]

    def samples(self, n: int) -> list:
        return self.run(self.engine(), SamplingParams(max_tokens=9, logprobs=-1, n=n, **GREEDY))

    def preempted(self, after: int, caching: bool):
        """Chunks of 5 tokens; after so many steps the sequence loses its blocks, and others get them."""
        llm = self.engine(
            enable_prefix_caching=caching, max_num_batched_tokens=5, max_num_seqs=4, num_blocks=16
        )
        request = llm.requests[llm.add_request(PROMPT, EVERY)]
        for _ in range(after):
            llm.step()
        if not request.output.finished:
            llm.scheduler._make_room(request.sequences[0])
            assert not request.sequences[0].blocks
            if after % 2:
                llm.generate([[after] * 40], SamplingParams(max_tokens=1), use_tqdm=False)
        while llm.has_unfinished_requests:
            llm.step()
        assert llm.pool.num_free == 16
        return request.output.outputs[0].token_ids, all_logprobs(request.output.outputs[0])

    def all(self):
        """(name, token ids, logprobs) of every history."""
        yield "full hit", self.full_hit()
        for length in (2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1):
            yield f"hit {length}", self.partial_hit(length)
        yield "evicted", self.evicted()
        for i, sample in enumerate(self.samples(3)):
            yield f"sample {i}", sample
        for caching in (True, False):
            for after in range(1, 12):  # 3 steps of prefill, 8 of decode
                yield f"preempted after {after}", self.preempted(after, caching)


def test_no_history_changes_a_bit_of_exact_arithmetic(make, exact_model):
    histories = Histories(make, exact_model)
    want = histories.plain()
    for name, got in histories.all():
        assert got == want, name


def test_no_history_changes_a_token_natively_but_bits_it_does(make, embedded_model):
    """The control of the test above: native float32 has other last bits where a token was computed in another batch."""
    histories = Histories(make, embedded_model)
    want, same = histories.plain(), 0
    for name, got in histories.all():
        assert got[0] == want[0], name
        same += got == want
    assert same < 27


def test_hits_are_whole_blocks_and_never_the_last_token(embedded_model, request):
    histories = Histories(lambda model, tokenizer, **o: LLM(model, seed=0, **o), embedded_model)
    for length, cached in ((2 * SIZE - 1, SIZE), (2 * SIZE, 2 * SIZE), (2 * SIZE + 1, 2 * SIZE)):
        histories.partial_hit(length)
        assert histories.cached == cached
    histories.full_hit()
    assert histories.cached == 12  # of 13
    histories.evicted()
    assert histories.cached == 0
    llm = histories.engine()
    for _ in range(2):  # 12 tokens are 3 whole blocks; the last is computed again, for its logits
        out = llm.generate([PROMPT[:12]], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert out.num_cached_tokens == 8


class Trusting(BlockPool):
    def holds(self, found, parent, tokens, salt):
        return True


def test_collisions_occur_and_are_not_served(embedded_model, oracle, embedded_tokenizer):
    """Every block has one of 16 digests; with a pool that trusts them alone, tokens go wrong."""
    prompts = [embedded_tokenizer.encode(p) for p in PROMPTS]
    others = ragged(embedded_tokenizer, lengths=[9, 14, 22, 30], each=4)
    for pool_class in (BlockPool, Trusting):
        llm = LLM(embedded_model, num_blocks=200, block_size=2, max_model_len=128, seed=0)
        llm.pool = llm.scheduler.pool = pool_class(200, 2, digest_bits=4)
        llm.generate(others, SamplingParams(max_tokens=2, **GREEDY), use_tqdm=False)
        tokens = [
            o.outputs[0].token_ids
            for o in llm.generate(prompts, SamplingParams(max_tokens=24, **GREEDY), use_tqdm=False)
        ]
        assert (tokens == oracle) == (pool_class is BlockPool)
        assert (llm.pool.collisions > 0) == (pool_class is BlockPool)


# ---- what users and servers do -----------------------------------------------------------------------------------


def idle(llm: LLM) -> bool:
    scheduler = llm.scheduler
    return (
        not llm.has_unfinished_requests
        and not scheduler.waiting
        and not scheduler.running
        and llm.pool.num_free == llm.pool.num_blocks
    )


def test_prompts_in_every_form(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)
    ids = [embedded_tokenizer.encode(p) for p in PROMPTS]
    params = SamplingParams(max_tokens=24, **GREEDY)

    def tokens(prompts):
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    array, tensor = np.array(ids[0]), torch.tensor(ids[0])
    for one in (
        PROMPTS[0],
        ids[0],
        tuple(ids[0]),
        array,
        tensor,
        list(array),
        array.astype("uint16"),
    ):
        assert tokens(one) == tokens([one]) == oracle[:1]
    assert tokens([ids[0], PROMPTS[1], torch.tensor(ids[2])]) == oracle
    assert tokens(p for p in PROMPTS) == tokens(tuple(PROMPTS)) == oracle
    assert (
        tokens(np.stack([array, array])) == tokens(torch.stack([tensor, tensor])) == oracle[:1] * 2
    )
    assert tokens([]) == tokens(()) == tokens(iter(())) == []
    out = llm.generate([array], params, use_tqdm=False)[0]
    assert out.prompt_token_ids == ids[0] and all(type(i) is int for i in out.prompt_token_ids)
    assert (
        llm.score([]) == []
        and len(llm.score(ids[0])[0]) == len(ids[0]) - 1
        and llm.score([[5]]) == [[]]
    )
    assert idle(llm)


@pytest.mark.parametrize(
    "prompts",
    [
        [[]],
        "",
        [""],
        [[1], []],
        [[1], ""],
        5,
        None,
        b"ab",
        [b"ab"],
        {"prompt": "x"},
        [{"prompt": "x"}],
        [None],
        [[1], 5],
        [[1, "a"]],
        [[True]],
        [[1.0]],
        [[-1]],
        [[2048]],
        [[[1]]],
        np.zeros((1, 2, 3), int),
        np.array([1.5]),
        torch.tensor(5),
        [[1] * 256],
    ],
    ids=repr,
)
def test_a_prompt_that_is_none_is_refused_in_one_line_and_leaves_nothing(
    embedded_model, embedded_tokenizer, prompts
):
    llm = LLM(
        embedded_model, tokenizer=embedded_tokenizer, max_model_len=256, num_blocks=400, seed=0
    )
    with pytest.raises(MinqwenError, match="prompt") as e:
        llm.generate(prompts, use_tqdm=False)
    assert "\n" not in str(e.value) and idle(llm)


def test_refusals_leave_nothing_behind(make, embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer)
    good, two = SamplingParams(max_tokens=2), [[1, 2], [3, 4]]
    for prompts, options in (
        (two, {"sampling_params": [good]}),
        (two, {"sampling_params": [good] * 3}),
        (two, {"sampling_params": []}),
        (two, {"sampling_params": [good, {"temperature": 0}]}),
        (two, {"sampling_params": {"temperature": 0}}),
        (two, {"sampling_params": [good, SamplingParams(forced_ids=[2048])]}),
        (
            two,
            {
                "sampling_params": [
                    good,
                    SamplingParams(structured_outputs=StructuredOutputs(regex="((")),
                ]
            },
        ),
        (two, {"sampling_params": [good, SamplingParams(n=2)], "trace": "*.resid_mid"}),
        (two, {"trace": "nothing"}),
        (two, {"cache_salt": 5}),
        ([*two, [-1]], {}),
    ):
        with pytest.raises(MinqwenError) as e:
            llm.generate(prompts, use_tqdm=False, **options)
        assert "\n" not in str(e.value) and idle(llm), options
    with pytest.raises(MinqwenError, match="n is more than 1"):
        next(llm.stream("x", SamplingParams(n=2)))
    assert idle(llm) and llm.step() == []
    llm.add_request([1], request_id="a")
    for taken in ("a", 5):
        with pytest.raises(MinqwenError, match="request_id"):
            llm.add_request([2], request_id=taken)
    assert list(llm.requests) == ["a"] and len(llm.scheduler.waiting) == 1
    llm.abort("a")
    llm.abort("a"), llm.abort("never")
    assert idle(llm)


def test_ids_that_users_choose_do_not_meet_the_engines(embedded_model):
    llm = LLM(embedded_model, num_blocks=40, max_model_len=64, seed=0)
    for taken in ("1", "2", "3"):
        llm.add_request([1], SamplingParams(max_tokens=1), request_id=taken)
    mine = [llm.add_request([1], SamplingParams(max_tokens=1)) for _ in range(3)]
    assert len({"1", "2", "3", *mine}) == 6
    assert {o.request_id for o in llm.step()} == {"1", "2", "3", *mine}


def test_aborts_at_every_moment_give_everything_back(
    make, embedded_model, embedded_tokenizer, oracle
):
    """In the queue, in the middle of prefill, while forked samples wait for a place, in decode; others go on."""
    seen = set()
    for steps in range(14):
        llm = make(
            embedded_model,
            embedded_tokenizer,
            block_size=2,
            max_num_batched_tokens=4,
            max_num_seqs=2,
        )
        victim = llm.add_request(
            PROMPTS[2], SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True)
        )
        other = llm.requests[
            llm.add_request(PROMPTS[0], SamplingParams(max_tokens=6, **GREEDY))
        ].output
        for _ in range(steps):
            llm.step()
        request = llm.requests[victim]
        first = request.sequences[0]
        seen.add(
            "queue"
            if not first.blocks and not request.forked
            else "prefill"
            if not request.forked
            else "children wait"
            if any(s in llm.scheduler.waiting for s in request.sequences)
            else "decode"
        )
        llm.abort(victim)
        llm.abort(victim)
        assert {c.finish_reason for c in request.output.outputs} <= {"abort", "length"}
        while llm.has_unfinished_requests:
            assert all(o.request_id != victim for o in llm.step())
        assert other.outputs[0].token_ids == oracle[0][:6] and idle(llm)
    assert seen >= {"queue", "prefill", "children wait"}


def test_generate_and_streams_lose_nobodys_output(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)
    short, long = SamplingParams(max_tokens=4, **GREEDY), SamplingParams(max_tokens=24, **GREEDY)
    early, late = llm.add_request(PROMPTS[0], short), llm.add_request(PROMPTS[1], long)
    dropped = llm.add_request(PROMPTS[1], short)
    out = llm.generate(PROMPTS[2], SamplingParams(max_tokens=8, **GREEDY), use_tqdm=False)[0]
    assert out.outputs[0].token_ids == oracle[2][:8]
    assert early not in llm.requests and late in llm.requests and llm.has_unfinished_requests
    llm.abort(dropped)  # finished, but not reported: nobody wants it any more
    with pytest.raises(MinqwenError, match="request_id"):
        llm.add_request(PROMPTS[0], short, request_id=early)  # finished, but not reported
    reported = {o.request_id: o for o in llm.step()}
    assert set(reported) == {early, late}
    assert reported[early].finished and reported[early].outputs[0].token_ids == oracle[0][:4]
    streams = [llm.stream(p, long) for p in PROMPTS]
    texts = ["", "", ""]
    for piece in itertools.zip_longest(*streams, fillvalue=""):  # by turns
        texts = [text + more for text, more in zip(texts, piece)]
    assert texts == [embedded_tokenizer.decode(ids) for ids in oracle]
    assert reported[late].finished and reported[late].outputs[0].token_ids == oracle[1]
    assert [o.request_id for o in llm.step()] == [late] and idle(llm)
    stream = llm.stream(PROMPTS[0], long)
    next(stream)
    stream.close()  # a reader who goes away
    assert idle(llm)
    early = llm.add_request(PROMPTS[0], short)
    llm.generate(PROMPTS[1], long, use_tqdm=False)
    assert not llm.requests and llm.has_unfinished_requests, "what is not reported would be lost"
    assert [o.request_id for o in llm.step()] == [early] and idle(llm)


def test_one_sample_that_fails_ends_its_request_alone(embedded_model, monkeypatch):
    """NaN in the first of two samples, in a step that fills a block of the second."""
    llm = LLM(embedded_model, num_blocks=40, block_size=2, max_model_len=64, seed=0)
    both = llm.requests[
        llm.add_request([1, 2, 3], SamplingParams(n=2, max_tokens=20, ignore_eos=True))
    ]
    other = llm.requests[llm.add_request([4, 5], SamplingParams(max_tokens=20, **GREEDY))].output
    llm.step()
    while both.sequences[1].computed % 2 == 0 or both.sequences[1].computed < 3:
        llm.step()
    forward = type(embedded_model).forward

    def poisoned(self, *args):
        logits = forward(self, *args)
        logits[0] = math.nan
        return logits

    monkeypatch.setattr(type(embedded_model), "forward", poisoned)
    assert {o.request_id for o in llm.step()} == {both.output.request_id, other.request_id}
    monkeypatch.setattr(type(embedded_model), "forward", forward)
    assert (
        "not finite" in both.output.error
        and [c.finish_reason for c in both.output.outputs] == ["error"] * 2
    )
    while llm.has_unfinished_requests:
        llm.step()
    assert other.outputs[0].token_ids == greedy(embedded_model, [4, 5], 20) and idle(llm)


def test_a_step_that_fails_while_drawing_can_be_repeated(
    make, embedded_model, embedded_tokenizer, oracle, monkeypatch
):
    llm = make(embedded_model, embedded_tokenizer, block_size=4)
    outputs = [
        llm.requests[llm.add_request(p, SamplingParams(max_tokens=24, **GREEDY))].output
        for p in PROMPTS
    ]
    calls, sample = itertools.count(), llm_module.sample

    def failing(*args):
        if next(calls) % 3 == 1:
            raise RuntimeError("out of memory")
        return sample(*args)

    monkeypatch.setattr(llm_module, "sample", failing)
    while llm.has_unfinished_requests:
        try:
            llm.step()
        except RuntimeError:
            pass
    assert [o.outputs[0].token_ids for o in outputs] == oracle and idle(llm)


def test_the_progress_bar_counts_tokens_as_they_come(embedded_model, monkeypatch):
    shown = []

    class Bar(llm_module.tqdm):
        def __init__(self, *args, disable=None, **options):
            assert disable is None  # on a terminal
            super().__init__(*args, file=io.StringIO(), **options)

        def set_postfix_str(self, s="", refresh=True):
            shown.append((self.n, float(re.fullmatch(r"([0-9.]+) tokens/s", s)[1])))

    monkeypatch.setattr(llm_module, "tqdm", Bar)
    llm = LLM(embedded_model, num_blocks=400, max_model_len=256, max_num_seqs=4, seed=0)
    began = time.perf_counter()
    llm.generate([[i] * 3 for i in range(8)], SamplingParams(max_tokens=40, ignore_eos=True, n=2))
    seconds = time.perf_counter() - began
    assert any(0 < n < 8 for n, _ in shown) and [n for n, _ in shown] == sorted(n for n, _ in shown)
    assert shown[0][0] == 0 and shown[1][1] > 0, "nothing to see before the first request ends"
    assert shown[-1][1] == pytest.approx(8 * 2 * 40 / seconds, rel=0.3)


# ---- allocator and scheduler, without a model --------------------------------------------------------------------

WORDS = st.binary(min_size=8 * 201, max_size=8 * 201).map(
    struct.Struct("201Q").unpack
)  # one draw, so it is cheap


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(WORDS, st.sampled_from([4, 256]))
def test_scheduler_keeps_its_rules(words, digest_bits):
    """200 actions on a small pool, and after every one all of `Machine.check`."""
    scheduler_machine.run(words, digest_bits)


def test_the_machine_sees_what_it_is_for():
    happened = scheduler_machine.long_run(5000)
    assert all(
        happened[what] > 50 for what in ("fork", "abort", "preemption", "eviction", "collision")
    ), happened


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


class Sparing(Scheduler):
    def _make_room(self, running=None):
        """Takes nothing from those who wait while there is one who runs."""
        waiting, self.waiting = self.waiting, [] if running else self.waiting
        made = super()._make_room(running)
        self.waiting = (
            sorted(self.waiting + waiting, key=lambda s: s.key) if running else self.waiting
        )
        return made


class Queue(Scheduler):
    def add(self, sequence):
        self.waiting.append(sequence)  # a preempted sequence goes to the end


@pytest.mark.parametrize(
    "broken", [Trusting, Forgetful, Newest, Whole, Unsalted, Grudging, Hasty, Sparing, Queue]
)
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
