"""Steps as a GPU runs them, over static buffers: the same tokens as without."""

from __future__ import annotations

import pytest
import torch
from support.compiled import CONFIG, compiled_steps, engine, model_as_on_a_gpu
from support.engine import idle
from support.ranks import on_ranks

from minqwen import LLM, SamplingParams
from minqwen.engine.buffers import Buffers, ladder
from minqwen.engine.graphs import steps_of
from minqwen.errors import MinqwenError
from minqwen.lab.shapes import random_model
from minqwen.model import steps

PROMPTS = [list(range(5, 5 + n)) for n in (1, 7, 16, 33, 50)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True)


def told(outputs):
    """Tokens, and their logprobs, of every completion."""
    return [
        ([*choice.token_ids], [max(x.logprob for x in e.values()) for e in choice.logprobs])
        for output in outputs
        for choice in output.outputs
    ]


def assert_same(found, expected):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, one), (_, other) in zip(found, expected):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def model():
    return model_as_on_a_gpu()


@pytest.fixture
def made(monkeypatch):
    return compiled_steps(monkeypatch)


def test_ragged_and_preempted_requests_have_the_tokens_of_an_eager_engine(model, made):
    expected = told(engine(model, eager=True).generate(PROMPTS, GREEDY, use_tqdm=False))
    assert not made
    llm = engine(model)
    assert_same(told(llm.generate(PROMPTS, GREEDY, use_tqdm=False)), expected)
    assert llm.core.scheduler.num_preemptions and idle(llm)
    assert made[-1].checked == {0, 1, 2, 4} and llm.core.runner.steps is made[-1]


def test_shared_prefixes_and_several_samples_have_the_tokens_of_an_eager_engine(model, made):
    prompts = [PROMPTS[4] + [i] for i in range(3)]
    params = SamplingParams(n=2, seed=3, max_tokens=12, logprobs=1, ignore_eos=True)
    many = {"num_blocks": 60, "max_num_seqs": 6}
    expected = told(engine(model, eager=True, **many).generate(prompts, params, use_tqdm=False))
    assert_same(told(engine(model, **many).generate(prompts, params, use_tqdm=False)), expected)


def test_logprobs_of_the_prompt_are_those_of_an_eager_engine(model, made):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (one,), (other,) = (
        engine(model, eager=eager).generate([PROMPTS[4]], params, use_tqdm=False)
        for eager in (True, False)
    )
    found, expected = (
        [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        for output in (other, one)
    )
    assert len(found) == 49 and found == pytest.approx(expected, abs=1e-5)


def test_a_hook_is_called_and_the_step_goes_through_the_modules(model, made):
    llm, seen = engine(model), []
    llm.generate(
        [[1, 2, 3]],
        SamplingParams(max_tokens=2, ignore_eos=True),
        hooks=[("layers.0.mlp.out", lambda x, name: seen.append(x.shape[1]))],
        use_tqdm=False,
    )
    assert seen == [3, 1] and made[-1].checked == set()
    handle = model.register_forward_hook(lambda *_: seen.append("module"))
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    handle.remove()
    assert seen[2:] == ["module", "module"] and made[-1].checked == set()
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert made[-1].checked == {0, 1}


def test_what_an_earlier_request_left_in_a_block_is_not_seen(model, made):
    llm = engine(model)
    expected = told(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    llm.reset_prefix_cache()
    llm.core.runner.cache.pool.fill_(float("nan"))
    assert_same(told(llm.generate(PROMPTS, GREEDY, use_tqdm=False)), expected)


def test_weights_that_were_replaced_count_from_the_next_step_on(model, made):
    other = model_as_on_a_gpu(config=CONFIG.replace(rms_norm_eps=0.01))
    llm = engine(other)
    before = told(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False))
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-3)
    found = told(llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False))
    assert found != before
    expected = engine(other, eager=True).generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    assert_same(found, told(expected))


@pytest.mark.parametrize("wrong", ["raises", "other numbers"])
def test_steps_that_do_not_work_give_way_to_the_model_itself(model, made, monkeypatch, wrong):
    expected = told(engine(model, eager=True).generate(PROMPTS, GREEDY, use_tqdm=False))

    def broken(ops, shape, x, delta, layer):
        if wrong == "raises":
            raise RuntimeError("no compiler here\nand more")
        return x, 0 * x

    monkeypatch.setattr(steps, "mlp", broken)
    llm = engine(model)
    with pytest.warns(UserWarning, match="steps are not compiled or captured from now on") as said:
        found = told(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert_same(found, expected)
    assert llm.core.runner.steps is None and llm.core.runner.why_eager


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "the model is on cpu"),
        ({"arithmetic": "native"}, "for fast and exact arithmetic, and this is native"),
        ({"dtype": torch.float32}, "the model is in torch.float32"),
        ({"kv_dtype": "int8"}, "the cache holds 8 bits"),
        ({"block_size": 24}, "block_size is 24: use a power of two from 16 on"),
        ({"changed": True}, "changed since they were prepared"),
    ],
)
def test_why_steps_are_not_compiled_is_said(monkeypatch, change, reason):
    small = random_model(
        CONFIG,
        dtype=change.get("dtype", torch.bfloat16),
        arithmetic=change.get("arithmetic", "fast"),
    )
    cache = small.new_cache(2, change.get("block_size", 16), change.get("kv_dtype", "auto"))
    if change:
        monkeypatch.setattr(type(small), "device", torch.device("cuda"))
    with pytest.raises(MinqwenError, match=reason):
        steps_of(small, cache, 32, 1)


def test_an_engine_says_so_in_one_line_when_its_steps_are_not_compiled(model):
    llm = LLM(model, max_model_len=32, num_blocks=4, enforce_eager=False)
    with pytest.warns(UserWarning, match="not compiled .*: that is for GPUs, .* on cpu$") as said:
        llm.generate(PROMPTS[:2], SamplingParams(max_tokens=3), use_tqdm=False)
    assert len(said) == 1 and "on cpu" in llm.core.runner.why_eager


def test_two_ranks_have_the_tokens_of_one(made, model):
    def run(mesh):
        llm = engine(model_as_on_a_gpu(mesh))
        found = told(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        assert llm.core.runner.steps is not None and llm.core.runner.steps.checked
        return found

    expected = told(engine(model, eager=True).generate(PROMPTS, GREEDY, use_tqdm=False))
    for found in on_ranks(2, run):
        assert_same(found, expected)


def test_the_ladder_goes_up_by_twos_and_its_last_size_is_enough():
    assert [ladder(n) for n in (1, 2, 3, 64)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16, 32, 64]]


def test_a_table_row_is_sent_when_its_blocks_have_changed():
    buffers = Buffers(2, 4, 16, torch.device("cpu"))
    assert buffers.put(0, [7, 3]) and not buffers.put(0, [7, 3])
    assert buffers.put(0, [7, 3, 5]) and buffers.tables_here[0].tolist() == [7, 3, 5, 0]
    assert buffers.put(0, [2]) and buffers.tables_here[0, 0] == 2
