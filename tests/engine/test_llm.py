"""What users call: prompts in every form, completions, scores, structured output, refusals."""

from __future__ import annotations

import io
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.checkpoints import refusal
from support.engine import GREEDY, PROMPTS, idle, outputs_of
from support.naive import greedy

from minqwen import LLM, SamplingParams
from minqwen.engine import in_order
from minqwen.errors import MinqwenError
from minqwen.sampling.structured import StructuredOutputs


def test_a_completion_is_the_naive_loops(embedded, embedded_tokenizer):
    llm = LLM(embedded, dtype="float32", max_model_len=64)
    output = llm.generate("In the beginning", SamplingParams(temperature=0, max_tokens=12))[0]
    ids = embedded_tokenizer.encode("In the beginning")
    assert output.outputs[0].token_ids == greedy(llm.model, ids, 12)
    assert output.outputs[0].text == embedded_tokenizer.decode(output.outputs[0].token_ids)


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
    assert idle(llm)
    if prefix_caching and block_size == 7 and llm.core.pool.digest_bits == 256:
        assert all(o.num_cached_tokens for o in outputs if len(o.prompt_token_ids) > 7)


def test_logprobs_and_score_are_the_models(make, embedded_model, embedded_tokenizer):
    llm = make(embedded_model, embedded_tokenizer, max_num_batched_tokens=8, max_num_seqs=2)
    params = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=2, **GREEDY)
    out = llm.generate(PROMPTS[2], params, use_tqdm=False)[0]
    ids = out.prompt_token_ids + out.outputs[0].token_ids
    with torch.no_grad():
        truth = torch.log_softmax(embedded_model(torch.tensor([ids]))[0], -1)
    entries = out.prompt_logprobs[1:] + out.outputs[0].logprobs
    assert out.prompt_logprobs[0] is None and len(entries) == len(ids) - 1
    for at, entry in enumerate(entries):
        assert ids[at + 1] in entry
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(truth[at, token]), abs=1e-5)
            assert logprob.decoded_token in (None, llm.tokenizer.decode([token]))
    scores = llm.score([PROMPTS[2]])[0]
    want = [float(truth[i, ids[i + 1]]) for i in range(len(scores))]
    assert scores == pytest.approx(want, abs=1e-5)
    assert len(scores) == len(out.prompt_logprobs) - 1


def test_stream_stop_and_forced_ids(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)

    def complete(**options):
        return llm.generate(PROMPTS[0], SamplingParams(**options), use_tqdm=False)[0].outputs[0]

    whole = complete(max_tokens=24, **GREEDY)
    assert "".join(llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, **GREEDY))) == whole.text
    stop = whole.text[10:14]
    cut = complete(max_tokens=24, stop=stop, **GREEDY)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    forced = oracle[1][:5]
    out = complete(forced_ids=forced, logprobs=0)
    assert out.token_ids == forced and all(f in lp for f, lp in zip(forced, out.logprobs))
    token = whole.token_ids[3]
    out = complete(max_tokens=24, stop_token_ids=[token], **GREEDY)
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
    params = []
    for i, spec in enumerate(specs):
        structured = StructuredOutputs(**spec)
        params.append(
            SamplingParams(temperature=1.0, seed=i, max_tokens=120, structured_outputs=structured)
        )
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert all(o.finish_reason == "stop" for o in outputs)
    found = json.loads(outputs[0].text)
    assert set(found) == {"name", "age"} and type(found["age"]) is int
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", outputs[1].text) and outputs[2].text in ("yes", "no")


def test_prompts_in_every_form(make, embedded_model, embedded_tokenizer, oracle):
    llm = make(embedded_model, embedded_tokenizer)
    ids = [embedded_tokenizer.encode(p) for p in PROMPTS]
    params = SamplingParams(max_tokens=24, **GREEDY)

    def tokens(prompts):
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    array, tensor = np.array(ids[0]), torch.tensor(ids[0])
    forms = [PROMPTS[0], ids[0], tuple(ids[0]), array, tensor, list(array), array.astype("uint16")]
    for one in forms:
        assert tokens(one) == tokens([one]) == oracle[:1]
    assert tokens([ids[0], PROMPTS[1], torch.tensor(ids[2])]) == oracle
    assert tokens(p for p in PROMPTS) == tokens(tuple(PROMPTS)) == oracle
    assert tokens(np.stack([array, array])) == oracle[:1] * 2
    assert tokens(torch.stack([tensor, tensor])) == oracle[:1] * 2
    assert tokens([]) == tokens(()) == tokens(iter(())) == []
    out = llm.generate([array], params, use_tqdm=False)[0]
    assert out.prompt_token_ids == ids[0] and all(type(i) is int for i in out.prompt_token_ids)
    assert llm.score([]) == [] and llm.score([[5]]) == [[]]
    assert len(llm.score(ids[0])[0]) == len(ids[0]) - 1
    assert idle(llm)


@pytest.mark.parametrize(
    "prompts",
    [
        *([[]], "", [""], [[1], []], [[1], ""], 5, None, b"ab", [b"ab"]),
        *({"text": "x"}, [{"prompt": None}], {}, {"prompt": 5}, {"prompt": b"x"}, {1: 2}),
        *({"prompt": ""}, {"prompt_token_ids": "x"}, {"prompt_token_ids": []}, [None]),
        *([[1], 5], [[1, "a"]], [[True]], [[1.0]]),
        *([[-1]], [[2048]], [[10**6]], [[[1]]], [[1] * 256]),
        *(np.zeros((1, 2, 3), int), np.array([1.5]), torch.tensor(5)),
    ],
    ids=repr,
)
def test_a_prompt_that_is_none_is_refused_in_one_line_and_leaves_nothing(
    embedded_model, embedded_tokenizer, prompts
):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=256, num_blocks=400)
    refusal(lambda: llm.generate(prompts, use_tqdm=False), "prompt")
    assert idle(llm)


