"""A server in threads of this process, and clients for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from openai import OpenAI

from minqwen import LLM, Qwen2, Tokenizer
from minqwen.engine.outputs import Delta
from minqwen.serve.app import make_app
from minqwen.serve.server import Server, bound
from minqwen.serve.service import Service

NAME = "small"
FINGERPRINT = "fp_of_these_weights"


def engine(model: Qwen2, tokenizer: Tokenizer, **options) -> LLM:
    return LLM(
        model,
        tokenizer=tokenizer,
        **{"max_model_len": 128, "num_blocks": 200, "block_size": 4, "seed": 7, **options},
    )


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    service: Service
    server: Server
    url: str

    def client(self, api_key: str = "-") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def post(self, path: str, **fields) -> httpx.Response:
        with self.http() as http:
            return http.post(path, json=fields)


@contextlib.contextmanager
def served(llm: LLM, limits=None, grace: float = 60, **options) -> Iterator[Served]:
    """A server of this engine. options: those of `make_app`."""
    service = Service(llm, NAME, limits, FINGERPRINT)
    listener = bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(service, make_app(service, **options), listener, grace)
    stepping = threading.Thread(target=service.loop.run, daemon=True)
    stepping.start()
    server.start()
    try:
        yield Served(service, server, url)
    finally:
        server.end()
        server.join()
        stepping.join()


class Gate:
    """Lets an engine make as many steps as it is told."""

    def __init__(self, llm: LLM, monkeypatch):
        self.steps, step = threading.Semaphore(0), llm.step

        def when_let() -> list[Delta]:
            if llm.has_unfinished_requests:
                self.steps.acquire()
            return step()

        monkeypatch.setattr(llm, "step", when_let)

    def let(self, steps: int) -> None:
        self.steps.release(steps)


def eventually(condition) -> None:
    """Wait until something is so; a loaded machine may take its time."""
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")
