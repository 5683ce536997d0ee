"""Whatever an endpoint does, one line says what is wrong, and no key leaves for another address."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from support.openai_server import Handler, Scripted, served

from minqwen.errors import MinqwenError
from minqwen.lab.audit.client import Endpoint, Limits, NotOffered, base_of


@contextlib.contextmanager
def scripted(status=200, headers=None, body=b"{}"):
    with served((status, headers or {}, body), Scripted) as url:
        yield url


class Kept(Handler):
    """engine: a list, to which each request's headers go."""

    def do_GET(self):
        self.engine.append(dict(self.headers))
        self.answer({"data": []})


def test_an_answer_is_an_object_and_the_key_is_sent():
    seen = []
    with served(seen, Kept) as url:
        endpoint = Endpoint(url, key="secret")
        assert endpoint.get("/models") == {"data": []}
    assert seen[0]["Authorization"] == "Bearer secret" and endpoint.requests == 1


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
    ],
)
def test_an_address_may_be_given_in_several_ways(url, base):
    assert base_of(url) == base


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h", "http://", "http://h:x", "", "file:///x"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(MinqwenError, match="is no address of an endpoint"):
        base_of(url)


def test_a_key_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(MinqwenError, match="put it into the environment") as caught:
        base_of("https://me:secret@host/v1")
    assert "secret" not in str(caught.value)


BODIES = {
    b"<html>": "is not JSON",
    b"": "is not JSON",
    b"[1]": "expected a JSON object",
    b"\xff\xfe": "is not JSON",
    b"[" * 100_000: "is not JSON",
    b'{"a": ' + b"9" * 5000 + b"}": "is not JSON",
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body[:6]))
def test_what_is_no_json_object_is_told(body):
    with scripted(body=body) as url, pytest.raises(MinqwenError, match=BODIES[body]) as caught:
        Endpoint(url).post("/completions", {})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused(status):
    headers = {"Location": "http://elsewhere.example/v1/models"}
    with scripted(status, headers) as url:
        endpoint = Endpoint(url, key="secret")
        with pytest.raises(MinqwenError, match="elsewhere.example|status 30"):
            endpoint.get("/models")


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refused_question_can_be_told_from_a_failure(status):
    with scripted(status, body=b'{"error": "no\nsuch"}') as url:
        with pytest.raises(NotOffered, match=f"HTTP status {status}"):
            Endpoint(url).post("/completions", {})


def test_llama_cpps_refusal_of_echo_is_no_failure():
    body = b'{"error":{"code":500,"message":"Only no echo is supported","type":"server_error"}}'
    with scripted(500, body=body) as url, pytest.raises(NotOffered, match="HTTP status 500"):
        Endpoint(url).post("/completions", {})


def test_a_failure_is_told_with_its_status():
    with scripted(500, body=b"oh\nno") as url:
        with pytest.raises(MinqwenError, match="HTTP status 500") as caught:
            Endpoint(url).get("/models")
    assert not isinstance(caught.value, NotOffered) and "\n" not in str(caught.value)
    with scripted(401) as url, pytest.raises(MinqwenError, match="--key-variable"):
        Endpoint(url).get("/models")


def test_bytes_are_bounded():
    with scripted(body=b" " * 100_000) as url:
        with pytest.raises(MinqwenError, match="more than 1,000 bytes"):
            Endpoint(url, limits=Limits(bytes=1000)).get("/models")


def test_a_body_that_is_shorter_than_promised_is_told():
    with scripted(headers={"Content-Length": "50"}) as url:
        with pytest.raises(MinqwenError, match="48 bytes too early|cannot be asked|no answer"):
            Endpoint(url, limits=Limits(seconds=5)).get("/models")


def test_requests_are_bounded():
    with scripted() as url:
        endpoint = Endpoint(url, limits=Limits(requests=2))
        endpoint.get("/models")
        endpoint.get("/models")
        with pytest.raises(MinqwenError, match="2 requests were made, and no more are allowed"):
            endpoint.get("/models")


def test_an_endpoint_that_never_answers_is_given_up():
    held = threading.Event()

    class Silent(Handler):
        def do_GET(self):
            held.wait(60)

    with served(None, Silent) as url:
        with pytest.raises(MinqwenError, match="no answer in the time allowed"):
            Endpoint(url, limits=Limits(seconds=0.2)).get("/models")
        held.set()


def test_an_endpoint_that_sends_its_headers_byte_by_byte_is_given_up():
    stop = threading.Event()

    class Slow(Handler):
        def do_GET(self):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not stop.wait(0.02):
                with contextlib.suppress(OSError):
                    self.wfile.write(b"x")

    with served(None, Slow) as url:
        with pytest.raises(MinqwenError, match="no answer in the time allowed"):
            Endpoint(url, limits=Limits(seconds=0.3)).get("/models")
        stop.set()


def test_an_address_where_nobody_listens_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(MinqwenError, match="cannot be asked"):
        Endpoint(f"http://127.0.0.1:{port}").get("/models")


def test_what_is_not_http_is_told():
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-x\r\n")
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(MinqwenError, match="cannot be asked"):
        Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}").get("/models")
    thread.join()
    listener.close()
