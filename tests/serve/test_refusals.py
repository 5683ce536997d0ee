"""Whatever a client sends, it gets one line in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json

import openai
import pytest
from support.serving import NAME, served

from minqwen.serve.errors import without_paths
from minqwen.serve.limits import Limits


def refused(response, status: int) -> str:
    """The message of a refusal."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "empty"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": 5}, "expected text"),
        ({"prompt": [1, "a"]}, "expected text"),
        ({"prompt": [1.5]}, "expected text"),
        ({"prompt": [True]}, "expected text"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [2**63]}, "token id 9223372036854775808"),
        ({"prompt": "a " * 400}, "shorten it"),
        ({"prompt": "a", "max_tokens": 0}, "for echo"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "a", "n": 10**6}, "at most 128"),
        ({"prompt": "a", "logprobs": 21}, "0 to 20"),
        ({"prompt": "a", "logprobs": -1}, "0 to 20"),
        ({"prompt": "a", "best_of": 4}, "no beam search"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stop": ["x"] * 33}, "at most 32"),
        ({"prompt": "a", "stop": "x" * 1001}, "at most 1000"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "logit_bias": {"1" * 30: 1}}, "token ids"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": "a", "seed": 2**65}, "seed"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "a", "guided_json": {}}, "StructuredOutputs"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "regex"),
        ({"prompt": "a", "structured_outputs": {"regex": "a" * 70_000}}, "65536"),
        ({"prompt": "a", "chat_template": "x"}, "the model's own"),
    ],
)
def test_a_field_that_cannot_be(server, fields, said):
    assert said in refused(server.post("/v1/completions", **fields), 400)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"prompt": "a \\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", 400),
        (b"", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 400),
    ],
)
def test_a_body_that_is_no_request(server, body, kind, status):
    with server.http() as http:
        response = http.post("/v1/completions", content=body, headers={"content-type": kind})
    refused(response, status)


def test_addresses_that_are_not_there(server):
    with server.http() as http:
        refused(http.get("/v1/nothing"), 404)
        refused(http.get("/v1/completions"), 405)
        assert "'other'" in refused(http.get("/v1/models/other"), 404)
    assert "only 'small'" in refused(server.post("/v1/completions", prompt="a", model="b"), 404)


def test_the_model_is_listed(client, llm):
    (model,) = client.models.list().data
    assert model.id == NAME == client.models.retrieve(NAME).id
    assert model.max_model_len == 128
    assert model.default_sampling_params["top_p"] == llm.defaults.top_p


def test_with_a_key_only_those_who_have_it_are_served(llm):
    with served(llm, api_key="s\u00e9same") as running:
        refused(running.post("/v1/completions", prompt="a"), 401)
        with running.http() as http:
            refused(http.get("/metrics"), 401)
            assert http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            running.client("other").models.list()
        headers = {"Authorization": "Bearer s\u00e9same".encode()}
        with running.http() as http:
            assert http.get("/v1/models", headers=headers).status_code == 200


def test_a_page_of_a_browser_cannot_ask_under_its_own_name(server):
    with server.http() as http:
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400
        assert http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_a_body_that_is_too_large(llm):
    with served(llm, Limits(body_bytes=100)) as running, running.http() as http:
        assert "100 bytes" in refused(running.post("/tokenize", prompt="a" * 100), 413)

        def pieces():
            yield from [b"a" * 60] * 2

        kind = {"content-type": "application/json"}
        assert "100 bytes" in refused(http.post("/tokenize", content=pieces(), headers=kind), 413)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/7b/config.json: bad", "config.json: bad"),
        ("IndexError: x (/usr/lib/python3/core.py:12)", "IndexError: x"),
        ("~/.cache/x: no", "x: no"),
        ("structured_outputs.json#/properties/age: bad", None),
        ("and/or 1/2", None),
    ],
)
def test_no_error_names_a_directory_of_this_machine(text, shown):
    assert without_paths(text) == (text if shown is None else shown)


def test_a_chat_that_the_template_refuses_names_no_directory(server, embedded):
    fields = {"messages": [{"role": "user", "content": {}}]}
    refused(server.post("/v1/chat/completions", **fields), 400)
    message = refused(server.post("/v1/chat/completions", messages=[]), 400)
    assert str(embedded.parent) not in message
    message = refused(server.post("/v1/chat/completions", messages=[{"role": "user"}]), 400)
    assert str(embedded.parent) not in message and "/" not in message


# ---- tokens -------------------------------------------------------------------------------------


def test_text_becomes_tokens_and_text_again(server, embedded_tokenizer):
    found = server.post("/tokenize", prompt="And God said", return_token_strs=True).json()
    assert found["tokens"] == embedded_tokenizer.encode("And God said")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 128
    back = server.post("/detokenize", tokens=found["tokens"]).json()
    assert back == {"prompt": "And God said"}
    asked = {"tokens": found["tokens"], "return_token_bytes": True}
    pieces = server.post("/detokenize", **asked).json()["token_bytes"]
    assert [bytes(piece) for piece in pieces] == [
        embedded_tokenizer.token_bytes(id) for id in found["tokens"]
    ]
    chat = [{"role": "user", "content": "hi"}]
    asked = server.post("/tokenize", messages=chat, add_generation_prompt=False).json()
    expected = embedded_tokenizer.encode_chat(chat, add_generation_prompt=False)
    assert asked["tokens"] == expected
    refused(server.post("/detokenize", tokens=[10**9]), 400)
    refused(server.post("/detokenize", tokens=[-1]), 400)
    refused(server.post("/tokenize"), 400)


def test_the_tokenizer_is_described(server, embedded_tokenizer):
    with server.http() as http:
        found = http.get("/tokenizer_info").json()
    assert found["vocab_size"] == embedded_tokenizer.vocab_size
    assert found["eos_token"] == "<|im_end|>" and "im_start" in found["chat_template"]
    assert embedded_tokenizer.token_to_id("<|im_end|>") in found["eos_token_ids"]


# ---- metrics ------------------------------------------------------------------------------------


def test_metrics_count_what_was_served(llm):
    prompt = list(range(40, 60))
    with served(llm) as running, running.http() as http:
        for _ in range(2):
            running.post("/v1/completions", prompt=prompt, max_tokens=3, ignore_eos=True)
        running.post("/v1/completions", prompt=[])
        text = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert values['minqwen_requests_total{finish_reason="length"}'] == "2.0"
    assert values["minqwen_prompt_tokens_total"] == "40.0"
    assert values["minqwen_generated_tokens_total"] == "6.0"
    assert values["minqwen_cached_prompt_tokens_total"] == "16.0"
    assert values['minqwen_refused_total{status="400"}'] == "1.0"
    assert values["minqwen_time_to_first_token_seconds_count"] == "2.0"
    assert values['minqwen_running{replica="0"}'] == "0.0"


def test_prefixes_are_shared_only_under_the_same_salt(server):
    def cached(salt) -> int:
        asked = {"prompt": list(range(700, 721)), "max_tokens": 1, "cache_salt": salt}
        usage = server.post("/v1/completions", **asked).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("a"), cached("b"), cached(None)] == [0, 20, 0, 0]


def test_the_document_describes_what_may_be_asked(server):
    with server.http() as http:
        document = http.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "logprobs", "cache_salt"} <= set(fields)
    assert json.dumps(document)
