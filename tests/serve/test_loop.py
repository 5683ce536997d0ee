"""Many clients on one engine: who has gone frees its blocks, who waits too long is told."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support.engine import GREEDY, PROMPTS, idle
from support.serving import NAME, Gate, engine, eventually, served

from minqwen import SamplingParams
from minqwen.sampling.structured import StructuredOutputs
from minqwen.serve.app import advances
from minqwen.serve.errors import ApiError
from minqwen.serve.limits import Limits
from minqwen.serve.loop import EngineLoop
from minqwen.serve.orders import Job, Orders
from minqwen.serve.reports import Accepted, Begun, Failed
from minqwen.serve.service import Service


class Heard(list):
    """A listener that keeps what it is told."""

    def __call__(self, event) -> None:
        self.append(event)


@pytest.fixture
def small(embedded_model, embedded_tokenizer):
    """An engine of its own, with few blocks."""
    return engine(embedded_model, embedded_tokenizer, num_blocks=40, max_num_seqs=2)


def job(name: str, tokenizer, prompt=PROMPTS[0], **params) -> Job:
    return Job(name, tokenizer.encode(prompt), SamplingParams(**{**GREEDY, **params}))


def test_jobs_of_many_share_the_steps(small, oracle, embedded_tokenizer):
    loop, heard = EngineLoop(small), [Heard() for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        loop.submit(job(str(i), embedded_tokenizer, prompt, max_tokens=5), heard[i])
    stepping = threading.Thread(target=loop.run)
    stepping.start()
    eventually(lambda: all(own and getattr(own[-1], "output", None) for own in heard))
    loop.end()
    stepping.join()
    expected = oracle.generate(PROMPTS, SamplingParams(**GREEDY, max_tokens=5), use_tqdm=False)
    for own, output in zip(heard, expected):
        assert isinstance(own[0], Accepted) and isinstance(own[1], Begun)
        assert own[-1].output.outputs[0].token_ids == output.outputs[0].token_ids
    assert idle(small)


def test_an_abort_frees_the_blocks_at_the_next_step(small, embedded_tokenizer):
    loop, heard = EngineLoop(small), Heard()
    loop.submit(job("a", embedded_tokenizer, max_tokens=100), heard)
    stepping = threading.Thread(target=loop.run)
    stepping.start()
    eventually(lambda: len(heard) > 3)
    loop.abort("a", ApiError(503, "gone"))
    eventually(lambda: isinstance(heard[-1], Failed))
    loop.ping(loop.end)
    stepping.join()
    assert idle(small)


def test_what_the_engine_refuses_is_that_jobs_alone(small, embedded_tokenizer):
    loop, bad, good = EngineLoop(small), Heard(), Heard()
    loop.submit(job("bad", embedded_tokenizer, logit_bias={5000: 1}), bad)
    loop.submit(job("good", embedded_tokenizer, max_tokens=1), good)
    stepping = threading.Thread(target=loop.run)
    stepping.start()
    eventually(lambda: good and getattr(good[-1], "output", None))
    loop.end()
    stepping.join()
    (failed,) = bad
    assert failed.error.status == 400 and "5000" in failed.error.message


def test_who_waits_too_long_for_a_step_is_told(small, embedded_tokenizer):
    """Two run, the third waits; the clock jumps once it does."""
    now = [0.0]
    loop = EngineLoop(small, queue_seconds=3600, clock=lambda: now[0])
    heard = [Heard() for _ in range(3)]
    for i in range(3):
        loop.submit(job(str(i), embedded_tokenizer, max_tokens=60), heard[i])
    stepping = threading.Thread(target=loop.run)
    stepping.start()
    eventually(lambda: len(heard[0]) > 3)
    now[0] += 7200
    eventually(lambda: isinstance(heard[2][-1], Failed))
    loop.end()
    stepping.join()
    assert heard[2][-1].error.status == 503 and heard[2][-1].error.code == "queue_timeout"
    assert not any(isinstance(event, Failed) for event in heard[0][:-1])


def test_a_step_that_fails_ends_its_requests_and_later_ones_are_served(
    small, embedded_tokenizer, monkeypatch, capfd
):
    loop, first, second = EngineLoop(small), Heard(), Heard()
    step, failures = small.step, [RuntimeError("a fault in /somewhere/else.py")]

    def failing_step():
        if failures and small.has_unfinished_requests:
            raise failures.pop()
        return step()

    monkeypatch.setattr(small, "step", failing_step)
    loop.submit(job("a", embedded_tokenizer, max_tokens=2), first)
    stepping = threading.Thread(target=loop.run)
    stepping.start()
    eventually(lambda: first and isinstance(first[-1], Failed))
    loop.submit(job("b", embedded_tokenizer, max_tokens=2), second)
    eventually(lambda: second and getattr(second[-1], "output", None))
    loop.end()
    stepping.join()
    assert first[-1].error.status == 500 and "somewhere" not in first[-1].error.message
    assert "a fault in" in capfd.readouterr().err


def test_orders_come_back_from_bytes_as_they_were():
    params = SamplingParams(logit_bias={3: 0.1}, stop=["a"], seed=2**64 - 1)
    grammar = SamplingParams(structured_outputs=StructuredOutputs(choice=["a", "b"]), top_p=1 / 3)
    orders = Orders([Job("a", [1, 2], params, "salt"), Job("b", [3], grammar)], ["c"])
    assert Orders.from_bytes(orders.to_bytes()) == orders


# ---- over HTTP ----------------------------------------------------------------------------------


def test_a_client_that_goes_away_frees_its_blocks(small, monkeypatch):
    """In the midst of a stream, and while it waits for a whole answer."""
    gate = Gate(small, monkeypatch)
    asked = {"model": NAME, "prompt": "And", "max_tokens": 100, "ignore_eos": True}
    with served(small) as running, running.http() as http:
        gate.let(1)
        with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as response:
            next(response.iter_lines())
        eventually(lambda: not running.service.front.open)
        gate.let(1)  # the step that it may be in; before the next one the request is dropped
        eventually(lambda: idle(small))
        with pytest.raises(httpx.ReadTimeout):
            quick = httpx.Timeout(120, read=0.5)
            http.post("/v1/completions", json={**asked, "n": 4}, timeout=quick)
        eventually(lambda: not running.service.front.open)
        gate.let(1)
        eventually(lambda: idle(small))


def test_too_many_at_a_time_are_told_to_come_again(small, monkeypatch):
    gate = Gate(small, monkeypatch)
    with served(small, Limits(requests=2)) as running, ThreadPoolExecutor() as pool:
        two = {"prompt": ["And", "The"], "max_tokens": 1}
        first = pool.submit(running.post, "/v1/completions", **two)
        eventually(lambda: running.service.front.open)
        refused = running.post("/v1/completions", prompt="In", max_tokens=1)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        gate.let(100)
        assert first.result().status_code == 200
        assert running.post("/v1/completions", prompt="In", max_tokens=1).status_code == 200


def test_health_is_that_the_loop_goes_on(small):
    service = Service(small, NAME)

    async def answer() -> int:
        try:
            await advances(service, 0.05)
            return 200
        except ApiError as error:
            return error.status

    assert asyncio.run(answer()) == 503  # nobody steps
    with served(small) as running, running.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
    service.loop.ended = True
    assert asyncio.run(answer()) == 503
