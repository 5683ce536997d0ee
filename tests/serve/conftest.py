"""A server of the embedded model, and what skips these tests where there can be none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

MISSING = [
    name
    for name in ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx", "llguidance")
    if importlib.util.find_spec(name) is None
]


class Skipped(pytest.Module):
    """A file of tests that cannot be imported here."""

    def collect(self):
        pytest.skip(f"the server's tests need {', '.join(MISSING)}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(scope="session")
def llm(embedded_model, embedded_tokenizer):
    """The engine that the server has; the tests use another one as their oracle."""
    from support.serving import engine

    return engine(embedded_model, embedded_tokenizer)


@pytest.fixture(scope="session")
def oracle(embedded_model, embedded_tokenizer):
    """An engine of the same model, called directly."""
    from support.serving import engine

    return engine(embedded_model, embedded_tokenizer)


@pytest.fixture(scope="session")
def server(llm) -> Iterator[object]:
    """A server for all tests of a process that need no limits of their own."""
    from support.serving import served

    with served(llm) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client."""
    return server.client()
