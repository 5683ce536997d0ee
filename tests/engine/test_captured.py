"""Steps of exact arithmetic over static buffers and padded contexts: every bit as without."""

from __future__ import annotations

import pytest
import torch
from support.compiled import CONFIG, compiled_steps, engine
from support.engine import idle
from support.ranks import on_ranks

from minqwen import SamplingParams
from minqwen.engine import captured
from minqwen.engine.captured import CapturedModel
from minqwen.lab.shapes import random_model
from minqwen.parallel import SINGLE

PROMPTS = [list(range(5, 5 + n)) for n in (1, 7, 16, 33, 50)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True)


def exact(dtype=torch.float32, mesh=SINGLE):
    return random_model(CONFIG, dtype=dtype, arithmetic="exact", mesh=mesh)


def told(outputs):
    """Tokens, and their logprobs in every bit, of every completion."""
    return [
        [(token, entry[token].logprob) for token, entry in zip(choice.token_ids, choice.logprobs)]
        for output in outputs
        for choice in output.outputs
    ]


@pytest.fixture(scope="module")
def model():
    return exact()


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(captured, "SHORTEST", 32)
    return compiled_steps(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_and_preempted_requests_have_the_bits_of_an_eager_engine(made, dtype):
    own = exact(dtype)
    expected = told(engine(own, eager=True).generate(PROMPTS, GREEDY, use_tqdm=False))
    assert not made
    llm = engine(own)
    assert told(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert llm.core.scheduler.num_preemptions and idle(llm)
    assert isinstance(made[-1], CapturedModel) and llm.core.runner.steps is made[-1]
    assert {(1, 64), (2, 64), (4, 64), (1, 128)} <= made[-1].checked


def test_what_lies_in_the_blocks_beyond_a_context_is_not_seen(made, model):
    llm = engine(model)
    expected = told(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    llm.reset_prefix_cache()
    llm.core.runner.cache.pool.fill_(float("nan"))
    assert told(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert llm.core.runner.steps is not None


def test_the_longest_context_has_a_size_of_its_own(made, model):
    llm = engine(model, max_model_len=150)
    params = SamplingParams(temperature=0, max_tokens=149, logprobs=1, ignore_eos=True)
    found = told(llm.generate(PROMPTS[:1], params, use_tqdm=False))
    assert len(found[0]) == 149 and made[-1].checked == {(1, n) for n in (32, 64, 128, 150)}
    small = engine(model, eager=True, max_model_len=150)
    assert found == told(small.generate(PROMPTS[:1], params, use_tqdm=False))


def test_two_ranks_have_the_bits_of_one(made, model):
    def run(mesh):
        llm = engine(exact(mesh=mesh))
        found = told(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        assert llm.core.runner.steps is not None and llm.core.runner.steps.checked
        return found

    expected = told(engine(model, eager=True).generate(PROMPTS, GREEDY, use_tqdm=False))
    assert on_ranks(2, run) == [expected, expected]


@pytest.mark.parametrize("why", ["1 of 1024 captured logits differ", "CUDA out of memory"])
def test_a_graph_that_differs_in_one_bit_or_has_no_room_gives_way(made, model, monkeypatch, why):
    expected = told(engine(model, eager=True).generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    decode = CapturedModel.decode
    up = torch.tensor(float("inf"))

    def wrong(self, step, size):
        logits = decode(self, step, size)
        logits[0, 7] = torch.nextafter(logits[0, 7], up)
        return logits

    def without_memory(self, step, size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(
        CapturedModel, "decode", wrong if why.startswith("1 of") else without_memory
    )
    llm = engine(model)
    with pytest.warns(UserWarning, match=why):
        assert told(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == expected
    assert llm.core.runner.steps is None
