"""Endpoints of all kinds are asked for what they offer, and judged by it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support.audited import small_model_of_embedded_tokens, written
from support.openai_server import EVERYTHING, Engine, Scripted, served
from support.paths import EMBEDDED

from minqwen.errors import MinqwenError
from minqwen.lab.audit.client import Endpoint, Limits
from minqwen.lab.audit.endpoint import audit_endpoint
from minqwen.lab.audit.evidence import Original
from minqwen.lab.audit.questions import ask
from minqwen.lab.faults import FAULTS
from minqwen.model import Native


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("endpoint") / "model"
    return Original(written(path, *small_model_of_embedded_tokens(), EMBEDDED))


@pytest.fixture(scope="module")
def right(original):
    return original.right(torch.bfloat16, Native())


def asked(original, engine, **options):
    with served(engine) as url:
        return ask(Endpoint(url, **options), original)


def audited(original, engine, **options):
    with served(engine) as url:
        return audit_endpoint(Endpoint(url), original, **options)


def test_a_right_endpoint_agrees_and_a_wrong_one_is_named(original, right):
    report = audited(original, Engine(right, original.tokenizer))
    assert report.verdict == "agree" and 0.7 < report.units < 1.3, report.sentence
    assert report.offered == "completions with prompt_logprobs"
    assert any(note.startswith("chats: agrees") for note in report.notes)
    wrong = original.wrong(FAULTS["rope-backwards"], torch.bfloat16)
    report = audited(original, Engine(wrong, original.tokenizer))
    assert report.verdict == "diverge" and report.explained_by.name == "rope-backwards"


def test_it_asks_politely(original, right):
    engine = Engine(right, original.tokenizer)
    with served(engine) as url:
        ask(Endpoint(url), original)
        assert len(engine.requests) <= 8
        assert all(body["temperature"] == 0 for _, body, _ in engine.requests if body)
        assert {body["model"] for _, body, _ in engine.requests if body} == {"served"}
        with pytest.raises(MinqwenError, match="3 requests were made"):
            ask(Endpoint(url, limits=Limits(requests=3)), original)


WAYS = {
    "completions with prompt_logprobs": EVERYTHING,
    "completions with echo": EVERYTHING - {"prompt_logprobs"},
    "completions with logprobs": frozenset({"logprobs"}),
    "completions with greedy text alone": frozenset({"text"}),
    "": frozenset({"chat", "chat_logprobs"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_what_is_offered_is_found_out(original, right, way, with_ids):
    answers = asked(
        original, Engine(right, original.tokenizer, offers=WAYS[way], with_ids=with_ids)
    )
    if with_ids and "echo" in way:
        way = "completions with logprobs"  # llama.cpp, which has no echo
    assert answers.offered == way and not answers.prompts_differ
    records = answers.texts or answers.chats
    told = sum(len(record.entries) for record in records)
    assert told >= 100 if way != "completions with greedy text alone" else told == 0
    if "echo" in way or "prompt" in way:
        assert [len(record.ids) for record in records] == [150, 150]
    for record in records:  # what was said of each token is what the engine has for it
        table = right(torch.tensor([record.ids]))[0].float().log_softmax(-1)
        for position, token, logprob in record.entries[:20]:
            assert table[position - 1, token].item() == pytest.approx(logprob, abs=0.05)


def test_what_an_endpoint_writes_itself_shows_a_mistake_too(original, right):
    way = "completions with logprobs"
    report = audited(original, Engine(right, original.tokenizer, offers=WAYS[way]))
    assert report.verdict == "agree", report.sentence
    wrong = original.wrong(FAULTS["gate-up-exchanged"], torch.bfloat16)
    report = audited(original, Engine(wrong, original.tokenizer, offers=WAYS[way]))
    assert report.verdict == "diverge"
    assert report.explained_by.name == "gate-up-exchanged", report.sentence


def test_greedy_text_alone_is_no_alarm_where_it_has_other_tokens(original, right):
    """A random model writes texts that our tokenizer would never cut so."""
    engine = Engine(right, original.tokenizer, offers=WAYS["completions with greedy text alone"])
    report = audited(original, engine, among="none")
    assert report.verdict == "agree" and report.units is None, report.sentence
    assert report.offered == "completions with greedy text alone"


@pytest.mark.parametrize("name", ["system-prompt-of-qwen2", "bos-twice", "markers-as-text"])
def test_a_wrong_prompt_of_a_chat_is_named(original, right, name):
    encode = lambda messages: FAULTS[name].ids(original.tokenizer, messages)
    report = audited(original, Engine(right, original.tokenizer, chat_ids=encode))
    assert report.verdict == "diverge" and report.explained_by.name == name, report.sentence
    assert any("of texts the endpoint agrees" in note for note in report.notes)
    assert any("a chat has" in note for note in report.notes)


class OtherTokens:
    """A tokenizer that adds a token at the beginning of every text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, **options):
        return [7, *self.tokenizer.encode(text, **options)]


