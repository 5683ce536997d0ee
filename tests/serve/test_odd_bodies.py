"""Whatever a client sends, it is served or told which field is wrong; others do not notice it."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import ValidationError
from support.serving import engine

from minqwen import LLM, Qwen2
from minqwen.lab.request_fuzz import SOUND, TEMPLATE, Asgi, ask, complaint, fuzz, nested
from minqwen.serve.app import make_app
from minqwen.serve.requests import ChatRequest, CompletionRequest, TokenizeRequest
from minqwen.serve.service import Service

ODD = {
    **{str(value): value for value in (0, -1, 1.5, 1e39, 2**62, 2**63, 10**400)},
    **{str(value): value for value in (math.nan, math.inf, True, None)},
    **{"text": "1", "empty": "", "half a pair": "\ud800", "list": [], "object": {}},
    **{"many": ["x"] * 10_000, "long": "x" * 2000, "deep": nested(300), "ids": [2**63, -1]},
}
BODIES = [
    ("/v1/completions", CompletionRequest, {"prompt": "a", "max_tokens": 1}),
    ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    ("/tokenize", TokenizeRequest, {"prompt": "a"}),
]
FIELDS = [(path, name, body) for path, kind, body in BODIES for name in kind.model_fields]


@pytest.fixture(scope="module")
def llm(embedded, embedded_tokenizer) -> LLM:
    model = Qwen2.from_pretrained(embedded, dtype="float32", arithmetic="exact")
    return engine(model, embedded_tokenizer, max_model_len=32)


@pytest.fixture(scope="module")
def run(llm):
    """Runs what asks an application that is served here."""
    service = Service(llm, "odd")
    stepping = threading.Thread(target=service.loop.run)
    stepping.start()
    app: Asgi = make_app(service)
    yield lambda work: asyncio.run(work(app))
    service.loop.end()
    stepping.join()


def send(run: Callable[..., Any], path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, answer = run(lambda app: ask(app, path, json.dumps(body).encode()))
    assert complaint(status, answer) is None, answer
    return status, json.loads(answer) if status != 200 or not body.get("stream") else {}


@pytest.mark.parametrize(("path", "name", "body"), FIELDS)
def test_every_field_takes_a_value_or_is_named(run, path, name, body):
    async def all_values(app: Asgi) -> list[tuple[int, bytes]]:
        bodies = [json.dumps({"max_tokens": 1, **body, name: value}) for value in ODD.values()]
        if path == "/tokenize":
            bodies = [json.dumps({**body, name: value}) for value in ODD.values()]
        asked: list[Awaitable[tuple[int, bytes]]] = [ask(app, path, b.encode()) for b in bodies]
        return await asyncio.gather(*asked)

    for value, (status, answer) in zip(ODD, run(all_values)):
        assert complaint(status, answer) is None, (value, answer)
        assert status in (200, 400, 404), (value, answer)
        if status == 400:
            error = json.loads(answer)["error"]
            told = f"{error['param']} {error['message']}"
            assert name in told, told


MANY = {
    "texts": ["x"] * 1000,
    "numbers": [1.5] * 1000,
    "lists": [["x"] * 1000] * 1000,
    "mixed": [1, "x"] * 1000,
    "objects": [{}] * 1000,
    "names": {str(i): "x" for i in range(1000)},
    "nested": [{"role": "user", "content": [{}] * 1000, "tool_calls": [1] * 1000}],
}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest])
def test_of_a_thousand_mistakes_the_first_ones_are_looked_for(kind):
    """Each costs a kilobyte and some microseconds, and a body has room for millions."""
    bodies = [{name: value} for name in kind.model_fields for value in MANY.values()]
    bodies += [{f"unknown {i}": 1 for i in range(1000)}]
    bodies += [{"structured_outputs": {"choice": [1] * 1000, **bodies[-1]}}]
    counts = []
    for body in bodies:
        try:
            kind.model_validate(body)
        except ValidationError as error:
            counts.append(error.error_count())
    assert len(counts) > 60 and max(counts) < 10


def test_a_mistake_among_many_names_is_told(run):
    body = {"prompt": "a", "max_tokens": 1, "logit_bias": {"1": 0, "2": "x", "3": None}}
    status, answer = send(run, "/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, "logit_bias")
    assert answer["error"]["message"] == "logit_bias: 2: Input should be a valid number"
    half = {**body, "logit_bias": {"\ud800" * 50: "x"}}
    assert send(run, "/v1/completions", half)[1]["error"]["param"] == "logit_bias"
    strangers = {"prompt": "a", "one": 1, "two": 2, "\ud800": 3}
    assert "'one'" in str(send(run, "/v1/completions", strangers))
    assert send(run, "/v1/completions", {**body, "logit_bias": {"1": 0, "2": -1.5}})[0] == 200


IDS = [-1, 2**31, 2**63, True, 1.5, "1", None]


@pytest.mark.parametrize("id", [*IDS, "size"])
def test_an_id_is_one_of_the_vocabulary_or_the_field_is_named(run, llm, id):
    size = llm.config.vocab_size
    wrong = size if id == "size" else id
    body = {"prompt": "a", "max_tokens": 1}
    cases = {"prompt": [1, wrong], "stop_token_ids": [wrong], "logit_bias": {str(wrong): 1}}
    if wrong == "1":
        del cases["logit_bias"]  # a key of JSON is text
    for name, value in cases.items():
        status, answer = send(run, "/v1/completions", {**body, name: value})
        assert status == 400 and name in str(answer), answer
    for name, value in {"prompt": [1, size - 1], "stop_token_ids": [size - 1]}.items():
        assert send(run, "/v1/completions", {**body, name: value})[0] == 200


def test_odd_but_allowed_requests_change_nothing_for_others(run, llm):
    """In exact arithmetic, in every bit: what they are answered beside odd requests and alone."""
    plain = {"prompt": "In the beginning", "max_tokens": 10, "temperature": 0, "logprobs": 5}
    odd = [
        {"temperature": 1e39, "min_tokens": 5},
        {"temperature": 1e39, "structured_outputs": {"regex": "[0-9]{6}"}},
        {"logit_bias": {"3": -100, "4": 100}, "top_p": 5e-324, "seed": 2**63},
        {"repetition_penalty": 1e300, "top_k": 2**62, "min_p": 1},
        {"stop": ["\ud7ff"] * 32, "n": 3, "presence_penalty": -2},
        {"temperature": -1},
        {"structured_outputs": {"regex": "(a{1000}){1000}"}},
    ]

    async def beside(app: Asgi) -> list[tuple[int, bytes]]:
        bodies = [plain, *({"prompt": "a", "max_tokens": 8, **fields} for fields in odd), plain]
        asked = [ask(app, "/v1/completions", json.dumps(b).encode()) for b in bodies]
        return await asyncio.gather(*asked)

    alone = send(run, "/v1/completions", plain)[1]["choices"]
    answers = run(beside)
    assert [status for status, _ in answers] == [200] * 6 + [400, 400, 200]
    for _, answer in (answers[0], answers[-1]):
        assert json.loads(answer)["choices"] == alone


def test_mutated_requests_are_answered_and_leave_nothing_behind(run, llm, monkeypatch):
    """A share of benchmarks/fuzz_requests.py."""
    monkeypatch.setitem(llm.tokenizer.chat_templates, "default", TEMPLATE)
    outcome = run(lambda app: fuzz(app, range(150)))
    assert not outcome.wrong, outcome.wrong
    assert outcome.statuses[200] > 10 and outcome.statuses[400] > 80
    for path, body in SOUND:
        if "tools" not in body:  # whose prompt is longer
            assert send(run, path, body)[0] == 200, body
    pool = llm.core.pool
    assert not llm.core.requests and pool.num_free == pool.num_blocks
