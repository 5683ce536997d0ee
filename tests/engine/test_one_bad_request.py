"""What goes wrong with one request ends that request; the others do not notice it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from support.checkpoints import tiny, weights
from support.engine import (
    GREEDY,
    PROMPTS,
    all_deltas,
    check_joined,
    idle,
    outputs_of,
    run_to_end,
)
from support.naive import greedy

import minqwen.engine.core as core_module
import minqwen.engine.runner as runner_module
from minqwen import LLM, Qwen2, SamplingParams, Tokenizer
from minqwen.engine.request import Completion
from minqwen.errors import MinqwenError, RequestError
from minqwen.sampling.structured import Constraint, StructuredOutputs
from minqwen.tokenizer import IncrementalDecoder

FEW = SamplingParams(max_tokens=12, **GREEDY)
DIGITS = StructuredOutputs(regex="[0-9]{9}")
BAD = 7  # the seed by which the tests below know the request that goes wrong


@pytest.fixture
def llm(embedded_model, embedded_tokenizer) -> LLM:
    return LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=64, num_blocks=60)


def bad(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": BAD, "ignore_eos": True, **fields})


def fail(*args):
    raise IndexError("index 2038 is out of bounds")


def break_the_sampler(monkeypatch):
    sample = core_module.sample

    def sample_or_fail(logits, rows, ops):
        return fail() if any(row.seed == BAD for row in rows) else sample(logits, rows, ops)

    monkeypatch.setattr(core_module, "sample", sample_or_fail)
    return bad()


def break_the_third_mask(monkeypatch):
    mask, calls = Constraint.mask, []

    def mask_or_fail(self):
        calls.append(self)
        return fail() if len(calls) > 3 else mask(self)

    monkeypatch.setattr(Constraint, "mask", mask_or_fail)
    return bad(structured_outputs=DIGITS)


def break_a_grammar(monkeypatch):
    monkeypatch.setattr(Constraint, "accept", fail)
    return bad(structured_outputs=DIGITS)


def break_what_a_stop_string_needs(monkeypatch):
    monkeypatch.setattr("minqwen.sampling.stopping.StopChecker.push", fail_with_stops)
    return bad(stop=["\x00 never"])


def fail_with_stops(self, text, special="", final=False, search=True):
    if self.stop:
        fail()
    return text, None


def break_logprobs(monkeypatch):
    monkeypatch.setattr(core_module, "logprobs_of", fail)
    return bad(prompt_logprobs=1)


def break_the_spelling_of_logprobs(monkeypatch):
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids, **_: fail() if len(ids) == 1 else decode(self, ids)
    )
    return bad(logprobs=3)


def break_the_packing(monkeypatch):
    pack = runner_module.pack

    def pack_or_fail(step, *others):
        return fail() if any(item.completion.seed == BAD for item in step) else pack(step, *others)

    monkeypatch.setattr(runner_module, "pack", pack_or_fail)
    return bad()


def break_its_deltas(monkeypatch):
    delta = Completion.delta
    monkeypatch.setattr(
        Completion, "delta", lambda self: fail() if self.seed == BAD else delta(self)
    )
    return bad()


BREAKS = [
    *(break_the_packing, break_its_deltas),
    *(break_the_sampler, break_the_third_mask, break_a_grammar, break_logprobs),
    *(break_what_a_stop_string_needs, break_the_spelling_of_logprobs),
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_whatever_fails_for_one_request_fails_it_alone(llm, oracle, monkeypatch, broken, n):
    params = dataclasses.replace(broken(monkeypatch), n=n)
    first = llm.add_request(PROMPTS[0], FEW)
    wrong = llm.add_request(PROMPTS[1], params)
    last = llm.add_request(PROMPTS[2], FEW)
    outputs = check_joined(all_deltas(llm))
    error = outputs[wrong].error
    assert "IndexError: index 2038 is out of bounds" in error and "\n" not in error
    assert __file__ in error, "it says where the mistake is in the code"
    assert {c.finish_reason for c in outputs[wrong].outputs} == {"error"}
    assert [outputs[first].outputs[0].token_ids, outputs[last].outputs[0].token_ids] == [
        oracle[0][:12],
        oracle[2][:12],
    ]
    assert idle(llm)


@pytest.mark.parametrize("method", ["delta", "output"])
def test_an_end_that_cannot_be_told_is_an_error_and_nothing_is_lost(
    llm, oracle, monkeypatch, method
):
    """Of two samples: the first ends two steps before the second; the output comes with both."""
    sound = getattr(Completion, method)

    def fail_at_the_end(self):
        return fail() if self.request.params.n == 2 and self.finished else sound(self)

    monkeypatch.setattr(Completion, method, fail_at_the_end)
    two = SamplingParams(n=2, max_tokens=5, logprobs=1, forced_ids=[7, 8, 9, 10, 11])
    wrong, other = llm.add_request(PROMPTS[0], two), llm.add_request(PROMPTS[1], FEW)
    outputs = check_joined(all_deltas(llm))
    first, second = outputs[wrong].outputs
    assert (first.token_ids, first.finish_reason) == ([7, 8, 9, 10, 11], "length")
    alive = "length" if method == "output" else "error"
    assert second.finish_reason == alive
    assert second.token_ids == first.token_ids[: len(second.token_ids)]
    assert len(second.token_ids) == (5 if method == "output" else 3)
    assert "IndexError: index 2038" in outputs[wrong].error and idle(llm)
    assert outputs[other].outputs[0].token_ids == oracle[1][:12]


def test_generate_hands_over_the_neighbours_of_one_that_failed(llm, oracle, monkeypatch):
    wrong = break_the_sampler(monkeypatch)
    with pytest.raises(RequestError, match="index 2038 is out of bounds") as caught:
        llm.generate([PROMPTS[0], PROMPTS[1], PROMPTS[2]], [FEW, wrong, FEW], use_tqdm=False)
    outputs = caught.value.outputs
    assert [output.prompt for output in outputs] == PROMPTS
    assert [output.error is None for output in outputs] == [True, False, True]
    assert outputs[0].outputs[0].token_ids == oracle[0][:12]
    assert outputs[2].outputs[0].token_ids == oracle[2][:12]
    assert isinstance(caught.value, MinqwenError) and idle(llm)


def test_keys_and_values_of_a_row_that_failed_are_not_kept(llm, oracle, monkeypatch):
    prompt = llm.tokenizer.encode(PROMPTS[0]) * 8
    with monkeypatch.context() as patches, pytest.raises(RequestError):
        llm.generate([prompt], break_the_sampler(patches), use_tqdm=False)
    assert not llm.core.pool.content
    assert llm.generate([prompt], FEW, use_tqdm=False)[0].num_cached_tokens == 0


def test_what_lacks_memory_fails_the_step_which_can_be_repeated(llm, oracle, monkeypatch):
    sample, calls = core_module.sample, []

    def sample_or_fail(logits, rows, ops):
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(logits, rows, ops)

    monkeypatch.setattr(core_module, "sample", sample_or_fail)
    ids = [llm.add_request(prompt, FEW) for prompt in PROMPTS]
    deltas = llm.step()
    with pytest.raises(torch.OutOfMemoryError):
        llm.step()
    outputs = check_joined(deltas + all_deltas(llm))
    assert [outputs[i].outputs[0].token_ids for i in ids] == [want[:12] for want in oracle]


def test_an_end_token_beyond_the_vocabulary_stops_nobody(embedded, oracle, tmp_path):
    """From generation_config.json, with min_tokens, and with a grammar."""
    model = tmp_path / "model"
    shutil.copytree(embedded, model)
    path = model / "generation_config.json"
    told = json.loads(path.read_text())
    told["eos_token_id"] = [99999, *told["eos_token_id"]]
    path.write_text(json.dumps(told))
    llm = LLM(model, dtype="float32", max_model_len=64, num_blocks=60)
    plain = llm.add_request(PROMPTS[0], FEW)
    asked = [
        {"min_tokens": 3, "ignore_eos": False},
        {"structured_outputs": DIGITS, "ignore_eos": False},
        {"min_tokens": 3, "temperature": 1e39},
    ]
    others = [llm.add_request(PROMPTS[1], bad(**fields)) for fields in asked]
    outputs = run_to_end(llm)
    assert outputs[plain].outputs[0].token_ids == oracle[0][:12]
    for i, fields in zip(others, asked):
        completion = outputs[i].outputs[0]
        assert outputs[i].error is None and len(completion.token_ids) >= 3
        if "structured_outputs" in fields:
            assert len(completion.text) == 9 and completion.text.isdigit()
    assert idle(llm)


def test_a_tokenizer_that_cannot_spell_a_token_fails_the_request(llm, oracle, monkeypatch):
    push = IncrementalDecoder.push

    def push_or_fail(self, ids):
        ids = list(ids)
        return fail() if ids == [oracle[1][5]] else push(self, ids)

    monkeypatch.setattr(IncrementalDecoder, "push", push_or_fail)
    ids = [llm.add_request(prompt, SamplingParams(max_tokens=5, **GREEDY)) for prompt in PROMPTS]
    wrong = llm.add_request(PROMPTS[1], FEW)
    outputs = check_joined(all_deltas(llm))
    unable = [i for i in outputs if outputs[i].error]
    assert wrong in unable and outputs[wrong].outputs[0].token_ids[:6] == oracle[1][:6]
    for i, want in zip(ids, oracle):
        assert i in unable or outputs[i].outputs[0].token_ids == want[:5]
    assert idle(llm)


# ---- aborts -------------------------------------------------------------------------------------


def small(model) -> LLM:
    """Prompts come in chunks, samples wait for each other, and the cache is too small for all."""
    return LLM(
        model,
        max_model_len=52,
        num_blocks=13,
        block_size=4,
        max_num_batched_tokens=6,
        max_num_seqs=3,
        seed=0,
    )


def state_of(llm: LLM, request_id: str, reports: set[str]) -> str:
    request = llm.core.requests.get(request_id)
    if request is None:
        return "reported" if request_id in reports else "finished, not reported"
    waiting, running = llm.core.scheduler.waiting, llm.core.scheduler.running
    if any(c.num_preemptions and c in waiting for c in request.completions):
        return "preempted"
    if not request.forked:
        first = request.completions[0]
        begun = "between chunks" if first.computed else "before its first chunk"
        return begun if first in running else "waiting"
    if any(c in waiting for c in request.completions):
        return "samples wait"
    return "some samples finished" if any(c.finished for c in request.completions) else "decode"


@pytest.mark.parametrize("reader", ["step", "stream", "generate"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_abort_in_every_state_comes_back_and_gives_everything_back(reader, n):
    """Of a request that `step` reports, that a suspended stream waits for, beside a `generate`."""
    config = tiny()
    tensors = weights(config)
    model = Qwen2.from_tensors(config, lambda name, shard: tensors[name])
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], list(range(11, 36))]
    long = SamplingParams(max_tokens=20, **GREEDY)
    want = [greedy(model, ids, 20) for ids in prompts]
    seen: set[str] = set()
    for steps in [*range(0, 60, 2), 120]:
        llm = small(model)
        others = [llm.add_request(ids, long) for ids in prompts[:2]]
        stream = None
        if reader == "stream":
            stream = llm.stream_deltas(prompts[2], long, request_id="victim")
            next(stream)
        else:
            params = SamplingParams(n=n, max_tokens=20, seed=0, ignore_eos=True)
            llm.add_request(prompts[2], params, request_id="victim")
        deltas = [delta for _ in range(steps) for delta in llm.step()]
        seen.add(state_of(llm, "victim", {d.request_id for d in deltas if d.output}))
        if reader == "generate":  # what came meanwhile is still to be reported
            llm.generate([prompts[0]], SamplingParams(max_tokens=2, **GREEDY), use_tqdm=False)
        llm.abort("victim")
        llm.abort("victim")
        scheduler = llm.core.scheduler
        left = [*scheduler.running, *scheduler.waiting]
        assert all(completion.request.request_id != "victim" for completion in left)
        deltas = [delta for delta in deltas if delta.request_id != "victim"]
        deltas += all_deltas(llm)
        assert all(delta.request_id != "victim" for delta in deltas)
        outputs = outputs_of(deltas)
        assert [outputs[i].outputs[0].token_ids for i in others] == want[:2]
        assert stream is None or list(stream) == []
        assert idle(llm)
    if reader == "step":
        wanted = {"waiting", "between chunks", "decode", "preempted", "reported"}
        if n > 1:
            wanted |= {"samples wait", "some samples finished"}
        assert seen >= wanted, seen


@pytest.mark.parametrize("own", [True, False], ids=["its own request", "another"])
def test_a_hook_may_abort_a_request_that_generate_waits_for(llm, oracle, own):

    ids: list[str] = []

    def abort(x, name):
        if not ids:
            ids.extend(llm.core.requests)
        if x.shape[1] == 1:  # while it decodes
            llm.abort(ids[0] if own else ids[1])

    hooked = SamplingParams(max_tokens=12, **GREEDY)
    outputs = llm.generate(
        PROMPTS[:2], hooked, hooks=[("layers.0.resid_post", abort)], use_tqdm=False
    )
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == (["abort", "length"] if own else ["length", "abort"])
    kept = 1 if own else 0
    assert outputs[kept].outputs[0].token_ids == oracle[kept][:12]
    assert len(outputs[1 - kept].outputs[0].token_ids) == 1 and idle(llm)


def test_a_hook_cannot_make_steps_but_may_add_and_reset(llm, oracle):
    added = []

    def busy(x, name):
        if not added:
            added.append(llm.add_request(PROMPTS[1], FEW))
            llm.reset_prefix_cache()
        if x.shape[1] == 1:
            llm.step()

    hooked = llm.add_request(PROMPTS[0], FEW, hooks=[("embed", busy)])
    other = llm.add_request(PROMPTS[2], FEW)
    outputs = outputs_of(all_deltas(llm))
    assert "a hook cannot make steps" in outputs[hooked].error
    assert outputs[other].outputs[0].token_ids == oracle[2][:12]
    assert outputs[added[0]].outputs[0].token_ids == oracle[1][:12] and idle(llm)
