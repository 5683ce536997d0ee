"""Asks an endpoint over HTTP, politely: so many requests, so much time, so many bytes, no more.

Whatever an endpoint does, the answer here is a JSON object or one line that says what is wrong.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

from minqwen.errors import MinqwenError
from minqwen.files import printable, quoted

PIECE = 1 << 16  # bytes read at a time
NOT_OFFERED = (400, 404, 405, 415, 422, 501)  # statuses that refuse what was asked, not who asked
PATHS = ("/chat/completions", "/completions", "/models")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """What may be asked of an endpoint in all. seconds also bounds the wait for one answer."""

    requests: int = 24
    seconds: float = 300.0
    bytes: int = 32 << 20


class NotOffered(MinqwenError):
    """The endpoint does not know this question."""


class StayHere(urllib.request.HTTPRedirectHandler):
    """Refuses to be sent elsewhere: the key and the texts are for the address that was given."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        new: str,
    ) -> NoReturn:
        raise MinqwenError(
            printable(f"{req.full_url} redirects to {quoted(new)}: give that URL if you trust it")
        )


class Endpoint:
    """An OpenAI-compatible server. url: with or without /v1. key: sent as a bearer token."""

    def __init__(self, url: str, key: str | None = None, limits: Limits | None = None):
        self.base = base_of(url)
        self.limits = limits or Limits()
        self.key = key
        self.requests = self.bytes = 0
        self.started = time.monotonic()
        handlers: list[urllib.request.BaseHandler] = [StayHere()]
        if urlsplit(self.base).hostname in LOOPBACK:  # no proxy reaches this machine's own address
            handlers.append(urllib.request.ProxyHandler({}))
        self.opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> dict[str, Any]:
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The object that the endpoint answers. Raises NotOffered if it refuses the question."""
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        url = f"{self.base}{path}"
        if self.requests >= self.limits.requests:
            raise MinqwenError(
                f"{self.base}: {self.requests} requests were made, and no more are allowed "
                "(--max-requests)"
            )
        self.requests += 1
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, data=body, headers=headers)
        left = self._left(url)
        try:
            data = in_time(lambda: self._exchange(url, request, left), left)
        except urllib.error.HTTPError as e:
            with e:
                raise self._refusal(url, e.code, self._start_of(e)) from None
        except (OSError, http.client.HTTPException) as e:
            raise no_answer(url, e) from None
        return parsed(url, data)

    def _exchange(self, url: str, request: urllib.request.Request, left: float) -> bytes:
        with self.opener.open(request, timeout=left) as answer:
            return self._read(url, answer)

    def _left(self, url: str) -> float:
        """Seconds that are left. Raises MinqwenError if none are."""
        left = self.limits.seconds - (time.monotonic() - self.started)
        if left <= 0:
            raise MinqwenError(
                f"{url}: {self.limits.seconds:g} seconds are over, and no answer is complete "
                "(--timeout)"
            )
        return left

    def _read(self, url: str, answer: http.client.HTTPResponse) -> bytes:
        """The whole body. A piece at a time, so that a slow or endless one is noticed."""
        pieces = []
        while piece := answer.read1(PIECE):
            self._left(url)
            self.bytes += len(piece)
            if self.bytes > self.limits.bytes:
                raise MinqwenError(
                    f"{url}: more than {self.limits.bytes:,} bytes in all (--max-bytes)"
                )
            pieces.append(piece)
        missing = answer.length
        if missing:
            raise MinqwenError(f"{url}: the answer ended {missing:,} bytes too early")
        return b"".join(pieces)

    def _start_of(self, answer: urllib.error.HTTPError) -> str:
        try:
            return answer.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return ""

    def _refusal(self, url: str, status: int, body: str) -> MinqwenError:
        # llama.cpp answers to `echo` with status 500 and "Only no echo is supported".
        refused = status in NOT_OFFERED or (status == 500 and "support" in body)
        kind = NotOffered if refused else MinqwenError
        hint = ""
        if status in (401, 403):
            hint = "; put a key into the environment variable that --key-variable names"
        return kind(printable(f"{url}: HTTP status {status}, {quoted(body, 160)}{hint}"))


def in_time(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns or raises; TimeoutError if it needs longer.

    A socket's own timeout is for each piece that arrives, and an endpoint may send byte by byte.
    The thread that is left behind ends with the process.
    """
    done: list[bytes | Exception] = []

    def call() -> None:
        try:
            done.append(work())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def base_of(url: str) -> str:
    """The address up to /v1. Raises MinqwenError unless it is one of HTTP."""
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        port_is_right = False
    if not port_is_right or parts.scheme not in ("http", "https") or not parts.hostname:
        raise MinqwenError(
            f"{quoted(url)} is no address of an endpoint, expected one as in http://127.0.0.1:8000"
        )
    if parts.username or parts.password:
        raise MinqwenError("a key in the URL would be printed: put it into the environment")
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    for path in PATHS:
        base = base.removesuffix(path)
    return base if base.endswith("/v1") else f"{base}/v1"


def no_answer(url: str, error: Exception) -> MinqwenError:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return MinqwenError(f"{url}: no answer in the time allowed (--timeout)")
    text = str(reason) or type(reason).__name__
    return MinqwenError(
        printable(f"{url}: cannot be asked ({quoted(text)}); is the server running?")
    )


def parsed(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:  # also bad UTF-8, and integers too long for Python
        found = quoted(data[:60].decode(errors="replace"))
        raise MinqwenError(
            printable(f"{url}: the answer is not JSON ({str(e)[:80]}): {found}")
        ) from None
    if not isinstance(value, dict):
        raise MinqwenError(f"{url}: the answer is {quoted(value, 60)}, expected a JSON object")
    return value
