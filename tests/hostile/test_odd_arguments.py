"""Whatever somebody gives as an argument, the answer is a result or one line that names it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.hostile.values import VALUES, refusal

from minqwen import LLM, MinqwenError, SamplingParams
from minqwen.engine.sizing import EngineOptions
from minqwen.sampling.structured import StructuredOutputs

ONE = SamplingParams(max_tokens=1, temperature=0)
USER = [{"role": "user", "content": "a"}]
SIZES = {"max_model_len": 64, "num_blocks": 20}
FIELDS = [
    (kind, field.name)
    for kind in (SamplingParams, StructuredOutputs, EngineOptions)
    for field in dataclasses.fields(kind)
]
OF_LLM = (
    *("tokenizer", "dtype", "device", "arithmetic", "mesh", "offload", "check_finite"),
    *("num_attention_heads", "num_key_value_heads", "head_recipe", "tensor_parallel_size"),
    *("seed", "progress", "quantization", "unknown"),
    *(field.name for field in dataclasses.fields(EngineOptions)),
)


@pytest.fixture(scope="module")
def llm(embedded_model, embedded_tokenizer) -> LLM:
    return LLM(embedded_model, tokenizer=embedded_tokenizer, **SIZES)


def try_all(call: Callable[[Any], object], name: str = "", values=VALUES) -> None:
    """Nothing but MinqwenError comes of any value, and its line has the name."""
    for value in values.values():
        line = refusal(lambda value=value: call(value), MinqwenError)
        assert line is None or name in line, line


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_field_takes_a_value_or_names_itself(kind, name):
    try_all(lambda value: kind(**{name: value}), name)


@pytest.mark.parametrize("name", OF_LLM)
def test_every_argument_of_an_engine_is_taken_or_refused(name, llm, tmp_path):
    """Beside a model that is there, and beside a directory without weights."""
    (tmp_path / "config.json").write_text("{}")

    def make(value) -> None:
        LLM(llm.model, **{"tokenizer": llm.tokenizer, **SIZES, name: value}).close()

    named = "" if name in ("tokenizer", "block_size") else name  # a directory's name, num_blocks
    try_all(make, named)
    try_all(lambda value: LLM(tmp_path, **{**SIZES, name: value}))


def test_what_is_no_model_is_refused():
    try_all(lambda value: LLM(model=value, **SIZES))
    assert "model is None" in (refusal(lambda: LLM(model=None), MinqwenError) or "")


def test_a_cache_that_no_memory_holds_is_refused(llm):
    for name in ("num_blocks", "kv_cache_bytes"):
        for size in (2**50, 2**62):
            sizes = {"max_model_len": 64, name: size}
            line = refusal(lambda sizes=sizes: LLM(llm.model, **sizes), MinqwenError)
            assert line is not None and name in line, line


def ask(llm: LLM, **arguments: Any) -> None:
    llm.abort(llm.add_request(**{"prompt": "a", "sampling_params": ONE, **arguments}))


OF_REQUESTS: dict[str, Callable[[LLM, Any], object]] = {
    **{
        name: lambda llm, value, name=name: ask(llm, **{name: value})
        for name in (
            *("prompt", "sampling_params", "request_id", "cache_salt", "trace", "hooks"),
            *("priority", "unknown"),
        )
    },
    **{
        f"prompt.{name}": lambda llm, value, name=name: ask(
            llm, prompt={"prompt": "a", name: value}
        )
        for name in ("prompt", "prompt_token_ids", "cache_salt", "multi_modal_data")
    },
    "abort": lambda llm, value: llm.abort(value),
    "prompts": lambda llm, value: llm.generate(value, ONE, use_tqdm=False),
    "params": lambda llm, value: llm.generate([], value, use_tqdm=False),
    "use_tqdm": lambda llm, value: llm.generate([], ONE, use_tqdm=value),
    "stream": lambda llm, value: next(llm.stream_deltas(value, ONE)),
    "params of a stream": lambda llm, value: next(llm.stream_deltas("a", value)),
    "score": lambda llm, value: llm.score(value, use_tqdm=False),
    "messages": lambda llm, value: llm.chat(value, ONE, use_tqdm=False),
    **{
        f"message.{name}": lambda llm, value, name=name: llm.chat(
            [{**USER[0], name: value}], ONE, use_tqdm=False
        )
        for name in ("role", "content")
    },
    **{
        f"chat.{name}": lambda llm, value, name=name: llm.chat(
            USER, ONE, use_tqdm=False, **{name: value}
        )
        for name in (
            *("tools", "chat_template", "chat_template_kwargs", "documents", "system"),
            *("add_generation_prompt", "continue_final_message", "allow_special"),
        )
    },
}
CALLABLE = ("its class", "function")  # for `trace` a predicate: what it raises is its author's


@pytest.mark.parametrize("name", OF_REQUESTS)
def test_every_part_of_a_request_is_taken_or_refused(name, llm):
    values = {key: v for key, v in VALUES.items() if name != "trace" or key not in CALLABLE}
    try_all(lambda value: OF_REQUESTS[name](llm, value), values=values)
    assert not llm.has_unfinished_requests


# ---- token ids ----------------------------------------------------------------------------------

BAD_IDS = [-1, 2**31, 2**63, 10**5000, True, 1.5, "1", None, float("nan"), b"1", [1]]
OF_IDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prompt": lambda i: {"prompt": [1, i]},
    "stop_token_ids": lambda i: {"sampling_params": SamplingParams(stop_token_ids=[1, i])},
    "logit_bias": lambda i: {"sampling_params": SamplingParams(logit_bias={5: 0, i: 1.0})},
    "forced_ids": lambda i: {"sampling_params": SamplingParams(forced_ids=[1, i])},
}


@pytest.mark.parametrize("name", OF_IDS)
def test_an_id_is_one_of_the_vocabulary_or_the_field_is_named(name, llm):
    size = llm.config.vocab_size
    ask(llm, **OF_IDS[name](size - 1))
    for i in [size, *BAD_IDS]:
        if name == "logit_bias" and isinstance(i, list):
            continue  # no key of a dict
        line = refusal(lambda i=i: ask(llm, **OF_IDS[name](i)), MinqwenError)
        assert line is not None and name in line, (i, line)


def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_encoded(llm, monkeypatch):
    monkeypatch.setattr(type(llm.tokenizer), "encode", None)
    text = "a word " * 10**5
    for call in (
        lambda: ask(llm, prompt=text),
        lambda: llm.score([text], use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": text}], ONE, use_tqdm=False),
    ):
        line = refusal(call, MinqwenError)
        assert line is not None and "has at least" in line and "room for 64" in line, line


def test_the_fewest_tokens_of_a_text_are_no_more_than_it_has(embedded_tokenizer):
    for text in (
        "In the beginning " * 50,
        "e\u0301\u0327" * 90,
        " " * 300,
        "\U0001f600" * 20,
        "<|im_end|>" * 9,
    ):
        fewest = embedded_tokenizer.fewest_tokens(text)
        assert 0 < fewest <= len(embedded_tokenizer.encode(text))


# ---- several odd arguments at once --------------------------------------------------------------

ODD = st.sampled_from(list(VALUES.values()))
WILD = st.floats() | st.integers() | st.text(max_size=5)
NESTED = st.recursive(
    WILD, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2)
)
PARTS = [name for name in OF_REQUESTS if name != "trace"]
EXAMPLES = os.environ.get("MINQWEN_EXAMPLES")  # for a longer run, by chance


@settings(max_examples=int(EXAMPLES or 40), deadline=None, derandomize=EXAMPLES is None)
@given(
    st.dictionaries(st.sampled_from([name for _, name in FIELDS[:25]]), ODD | WILD),
    st.dictionaries(st.sampled_from(OF_LLM), ODD | WILD, max_size=3),
    st.sampled_from(PARTS),
    NESTED,
)
def test_no_mixture_of_odd_arguments_raises_anything_else(llm, fields, options, part, value):
    refusal(lambda: SamplingParams(**fields), MinqwenError)
    refusal(lambda: LLM("/no/such/directory", **options), MinqwenError)
    refusal(lambda: OF_REQUESTS[part](llm, value), MinqwenError)
    assert not llm.has_unfinished_requests
