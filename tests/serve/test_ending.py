"""A server that is told to end lets what runs finish, for a while, and takes nothing new."""

from __future__ import annotations

import threading

import httpx
import pytest
from support.serving import Gate, engine, eventually, served

from minqwen.errors import MinqwenError
from minqwen.serve.server import bound, is_loopback

ASKED = {"prompt": "And", "max_tokens": 4, "ignore_eos": True, "stream": True}


def test_what_runs_is_finished_and_nothing_new_is_taken(
    embedded_model, embedded_tokenizer, monkeypatch
):
    llm = engine(embedded_model, embedded_tokenizer)
    gate = Gate(llm, monkeypatch)
    gate.let(2)
    with served(llm) as running, running.http() as http:
        with http.stream("POST", "/v1/completions", json=ASKED) as response:
            lines = response.iter_lines()
            next(lines)
            running.server.end()

            def refused() -> bool:
                try:
                    return running.post("/v1/completions", prompt="a").status_code == 503
                except httpx.TransportError:
                    return True

            eventually(refused)
            gate.let(100)
            *_, finish, last = [line for line in lines if line]
        assert last == "data: [DONE]" and '"length"' in finish
        running.server.join()
    assert running.service.loop.ended


def test_after_the_grace_who_still_runs_is_told(embedded_model, embedded_tokenizer, monkeypatch):
    llm = engine(embedded_model, embedded_tokenizer)
    gate = Gate(llm, monkeypatch)
    gate.let(2)
    with served(llm, grace=0) as running, running.http() as http:
        loop, told = running.service.loop, threading.Event()
        abort_all = loop.abort_all
        monkeypatch.setattr(loop, "abort_all", lambda error: (abort_all(error), told.set()))
        with http.stream("POST", "/v1/completions", json=ASKED) as response:
            lines = response.iter_lines()
            next(lines)
            running.server.end()
            told.wait()
            gate.let(1)  # the step that it is in; before the next one it is dropped
            *found, error, last = [line for line in lines if line]
    assert "not done within 0 s" in error and last == "data: [DONE]"
    assert not any('"length"' in line for line in found)


def test_an_address_that_cannot_be_had_is_told_in_one_line():
    first = bound("127.0.0.1", 0)
    first.listen()
    assert is_loopback(first)
    with pytest.raises(MinqwenError, match="cannot listen there"):
        bound("127.0.0.1", first.getsockname()[1])
    with pytest.raises(MinqwenError, match="cannot listen there"):
        bound("no.such.host.invalid", 0)
    first.close()
