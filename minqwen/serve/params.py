"""A client's fields as SamplingParams."""

from __future__ import annotations

from typing import Any

from minqwen.config import GenerationDefaults
from minqwen.sampling.params import SamplingParams
from minqwen.sampling.structured import StructuredOutputs
from minqwen.serve.errors import ApiError
from minqwen.serve.limits import Limits
from minqwen.serve.requests import ChatRequest, CompletionRequest, ResponseFormat, Sampled

# Fields that mean the same in SamplingParams. generation_config.json stands in for absent ones.
SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
    *("min_tokens", "bad_words", "skip_special_tokens", "prompt_logprobs"),
)
DEFAULT_OF_COMPLETIONS = 16  # tokens, OpenAI's


def check_limits(body: Sampled, limits: Limits) -> None:
    """Raise ApiError for a request that is larger than one client may make."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for name, strings in (("stop", stops), ("bad_words", body.bad_words or [])):
        limits.check(name, len(strings), limits.stops)
        limits.check(name, max(map(len, strings), default=0), limits.stop_characters, "characters")
    limits.check("stop_token_ids", len(body.stop_token_ids or ()), limits.biases)
    limits.check("logit_bias", len(body.logit_bias or ()), limits.biases)
    if body.n is not None and body.n > limits.n:
        raise ApiError(400, f"n is {body.n}: expected at most {limits.n}", param="n")
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        check_logprobs(name, getattr(body, name, None), limits.logprobs)


def check_logprobs(name: str, value: int | None, most: int) -> None:
    if value is None or isinstance(value, bool):
        return
    if not 0 <= value <= most:
        raise ApiError(400, f"{name} is {value}: expected 0 to {most}", param=name)


def completion_params(
    body: CompletionRequest, defaults: GenerationDefaults, limits: Limits
) -> SamplingParams:
    """With max_tokens 0 one token is drawn, which the answer leaves out."""
    if body.suffix:
        raise ApiError(400, "suffix: this model completes at the end only", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: expected n; there is no beam search", param="best_of")
    wanted = DEFAULT_OF_COMPLETIONS if body.max_tokens is None else max(body.max_tokens, 0)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0: that is for echo", param="max_tokens")
    if body.max_tokens is not None and body.max_tokens < 0:
        raise ApiError(400, f"max_tokens is {body.max_tokens}: expected at least 0")
    explicit = common(body, limits)
    if body.echo and body.logprobs is not None:
        explicit.setdefault("prompt_logprobs", 0)
        explicit["prompt_logprobs"] = max(explicit["prompt_logprobs"], body.logprobs)
    return made(defaults, {**explicit, "logprobs": body.logprobs, "max_tokens": max(wanted, 1)})


def chat_params(
    body: ChatRequest,
    defaults: GenerationDefaults,
    limits: Limits,
    calls: StructuredOutputs | None = None,
) -> SamplingParams:
    """calls: the grammar of a tool's call that must come."""
    explicit = common(body, limits)
    if calls is not None:
        if "structured_outputs" in explicit:
            raise ApiError(400, "a forced tool_choice cannot be combined with a response_format")
        explicit["structured_outputs"] = calls
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    room = room_of_chat(body)
    max_tokens = defaults.max_new_tokens if room is None else room
    return made(defaults, {**explicit, "logprobs": logprobs, "max_tokens": max_tokens})


def room_of_chat(body: ChatRequest) -> int | None:
    """Most new tokens; None: the rest of the context."""
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise ApiError(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens, its newer name, is "
            f"{body.max_completion_tokens}: give one",
            param="max_tokens",
        )
    return body.max_completion_tokens


def common(body: Sampled, limits: Limits) -> dict[str, Any]:
    """The fields that are given, under SamplingParams's names."""
    check_limits(body, limits)
    given = {name: getattr(body, name) for name in SAME}
    explicit = {name: value for name, value in given.items() if value is not None}
    if body.seed is not None:
        explicit["seed"] = body.seed % 2**64  # OpenAI's seeds may be negative
    if body.logit_bias:
        explicit["logit_bias"] = {token_id(i): bias for i, bias in body.logit_bias.items()}
    grammar = grammar_of(body, limits)
    if grammar is not None:
        explicit["structured_outputs"] = grammar
    return explicit


def token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise ApiError(400, f"logit_bias has {key!r}: expected token ids", param="logit_bias")
    return int(key)


def grammar_of(body: Sampled, limits: Limits) -> StructuredOutputs | None:
    """What response_format or structured_outputs asks of the text."""
    wanted = None if body.response_format is None else of_response_format(body.response_format)
    if body.structured_outputs is not None:
        if wanted is not None:
            raise ApiError(400, "response_format and structured_outputs: give one of them")
        wanted = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    if wanted is None:
        return None
    check_grammar_size("the schema or grammar", wanted, limits)
    return StructuredOutputs(**wanted)


def of_response_format(wanted: ResponseFormat) -> dict[str, Any] | None:
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "text":
        return None
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        where = "response_format.json_schema.schema"
        raise ApiError(400, f"{where} is missing: give a JSON schema", param="response_format")
    return {"json": wanted.json_schema.schema_}


def check_grammar_size(what: str, value: Any, limits: Limits) -> None:
    """Raise ApiError if the text of a grammar is longer than a client may give."""
    size, most = len(str(value)), limits.schema_characters
    if size > most:
        raise ApiError(400, f"{what} has {size} characters: expected at most {most}")


def made(defaults: GenerationDefaults, explicit: dict[str, Any]) -> SamplingParams:
    return SamplingParams.from_defaults(defaults, **explicit)