GOOD, TWO_PROMPTS = SamplingParams(max_tokens=2), [[1, 2], [3, 4]]
BAD_REGEX = StructuredOutputs(regex="((")


@pytest.mark.parametrize(
    "prompts, options",
    [
        (TWO_PROMPTS, {"sampling_params": [GOOD]}),
        (TWO_PROMPTS, {"sampling_params": [GOOD] * 3}),
        (TWO_PROMPTS, {"sampling_params": []}),
        (TWO_PROMPTS, {"sampling_params": [GOOD, {"temperature": 0}]}),
        (TWO_PROMPTS, {"sampling_params": {"temperature": 0}}),
        (TWO_PROMPTS, {"sampling_params": [GOOD, SamplingParams(forced_ids=[2048])]}),
        (TWO_PROMPTS, {"sampling_params": [GOOD, SamplingParams(structured_outputs=BAD_REGEX)]}),
        (TWO_PROMPTS, {"sampling_params": [GOOD, SamplingParams(n=2)], "trace": "*.resid_mid"}),
        (TWO_PROMPTS, {"trace": "nothing"}),
        (TWO_PROMPTS, {"cache_salt": 5}),
        ([*TWO_PROMPTS, [-1]], {}),
    ],
    ids=repr,
)
def test_refusals_leave_nothing_behind(embedded_model, embedded_tokenizer, prompts, options):
    llm = LLM(embedded_model, tokenizer=embedded_tokenizer, max_model_len=256, num_blocks=400)
    refusal(lambda: llm.generate(prompts, use_tqdm=False, **options))
    assert idle(llm) and llm.step() == []


def test_a_stream_is_one_completion(embedded_model):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=40)
    refusal(lambda: next(llm.stream([1], SamplingParams(n=2))), "n is more than 1")
    assert idle(llm) and llm.step() == []


def test_text_needs_a_tokenizer(embedded_model):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=40)
    refusal(lambda: llm.generate("In the beginning"), "needs a tokenizer")
    refusal(lambda: llm.chat([{"role": "user", "content": "Hello"}]), "needs a tokenizer")
    refusal(lambda: llm.generate([[1]], SamplingParams(bad_words=["x"])), "needs a tokenizer")
    assert llm.generate([[1, 2]], GOOD, use_tqdm=False)[0].outputs[0].text == "" and idle(llm)


def test_the_id_of_a_running_request_is_taken(embedded_model):
    llm = LLM(embedded_model, max_model_len=64, num_blocks=40)
    llm.add_request([1], request_id="a")
    for taken in ("a", 5):
        with pytest.raises(MinqwenError, match="request_id"):
            llm.add_request([2], request_id=taken)
    assert list(llm.core.requests) == ["a"] and len(llm.core.scheduler.waiting) == 1
    for request_id in ("a", "a", "never"):  # neither a second time nor without a request it fails
        llm.abort(request_id)
    assert idle(llm)


def test_ids_that_users_choose_do_not_meet_the_engines(embedded_model):
    llm = LLM(embedded_model, num_blocks=40, max_model_len=64, seed=0)
    for taken in ("1", "2", "3"):
        llm.add_request([1], SamplingParams(max_tokens=1), request_id=taken)
    mine = [llm.add_request([1], SamplingParams(max_tokens=1)) for _ in range(3)]
    assert len({"1", "2", "3", *mine}) == 6
    assert set(outputs_of(llm.step())) == {"1", "2", "3", *mine}


def test_the_progress_bar_counts_tokens_as_they_come(embedded_model, monkeypatch):
    """By a clock that stands at one second from the first step on, tokens per second are tokens."""
    shown: list[tuple[int, float]] = []
    counted: list[int] = []

    class Bar(in_order.tqdm):
        def __init__(self, *args, disable=None, **options):
            assert disable is None  # on a terminal
            super().__init__(*args, file=io.StringIO(), **options)

        def set_postfix_str(self, s="", refresh=True):
            shown.append((self.n, float(re.fullmatch(r"([0-9.]+) tokens/s", s)[1])))

    monkeypatch.setattr(in_order, "tqdm", Bar)
    clock = itertools.chain([0.0], itertools.repeat(1.0))
    monkeypatch.setattr(in_order, "time", SimpleNamespace(perf_counter=clock.__next__))
    llm = LLM(embedded_model, num_blocks=400, max_model_len=256, max_num_seqs=4, seed=0)
    step = llm.core.step

    def counting_step(*args):
        deltas = step(*args)
        counted.append(sum(len(delta.token_ids) for delta in deltas))
        return deltas

    monkeypatch.setattr(llm.core, "step", counting_step)
    llm.generate([[i] * 3 for i in range(8)], SamplingParams(max_tokens=40, ignore_eos=True, n=2))
    finished = [n for n, _ in shown]
    assert finished == sorted(finished) and any(0 < n < 8 for n in finished)
    assert [tokens for _, tokens in shown] == list(itertools.accumulate(counted))
    assert shown[0] == (0, counted[0]) and counted[0] > 0, "nothing to see before a request ends"
    assert shown[-1][1] == 8 * 2 * 40
