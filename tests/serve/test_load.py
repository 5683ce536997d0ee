"""benchmarks/load.py, cut down: a crowd of clients, some of whom go away."""

from __future__ import annotations

import asyncio
import math
import runpy
from types import SimpleNamespace

import psutil
import pytest
from support.audited import small_model_of_embedded_tokens
from support.paths import ROOT
from support.serving import engine, served

from minqwen import Qwen2
from minqwen.serve.limits import Limits

load = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "load.py")))
COUNT = 40


@pytest.fixture(scope="module")
def exact(embedded_tokenizer):
    """A small model that knows nothing."""
    config, weights = small_model_of_embedded_tokens()
    config = config.replace(eos_token_id=(embedded_tokenizer.token_to_id("<|im_end|>"),))
    return Qwen2.from_tensors(config, lambda name, shard: weights[name], arithmetic="exact")


@pytest.fixture(scope="module")
def asks(embedded_tokenizer):
    return load.make_asks(COUNT, embedded_tokenizer, seed=2)


@pytest.fixture(scope="module")
def solo(exact, embedded_tokenizer, asks):
    alone = {**load.OPTIONS, "num_blocks": 200, "enable_prefix_caching": False}
    llm = engine(exact, embedded_tokenizer, **alone)
    return [load.alone(llm, ask) for ask in asks]


def test_who_stays_gets_what_he_gets_alone_and_nothing_is_left(
    exact, embedded_tokenizer, asks, solo
):
    llm = engine(exact, embedded_tokenizer, **{**load.OPTIONS, "num_blocks": load.BLOCKS})
    process = psutil.Process()
    with served(llm, Limits(requests=COUNT)) as running:
        asyncio.run(load.one_by_one(running.url, asks[:3]))
        before = load.settled(running.url, process)
        outcomes = asyncio.run(load.Crowd(asks, seed=1).come(running.url))
        after = load.settled(running.url, process, before)
    assert load.differing(asks, outcomes, solo) == []
    assert load.left_over(before, after) == []
    answered = [outcome for outcome in outcomes if isinstance(outcome, load.Answer)]
    assert COUNT * 0.8 <= len(answered) < COUNT
    assert after.preemptions > 10 and after.dropped > 0
    assert any(len(answer.choices) > 1 for answer in answered)
    assert any('"king"' in answer.choices[0].text for answer in answered)


def test_the_last_bit_of_a_logprob_counts(asks, solo):
    assert load.differing(asks, solo, solo) == []
    place = next(i for i, answer in enumerate(solo) if answer.choices[0].tops)
    other = [*solo]
    choice = solo[place].choices[0]
    last = {name: math.nextafter(value, 0) for name, value in choice.tops[-1].items()}
    choice = choice._replace(tops=[*choice.tops[:-1], last])
    other[place] = solo[place]._replace(choices=[choice, *solo[place].choices[1:]])
    (said,) = load.differing(asks, other, solo)
    assert said.startswith(f"request {place} ")


@pytest.mark.parametrize("outcome", ["500: a fault", "a stream had no end"])
def test_a_failure_is_no_client_that_went_away(asks, solo, outcome):
    assert len(load.differing(asks[:1], [outcome], solo[:1])) == 1


def test_what_is_left_is_seen():
    clean = load.State(*[0] * 6, descriptors=9, threads=5, processes=1, megabytes=100)
    assert load.left_over(clean, clean._replace(preemptions=7, threads=12)) == []
    for leak in (
        {"open": 1},
        {"running": 1},
        {"waiting": 1},
        {"blocks_used": 0.03},
        {"descriptors": 10},
        {"threads": 46},
        {"processes": 2},
    ):
        assert len(load.left_over(clean, clean._replace(**leak))) == 1, leak


def test_growth_is_counted_after_the_first_waves():
    assert load.growth([100]) == load.growth([90, 100]) == 0
    assert load.growth([50, 100, 101]) == pytest.approx(0.01)
    flat = [50] * 10 + [100] * 90
    assert load.growth(flat) == 0
    assert load.growth([*flat[:91], *[103] * 9]) == pytest.approx(0.03)
