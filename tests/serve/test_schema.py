"""Requests made from the OpenAPI document by schemathesis: none is answered with a 5xx."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from support.serving import engine, served

MANY = ("/v1/completions", "/v1/chat/completions", "/tokenize")


def test_no_request_is_answered_with_a_5xx(embedded_model, embedded_tokenizer):
    schemathesis = pytest.importorskip("schemathesis")  # here, because it takes two seconds
    llm = engine(embedded_model, embedded_tokenizer, max_model_len=24)
    asked = set()
    with served(llm) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=12 if operation.path in MANY else 3,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def ask(case) -> None:
                response = case.call(timeout=120)
                assert response.status_code < 500, (case.body, response.text)
                if response.status_code == 200:
                    told = case.operation.definition.raw["responses"]["200"]["content"]
                    assert response.headers["content-type"][0].partition(";")[0] in told
                if response.status_code >= 400:
                    assert "message" in response.json()["error"], response.text

            ask()
            asked.add(operation.path)
    assert asked >= {*MANY, "/detokenize", "/health", "/metrics", "/v1/models"}