def test_another_tokenizer_is_told(original, right):
    engine = Engine(right, OtherTokens(original.tokenizer), offers=frozenset({"echo", "logprobs"}))
    report = audited(original, engine, among="none")
    assert report.verdict == "diverge" and "the prompt's tokens differ" in report.sentence
    assert any(re.match(r"a text has \d+ tokens there and \d+ here", n) for n in report.notes)


def choice(**fields):
    return json.dumps({"choices": [{"text": " x", **fields}]}).encode()


HOSTILE = {
    b"{}": "choices are None",
    b'{"choices": []}': "expected a list with an object",
    b'{"choices": [3]}': "expected a list with an object",
    choice(prompt_logprobs=[None]): "prompt_logprobs: 1 of them, expected 150",
    choice(prompt_logprobs=5): "prompt_logprobs: 5, expected 150",
    choice(prompt_logprobs=[{}] * 150): r"prompt_logprobs\[1\] is \{\}",
    choice(
        logprobs={"tokens": ["a"] * 9, "token_logprobs": [-1] * 9}
    ): "expected 150 of the prompt",
    choice(logprobs={"tokens": 3, "token_logprobs": [-1] * 9}): "expected a list with tokens",
    choice(logprobs={"tokens": ["a"] * 150, "token_logprobs": [float("nan")] * 150}): "is nan",
    choice(logprobs={"tokens": ["a"] * 150, "token_logprobs": [0.5] * 150}): "at most 0",
    choice(logprobs={"tokens": ["a"] * 150, "token_logprobs": ["x"] * 150}): "expected a log",
    choice(logprobs={"content": 3}): "expected a list",
    choice(logprobs={"content": [{"token": "nowhere-to-be-found", "logprob": -1}]}): "no token of",
    choice(logprobs={"content": [{"id": 9, "logprob": None}]}): "expected a log probability",
    choice(
        logprobs={"content": [{"id": 9, "logprob": -1, "top_logprobs": 4}]}
    ): "top_logprobs is 4",
    choice(text=None): "the text is None",
    choice(token_ids="x"): "expected a list of token ids",
}


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: HOSTILE[body][:30])
def test_what_a_broken_endpoint_says_is_refused_in_one_line(original, body):
    with served((200, {}, body), Scripted) as url:
        with pytest.raises(MinqwenError, match=HOSTILE[body]) as caught:
            ask(Endpoint(url), original, name="x")
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_offers_nothing_is_refused(original):
    with served((404, {}, b"no"), Scripted) as url:
        with pytest.raises(MinqwenError, match="offers neither completions nor chats"):
            ask(Endpoint(url), original)


def test_a_model_without_a_tokenizer_cannot_ask(original, tmp_path):
    bare = Original(written(tmp_path / "bare", original.config, original.weights))
    with pytest.raises(MinqwenError, match="no tokenizer"):
        ask(Endpoint("http://127.0.0.1:9"), bare)
